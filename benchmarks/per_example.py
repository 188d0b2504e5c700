"""Squares of every example's gradient: ours, by vmap of a gradient, and by PyTorch."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from classifiers import CATEGORICAL, Classifier
from measuring import measure, seconds, table

import fisherflow_jax as ff

OURS = "empirical"
GRADIENT = "gradient"
_CHUNK = 64  # examples whose gradients are held at once where that is for us to say


def _by_vmap(model: Classifier, chunk: int | None) -> Callable[[int], Any]:
    loss = ff.negative_log_likelihood(model.apply_fn, CATEGORICAL)

    def gradient(params: Any, x: jax.Array, y: jax.Array) -> Any:
        return jax.grad(loss)(params, (x[None], y[None]))

    @jax.jit
    def squares(params: Any, batch: tuple) -> Any:
        def sums(part: tuple) -> Any:
            gradients = jax.vmap(gradient, (None, 0, 0))(params, *part)
            return jax.tree.map(lambda g: jnp.sum(jnp.square(g), 0), gradients)

        if chunk is None:
            return sums(batch)
        parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), batch)
        return jax.tree.map(lambda s: jnp.sum(s, 0), jax.lax.map(sums, parts))

    return lambda number: squares(model.params, model.batch)


def _ours(model: Classifier, factory: Callable, **options: Any) -> Callable[[int], Any]:
    structure = ff.structures.diagonal()
    estimator = factory(model.apply_fn, CATEGORICAL, structure, **options)
    call = jax.jit(lambda params, batch: estimator(params, batch).entries)
    return lambda number: call(model.params, model.batch)


def _by_torch(model: Classifier) -> dict[str, Callable[[int], Any]]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(cores or os.cpu_count() or 1)

    def tensor(x: jax.Array) -> Any:
        return torch.from_numpy(np.array(x))

    params = [tensor(leaf) for leaf in jax.tree.leaves(model.params)]  # b, w, b, w, ...
    inputs, labels = tensor(model.batch[0]), tensor(model.batch[1]).long()

    def loss(params: list, x: Any, y: Any) -> Any:
        for bias, kernel in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = torch.relu(x @ kernel + bias)
        return torch.nn.functional.cross_entropy(x @ params[-1] + params[-2], y)

    gradient = torch.func.grad(loss)

    def per_example(number: int) -> Any:
        sums = [torch.zeros_like(p) for p in params]
        one = torch.func.vmap(gradient, (None, 0, 0))
        for start in range(0, len(labels), _CHUNK):
            part = slice(start, start + _CHUNK)
            for total, stack in zip(
                sums, one(params, inputs[part], labels[part]), strict=True
            ):
                total += stack.square().sum(0)
        return [np.asarray(total) for total in sums]

    def whole(number: int) -> Any:
        return [np.asarray(g) for g in gradient(params, inputs, labels)]

    return {
        f"PyTorch {torch.__version__}, a gradient": whole,
        f"PyTorch, vmap(grad), {_CHUNK} at a time": per_example,
    }


def compare(model: Classifier, quick: bool) -> list[dict[str, Any]]:
    """Prints a table and returns it as records. The model must be the MLP."""
    loss = ff.negative_log_likelihood(model.apply_fn, CATEGORICAL)
    gradient = jax.jit(jax.grad(loss))
    empirical, exact = ff.estimators.empirical, ff.estimators.exact
    methods: dict[str, Callable[[int], Any]] = {
        GRADIENT: lambda number: gradient(model.params, model.batch),
        OURS: _ours(model, empirical),
        "empirical, fast_squares=False": _ours(model, empirical, fast_squares=False),
        f"jax.vmap(jax.grad), {_CHUNK} at a time": _by_vmap(model, _CHUNK),
        "jax.vmap(jax.grad), all at once": _by_vmap(model, None),
    }
    if importlib.util.find_spec("torch"):
        methods |= _by_torch(model)
    same = [name for name in methods if "gradient" not in name]
    if not quick:
        methods["exact"] = _ours(model, exact)
        methods["exact, fast_squares=False"] = _ours(model, exact, fast_squares=False)
    rounds = dict.fromkeys(methods, 3)
    timings = measure(methods, rounds)

    def flat(name: str) -> np.ndarray:
        leaves = jax.tree.leaves(timings[name].outputs[-1])
        return np.concatenate([np.ravel(leaf) for leaf in leaves])

    reference, ours = flat(OURS), timings[OURS]
    plain = timings[GRADIENT]
    rows, records = [], []
    for name, timing in timings.items():
        over = min(timing.seconds) / min(plain.seconds)
        slower = min(timing.seconds) / min(ours.seconds)
        gap = ""
        if name in same:
            gap = f"{np.max(np.abs(flat(name) - reference)) / np.max(reference):.0e}"
        cells = seconds(timing.median), timing.spread, f"{over:.2f}x", f"{slower:.2f}x"
        rows.append((name, *cells, gap))
        records.append({"method": name, "seconds": timing.seconds, "over": over})
    header = ("", "median", "range", "x gradient", "x ours", "difference")
    print(table(header, rows))
    if "torch" not in str(list(methods)).lower():
        print("   PyTorch is not installed: `pip install torch` adds its rows.")
    print(
        "   difference: the largest from ours, over the largest entry; ratios are of "
        "the fastest rounds\n"
    )
    return records
