"""A step, a first call and the state of K-FAC, beside AdamW and Muon, on a transformer.

    python benchmarks/transformer_step.py            # some minutes
    python benchmarks/transformer_step.py --quick    # two layers, few rounds

A causal transformer of six layers, d_model 256, a vocabulary of 2,000 and 512 tokens a
batch. Steps are calls of their own, ten of them timed together (one of ten renews
factors and inverses), the methods by turns. A first call traces, lowers, compiles and
runs a step, in a process of its own. Bytes are those of the state, from shapes.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import classifiers
import jax
import jax.numpy as jnp
import optax
from measuring import describe_machine, measure, seconds, table
from threadpoolctl import threadpool_limits

import fisherflow_jax as ff

WIDTH, HEADS, VOCABULARY, ROWS, LENGTH = 256, 4, 2000, 8, 64
LIKELIHOOD = ff.likelihoods.categorical()
ADAMW, MUON, KFAC = "optax.adamw", "optax.contrib.muon", "ff.kfac, all every 10"
BOUNDED, EACH = "ff.kfac, all every 10, max_kl", "ff.kfac, its defaults"
STORED, NARROW = f"{KFAC}, bfloat16", f"{KFAC}, bfloat16, widest=512"
# targets: a step and a first call over AdamW's, bytes a parameter
STEP, FIRST, BYTES = 3.0, 4.0, 20.0


def problem(num_layers: int) -> tuple[Callable, Any, tuple]:
    keys = iter(jax.random.split(jax.random.key(0), 4 * num_layers + 4))

    params = {
        "table": 0.02 * jax.random.normal(next(keys), (VOCABULARY, WIDTH)),
        "position": 0.02 * jax.random.normal(next(keys), (LENGTH, WIDTH)),
        "layers": [classifiers.block(keys, WIDTH) for _ in range(num_layers)],
        "norm": classifiers.norm(WIDTH),
        "head": classifiers.dense(next(keys), (WIDTH, VOCABULARY)),
    }
    ids = jax.random.randint(next(keys), (ROWS, LENGTH + 1), 0, VOCABULARY)
    return apply_fn, params, (ids[:, :-1], ids[:, 1:])


def apply_fn(params: Any, ids: jax.Array) -> jax.Array:
    x = params["table"][ids] + params["position"][None]
    causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for layer in params["layers"]:
        x = classifiers.through_block(layer, x, HEADS, causal)
    return classifiers.affine(params["head"], classifiers.normalised(params["norm"], x))


def optimizers(inputs: Any) -> dict[str, Callable]:
    model = apply_fn, LIKELIHOOD
    shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
    common = {"inputs": shape, "key": 0, "inverse_period": 10}
    made = functools.partial(ff.kfac, 1e-2, *model, period=10, max_kl=None, **common)
    return {
        ADAMW: lambda: optax.adamw(1e-3),
        MUON: lambda: optax.contrib.muon(1e-3),
        KFAC: made,
        STORED: lambda: made(store="bfloat16"),
        NARROW: lambda: made(store="bfloat16", widest=512),
        BOUNDED: lambda: ff.kfac(1e-2, *model, period=10, **common),
        EACH: lambda: ff.kfac(1e-2, *model, inputs=shape, key=0),
    }


def step_of(optimizer: Any) -> Callable:
    optimizer = optax.with_extra_args_support(optimizer)
    loss = jax.value_and_grad(ff.negative_log_likelihood(apply_fn, LIKELIHOOD))

    def step(params: Any, state: Any, batch: tuple) -> tuple:
        value, gradients = loss(params, batch)
        updates, state = optimizer.update(gradients, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def first_call(num_layers: int, name: str) -> float:
    """Seconds of the processor, to trace, lower, compile and run a step."""
    _, params, batch = problem(num_layers)
    optimizer = optimizers(batch[0])[name]()
    state = jax.block_until_ready(optimizer.init(params))
    jax.block_until_ready(jax.jit(jax.grad(lambda x: jnp.sum(x**2)))(jnp.ones(3)))
    start = time.process_time()
    jax.block_until_ready(step_of(optimizer)(params, state, batch))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, few rounds")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", nargs="+", help="methods, by a part of their name")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threadpool_limits(1, user_api="blas")
    layers = 2 if arguments.quick else arguments.layers
    if arguments.first:
        print(json.dumps(first_call(layers, arguments.first)))
        return
    _, params, batch = problem(layers)
    chosen = {
        name: make()
        for name, make in optimizers(batch[0]).items()
        if not arguments.only
        or name == ADAMW
        or any(part in name for part in arguments.only)
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{describe_machine(('jax', 'jaxlib', 'optax'))}\nLAPACK on one thread\n\n"
        f"transformer, {layers} layers, d_model {WIDTH}, vocabulary {VOCABULARY:,}, "
        f"{ROWS} x {LENGTH} tokens: {size:,} parameters\n",
        flush=True,
    )
    firsts = {}
    for name in chosen:
        command = [sys.executable, __file__, "--layers", str(layers), "--first", name]
        found = [
            json.loads(subprocess.run(command, stdout=-1, check=True).stdout)
            for _ in range(1 if arguments.quick else 3)
        ]
        firsts[name] = statistics.median(found)
    rounds = 2 if arguments.quick else 7
    calls = {name: ten_steps(made, params, batch) for name, made in chosen.items()}
    timings = measure(calls, dict.fromkeys(calls, rounds), shuffle=True)
    rows, found = [], {}
    for name, timing in timings.items():
        own = [
            mine / adam
            for mine, adam in zip(timing.seconds, timings[ADAMW].seconds, strict=True)
        ]
        share = ff.transforms.bytes_per_device(chosen[name], params) / size
        found[name] = statistics.median(own), firsts[name] / firsts[ADAMW], share
        rows.append(
            (
                name,
                seconds(timing.median / 10),
                f"{found[name][0]:.2f}x",
                f"{min(own):.2f}-{max(own):.2f}",
                seconds(firsts[name]),
                f"{found[name][1]:.1f}x",
                f"{share:.1f}",
            )
        )
    header = "", "a step", "x AdamW", "range", "first call", "x AdamW", "bytes a param"
    print(table(header, rows), "\n")
    nothing = (math.nan,) * 3
    for what, name, index, target in (
        ("a step", KFAC, 0, STEP),
        ("a first call", KFAC, 1, FIRST),
        ("bytes a parameter", STORED, 2, BYTES),
        ("bytes a parameter", NARROW, 2, BYTES),
    ):
        ratio = found.get(name, nothing)[index]
        met = "met   " if ratio <= target else "missed"
        print(f"{met}  {name}, {what}: {ratio:.2f} (at most {target:g})")


def ten_steps(optimizer: Any, params: Any, batch: tuple) -> Callable[[int], Any]:
    step = step_of(optimizer)
    carry = jax.tree.map(jnp.copy, params), optimizer.init(params)

    def call(number: int) -> Any:
        nonlocal carry
        for _ in range(10):
            *carry, value = step(*carry, batch)
        return jax.block_until_ready(value)

    return call


if __name__ == "__main__":
    main()
