"""What a first call costs: traces, seconds and equations, and what a second one saves.

    python benchmarks/first_call.py [another checkout] [--repeats 5]

The model is a small network of three classes. Seconds and equations are ratios to a
first `jax.jit(jax.value_and_grad(loss))` of it in the same process; each subject has
processes of its own. With another checkout of this package (`git worktree add ../before
COMMIT`) both are measured by turns, and stand side by side.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
SUBJECTS = ("flow.update", "kfac.update", "predict")


def measure_import() -> dict:
    """CPU seconds of importing the package, relative to jax and optax before it."""
    start = time.process_time()
    import optax  # noqa: F401

    middle = time.process_time()
    import fisherflow_jax  # noqa: F401

    end = time.process_time()
    return {"import": (end - middle) / (middle - start)}


def count_equations(jaxpr) -> int:
    """Equations of a program and of those that it calls."""
    import jax

    inner = jax.tree.leaves(
        [equation.params for equation in jaxpr.eqns],
        is_leaf=lambda value: hasattr(value, "eqns"),
    )
    called = [value for value in inner if hasattr(value, "eqns")]
    return len(jaxpr.eqns) + sum(map(count_equations, called))


def measure(subject: str) -> dict:
    """One subject's first call, after that of the loss and its gradient."""
    import jax
    import jax.numpy as jnp

    import fisherflow_jax as ff

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: (
            compiled.append(name)
            if name == "/jax/core/compile/backend_compile_duration"
            else None
        )
    )
    traced = collections.Counter()

    def apply_fn(params, inputs):
        traced[jnp.shape(inputs)] += 1
        hidden = jnp.tanh(inputs @ params["w"] + params["b"])
        return hidden @ params["head"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (8, 12)),
        "b": jnp.zeros(12),
        "head": jax.random.normal(keys[1], (12, 3)),
    }
    inputs = jax.random.normal(keys[2], (64, 8))
    batch = inputs, jnp.argmax(inputs[:, :3], 1)
    likelihood = ff.likelihoods.categorical()

    def make():
        """What the subject is called with, and its call, from fresh equal choices."""
        if subject == "kfac.update":
            layers = ff.layers.find_layers(apply_fn, params, inputs)
            optimizer = ff.kfac(0.1, apply_fn, likelihood, layers, key=0)
            gradient = jax.tree.map(jnp.ones_like, params)
            state = optimizer.init(params)
            return lambda state: optimizer.update(
                gradient, state, params, batch=batch
            ), state
        flow = ff.fisher_flow(
            apply_fn,
            likelihood,
            structure=ff.structures.full(),
            memory=ff.memories.stationary(),
        )
        state = flow.init(params)
        if subject == "flow.update":
            return lambda state: flow.update(state, batch), state
        # by keyword: the order of arguments has changed once
        names = {"apply_fn": apply_fn, "inputs": inputs, "likelihood": likelihood}
        return lambda state: ff.predict(state, **names).mean, state

    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, likelihood))
    start = time.perf_counter()
    jax.block_until_ready(jax.jit(loss)(params, batch))
    of_the_loss = time.perf_counter() - start
    equations = count_equations(jax.make_jaxpr(loss)(params, batch).jaxpr)

    call, state = make()
    traced.clear()
    start = time.perf_counter()
    jax.block_until_ready(call(state))
    seconds = time.perf_counter() - start
    traces = max(traced.values()), sum(traced.values())
    own = count_equations(jax.make_jaxpr(call)(state).jaxpr)

    again, state = make()
    compiled.clear()
    jax.block_until_ready(again(state))
    return {
        "traces of the model a shape": traces[0],
        "traces of the model": traces[1],
        "seconds": seconds / of_the_loss,
        "equations": own / equations,
        "compiled by a second, equal one": len(compiled),
    }


def in_a_process(checkout: Path, subject: str) -> dict:
    """The figures of a subject, from a fresh interpreter over a checkout."""
    program = [sys.executable, __file__, "--subject", subject]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{checkout}, {subject}:\n{done.stderr}")
    return json.loads(done.stdout)


def described(values: list[float]) -> str:
    """The median, and the least and greatest."""
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", nargs="?", type=Path, help="another checkout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--subject", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.subject:
        figures = (
            measure_import()
            if options.subject == "import"
            else measure(options.subject)
        )
        print(json.dumps(figures))
        return
    checkouts = {"here": HERE}
    if options.other:
        checkouts["there"] = options.other.resolve()
    found = collections.defaultdict(list)
    for _ in range(options.repeats):
        for subject in (*SUBJECTS, "import"):
            for name, checkout in checkouts.items():
                for figure, value in in_a_process(checkout, subject).items():
                    found[subject, figure, name].append(value)
    width = 26
    print(f"{'':12} {'':32}" + "".join(f"{name:{width}}" for name in checkouts))
    for subject, figure in dict.fromkeys(key[:2] for key in found):
        cells = [described(found[subject, figure, name]) for name in checkouts]
        label = "CPU time / jax and optax" if figure == "import" else figure
        print(f"{subject:12} {label:32}" + "".join(f"{c:{width}}" for c in cells))


if __name__ == "__main__":
    main()
