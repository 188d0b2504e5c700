"""How K-FAC's program grows with the number of equal layers, beside the gradient's.

    python benchmarks/depth.py [--layers 6 12 24]

Residual layers of two kernels and biases, a step with K-FAC's defaults. Equations are
those of `kfac.update`, each inner program counted where it is called; seconds those of
the processor for tracing, lowering and compiling a step (gradient, update, parameters).
Ratios are to `jax.value_and_grad` of the loss; a slope is of what a layer more adds.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import optax
from first_call import count_equations
from measuring import describe_machine, table

import fisherflow_jax as ff

WIDTH, ROWS, CLASSES = 32, 64, 10
MOST_EQUATIONS, MOST_SECONDS = 4, 8  # targets: a slope, and at the deepest


def problem(num_layers: int):
    """A residual network, its parameters and a batch."""
    keys = jax.random.split(jax.random.key(0), 2 * num_layers + 1)
    params: dict = {"head": jax.random.normal(keys[-1], (WIDTH, CLASSES)) / 6}
    for i in range(num_layers):
        kernels = jax.random.normal(keys[i], (2, WIDTH, WIDTH)) / 6
        biases = jnp.zeros((2, WIDTH))
        params[f"layer {i:02d}"] = list(zip(kernels, biases, strict=True))

    def apply_fn(params, x):
        for i in range(num_layers):
            (w, b), (v, c) = params[f"layer {i:02d}"]
            x = x + jnp.tanh(x @ w + b) @ v + c
        return x @ params["head"]

    x = jax.random.normal(keys[-2], (ROWS, WIDTH))
    return apply_fn, params, (x, jnp.arange(ROWS) % CLASSES)


def seconds(function, *arguments) -> float:
    """Of the processor, to trace, lower and compile."""
    start = time.process_time()
    jax.jit(function).lower(*arguments).compile()
    return time.process_time() - start


def measure(num_layers: int) -> tuple[int, int, float, float]:
    """Equations of the gradient and of the update, and seconds of both programs."""
    apply_fn, params, batch = problem(num_layers)
    likelihood = ff.likelihoods.categorical()
    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, likelihood))
    optimizer = ff.kfac(0.1, apply_fn, likelihood, inputs=batch[0], key=0)
    state = optimizer.init(params)

    def update(gradient, state, params, batch):
        return optimizer.update(gradient, state, params, batch=batch)

    def step(params, state, batch):
        value, gradient = loss(params, batch)
        updates, state = update(gradient, state, params, batch)
        return optax.apply_updates(params, updates), state, value

    return (
        count_equations(jax.make_jaxpr(loss)(params, batch).jaxpr),
        count_equations(jax.make_jaxpr(update)(params, state, params, batch).jaxpr),
        seconds(loss, params, batch),
        seconds(step, params, state, batch),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 24])
    counts = parser.parse_args().layers
    print(describe_machine(["jax", "jaxlib"]))
    measure(1)  # what the first program of a process costs on top
    rows, before = [], None
    for count in counts:
        found = measure(count)
        gradient, update, of_gradient, of_step = found
        slope = "" if before is None else ratio(before[1], found)
        rows.append(
            [
                str(count),
                str(gradient),
                str(update),
                slope,
                f"{of_gradient:.2f}",
                f"{of_step:.2f}",
                f"{of_step / of_gradient:.1f}",
            ]
        )
        before = count, found
    heads = ["layers", "gradient", "update", "slope", "gradient, s", "step, s", "ratio"]
    print(table(heads, rows))
    print(f"targets: slope at most {MOST_EQUATIONS}, ratio at most {MOST_SECONDS}")


def ratio(before: tuple, after: tuple) -> str:
    return f"{(after[1] - before[1]) / (after[0] - before[0]):.2f}"


if __name__ == "__main__":
    main()
