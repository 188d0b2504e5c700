"""Pulling cotangents back through the model, example by example, chunk by chunk.

An estimator is a *rule*, which says what vectors enter at the model's outputs:
`(likelihood, outputs, targets, key) -> cotangents (R, n, *outputs.shape[1:])`. Here
they are pulled back through `apply_fn` and reduced by the structure. Weights enter
once, as the square root on each example's vectors.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import information as ops
from fisherflow_jax import vectors
from fisherflow_jax.batch import Batch
from fisherflow_jax.estimators.estimator import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import Structure

PyTree = Any
Rule = Callable[[Likelihood, jax.Array, Any, jax.Array | None], jax.Array]

# Pulled-back vectors held at once when no chunk_size is given: 64 MiB in float32.
_CHUNK_ENTRIES = 2**24


def per_example(
    name: str,
    rule: Rule,
    *,
    random: bool = False,
    uses_root: bool = False,
    needs_targets: bool = False,
) -> Callable[..., Estimator]:
    """The estimator factory whose squares are taken example by example."""

    def factory(
        apply_fn: Callable,
        likelihood: Likelihood,
        structure: Structure,
        *,
        chunk_size: int | None = None,
    ) -> Estimator:
        check_chunk_size(chunk_size)

        def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
            if needs_targets and batch.targets is None:
                raise ValueError(
                    f"estimators.{name} needs targets; the batch's are None."
                )
            check_outputs(apply_fn, likelihood, params, batch)
            pull = _puller(apply_fn, likelihood, rule, params)

            def reduce(chunk: Batch, keys: jax.Array | None) -> Any:
                return structure.reduce(pull(chunk, keys))

            size = chunk_size or _default_chunk_size(pull, params, batch, key)
            return sum_chunks(reduce, structure, params, batch, key, size)

        draws = random or (uses_root and likelihood.random_root)

        return Estimator(name, compute, structure, draws)

    return factory


def check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(
            f"chunk_size is a positive whole number of examples; got {chunk_size!r}."
        )


def check_outputs(
    apply_fn: Callable, likelihood: Likelihood, params: PyTree, batch: Batch
) -> None:
    """Raises where the model's outputs do not fit the batch or the likelihood."""
    outputs = jax.eval_shape(apply_fn, params, batches.unshare(batch.inputs))
    count = batches.num_examples(batch)
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) == 0 or shape[0] != count:
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs whose leading "
            f"axis is the examples' (n = {count}); got {outputs}."
        )
    likelihood.check(outputs, batch.targets)


def _puller(
    apply_fn: Callable, likelihood: Likelihood, rule: Rule, params: PyTree
) -> Callable[[Batch, jax.Array | None], PyTree]:
    """`(batch, keys) -> vectors`, leaves `(n * R, *leaf.shape)`."""

    def pull(batch: Batch, keys: jax.Array | None) -> PyTree:
        sliced, rebuild = batches.split(batch.inputs)

        def one(parts: list, targets: Any, weight: jax.Array, key: Any) -> PyTree:
            inputs = batches.unshare(rebuild([x[None] for x in parts]))
            outputs, vjp = jax.vjp(lambda p: apply_fn(p, inputs), params)
            targets = jax.tree.map(lambda y: y[None], targets)
            cotangents = rule(likelihood, jax.lax.stop_gradient(outputs), targets, key)
            pulled = jax.vmap(lambda c: vjp(c)[0])(cotangents)

            def weigh(x: jax.Array) -> jax.Array:
                weighted = x * jnp.sqrt(weight).astype(x.dtype)
                # no blanked row is finite for every model
                return jnp.where(weight == 0, jnp.zeros_like(x), weighted)

            # after widening: the root of a weight has no exact bfloat16
            return jax.tree.map(weigh, vectors.widen(pulled))

        pulled = jax.vmap(one)(sliced, batch.targets, batch.weights, keys)
        return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), pulled)

    return pull


def _default_chunk_size(
    pull: Callable, params: PyTree, batch: Batch, key: jax.Array | None
) -> int:
    count = batches.num_examples(batch)
    keys = None if key is None else jax.eval_shape(_example_keys, key, batch.weights)
    shapes = jax.eval_shape(pull, batch, keys)
    entries = max(vectors.size(shapes) // count, 1)
    return max(_CHUNK_ENTRIES // entries, 1)


def _example_keys(key: jax.Array, weights: jax.Array) -> jax.Array:
    # each example's own key, so that chunking changes no draw
    indices = jnp.arange(weights.shape[0], dtype=jnp.uint32)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def sum_chunks(
    reduce: Callable[[Batch, jax.Array | None], Any],
    structure: Structure,
    params: PyTree,
    batch: Batch,
    key: jax.Array | None,
    size: int,
) -> Any:
    """The sum of `reduce(chunk, keys)` over chunks of at most `size` examples."""
    count = batches.num_examples(batch)
    keys = None if key is None else _example_keys(key, batch.weights)
    if count <= size:
        return reduce(batch, keys)
    parts, number = batches.chunks(batch, size)
    sliced, rebuild = batches.split(parts.inputs)
    if keys is not None:
        index = jnp.minimum(jnp.arange(parts.weights.size, dtype=jnp.int32), count - 1)
        keys = keys[index].reshape((number, -1))

    def body(total: Any, part: Any) -> tuple[Any, None]:
        leaves, targets, weights, chunk_keys = part
        chunk = Batch(rebuild(leaves), targets, weights)
        return ops.add(total, reduce(chunk, chunk_keys)), None

    zero = structure.isotropic(params, 0.0)
    total, _ = jax.lax.scan(body, zero, (sliced, parts.targets, parts.weights, keys))
    return total
