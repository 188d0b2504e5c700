"""Pulling cotangents back through the model: example by example, or by groups.

An estimator is a *rule*, which says what vectors enter at the model's outputs of one
example: `(likelihood, outputs (1, ...), targets, key) -> cotangents (R, 1, ...)`. Here
they are pulled back through `apply_fn` and reduced by the structure. Weights enter
once, as the square root on each example's vectors.

Squares are taken example by example, or of the sum over a group: with cotangents that
have mean zero and are independent between examples, the cross terms vanish in the mean.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.estimators import _chunking as chunking
from fisherflow_jax.estimators import _tapping as tapping
from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.layers import Layers
from fisherflow_jax.layers._inputs import named
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.structures import Structure

PyTree = Any
Rule = Callable[[Likelihood, jax.Array, Any, jax.Array | None], jax.Array]


def pulled(
    name: str,
    rule: Rule,
    apply_fn: Any,
    likelihood: Any,
    structure: Any,
    *,
    groups: int | None = None,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    random: bool = False,
    needs_targets: bool = False,
    num_columns: int = 1,
) -> Estimator:
    """The estimator of a rule. `groups=None` squares example by example.

    `num_columns` are the cotangents of an example, where they are squared by groups.
    """
    chunking.check_chunk_size(chunk_size)
    if groups is not None and (not isinstance(groups, int) or groups < 1):
        raise ValueError(
            "groups is a positive whole number of micro-batches, or None for one an "
            f"example; got {groups!r}."
        )

    def prepare(params: PyTree, batch: Batch) -> None:
        if needs_targets and batch.targets is None:
            raise ValueError(f"estimators.{name} needs targets; the batch's are None.")
        check_outputs(apply_fn, likelihood, params, batch, structure.layers)

    def by_example(batch: Batch) -> bool:
        return _examples_of_group(groups, batch) == 1

    use_taps = fast_squares and structure.takes_outer_products
    batched = tapping.batched_layers(structure, groups, chunk_size, fast_squares)

    def cheapest(
        params: PyTree, one: Batch, key: jax.Array | None
    ) -> tuple[Callable, Callable[[], int]]:
        """How examples are pulled back, and the numbers held for one of them."""
        taps = tapping.TapPuller(apply_fn, likelihood, rule, params)
        if use_taps:
            return taps.vectors, lambda: taps.entries(one, key)
        if fast_squares:
            held = taps.entries_of_products(structure, one, key)
            if held is not None:
                return taps.vectors, lambda: held
        pull = _example_puller(apply_fn, likelihood, rule, params)
        return pull, lambda: chunking.num_entries(pull, one, key)

    def compute(params: PyTree, batch: Batch, key: jax.Array | None) -> Any:
        prepare(params, batch)
        keys = chunking.example_keys(key, batches.num_examples(batch))
        if batched is not None:
            assert keys is not None
            return structure.reduce(
                tapping.batch_vectors(
                    apply_fn, likelihood, rule, params, batch, keys, batched
                )
            )
        if not by_example(batch):
            pull = _group_puller(apply_fn, likelihood, rule, params)
            return _sum_groups(pull, structure, params, batch, keys, groups, chunk_size)
        one = batches.map_examples(lambda x: x[:1], batch)
        vectors_of, entries = cheapest(params, one, None if keys is None else keys[:1])
        size = chunk_size
        if size is None:
            size = chunking.default_size(entries(), chunking.CHUNK_ENTRIES)
        return chunking.sum_informations(
            lambda chunk, chunk_keys: structure.reduce(vectors_of(chunk, chunk_keys)),
            structure,
            params,
            batch,
            keys,
            size,
        )

    def paths(params: PyTree, batch: Batch) -> str:
        unlabelled = batch._replace(targets=None)
        check_outputs(apply_fn, likelihood, params, unlabelled, structure.layers)
        if batched is None and not by_example(batch):
            length = _examples_of_group(groups, batch)
            path = f"one gradient for each group of {length} examples"
            return tapping.table_of_one_path(params, path)
        if use_taps:
            return tapping.table(apply_fn, params, batch, batched)
        path = "a gradient for each example"
        # rules that need targets make one vector an example, which gains nothing
        if fast_squares and not needs_targets:
            one = batches.map_examples(lambda x: x[:1], unlabelled)
            key = chunking.example_keys(jax.random.key(0) if random else None, 1)
            taps = tapping.TapPuller(apply_fn, likelihood, rule, params)
            if taps.entries_of_products(structure, one, key) is not None:
                path = "products of inputs times products of gradients"
                return tapping.table_of_one_path(params, path)
        if not structure.takes_outer_products:
            path = f"{path} ({structure.name} reduces whole vectors)"
        return tapping.table_of_one_path(params, path)

    return Estimator(
        name,
        compute,
        structure,
        random or batched is not None,
        describe_paths=paths,
        vectors_a_batch=None if groups is None else groups * num_columns,
    )


def check_outputs(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batch: Batch,
    layers: Layers | None = None,
) -> None:
    """Raises where the model's outputs do not fit the batch or the likelihood."""
    with named(layers, batch.inputs):
        outputs = jax.eval_shape(apply_fn, params, batches.unshare(batch.inputs))
    count = batches.num_examples(batch)
    shape = getattr(outputs, "shape", None)
    if shape is None or len(shape) == 0 or shape[0] != count:
        raise ValueError(
            "apply_fn(params, inputs) must return one array of outputs whose leading "
            f"axis is the examples' (n = {count}); got {outputs}."
        )
    likelihood.check(outputs, batch.targets)


# ---- squares of each example


def _example_puller(
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
            # after widening: the root of a weight has no exact bfloat16
            return jax.tree.map(lambda x: tapping.weigh(x, weight), trees.widen(pulled))

        pulled = jax.vmap(one)(sliced, batch.targets, batch.weights, keys)
        return jax.tree.map(tapping.merge_axes, pulled)

    return pull


# ---- squares of sums over groups


def _examples_of_group(groups: int | None, batch: Batch) -> int:
    count = batches.num_examples(batch)
    if groups is None:
        return 1
    if count % groups:
        raise ValueError(
            f"groups = {groups} must divide the number of examples n = {count}: the "
            "batch is cut into equal micro-batches (pad it with rows of weight zero)."
        )
    return count // groups


def _group_puller(
    apply_fn: Callable, likelihood: Likelihood, rule: Rule, params: PyTree
) -> Callable[[Batch, jax.Array | None], PyTree]:
    """`(group, keys) -> vectors summed over the group`, leaves `(R, *leaf.shape)`."""

    def cotangent(outputs: jax.Array, targets: Any, weight: jax.Array, key: Any):
        targets = jax.tree.map(lambda y: y[None], targets)
        vectors_of_example = rule(likelihood, outputs[None], targets, key)[:, 0]
        weighted = tapping.weigh(trees.widen(vectors_of_example), weight)
        return weighted.astype(outputs.dtype)

    def pull(group: Batch, keys: jax.Array | None) -> PyTree:
        inputs = batches.unshare(group.inputs)
        outputs, vjp = jax.vjp(lambda p: apply_fn(p, inputs), params)
        cotangents = jax.vmap(cotangent, out_axes=1)(
            jax.lax.stop_gradient(outputs), group.targets, group.weights, keys
        )
        at_once = chunking.default_size(trees.size(params), chunking.GROUP_ENTRIES)
        pulled = map_some(lambda c: vjp(c)[0], cotangents, at_once)
        return batches.zero_if_missing(group, trees.widen(pulled))

    return pull


def map_some(function: Callable, stack: PyTree, at_once: int) -> PyTree:
    """`jax.vmap(function)(stack)`, `at_once` of the leading axis at a time."""
    count = jax.tree.leaves(stack)[0].shape[0]
    if count == 1:  # plain products, not batched ones
        result = function(jax.tree.map(lambda x: x[0], stack))
        return jax.tree.map(lambda x: x[None], result)
    if count <= at_once:
        return jax.vmap(function)(stack)
    return jax.lax.map(function, stack, batch_size=at_once if at_once > 1 else None)


def _sum_groups(
    pull: Callable,
    structure: Structure,
    params: PyTree,
    batch: Batch,
    keys: jax.Array | None,
    groups: int | None,
    chunk_size: int | None,
) -> Any:
    length = _examples_of_group(groups, batch)
    groups = batches.num_examples(batch) // length

    def vectors_of_group(group: Batch, group_keys: jax.Array | None) -> PyTree:
        size = length if chunk_size is None else chunk_size
        return chunking.sum_chunks(
            pull,
            lambda left, right: jax.tree.map(jnp.add, left, right),
            lambda: chunking.zeros_like_sum(pull, group, group_keys),
            group,
            group_keys,
            size,
        )

    if groups == 1:
        return structure.reduce(vectors_of_group(batch, keys))

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape((groups, length, *x.shape[1:]))

    grouped = batches.map_examples(cut, batch)
    keys = None if keys is None else cut(keys)

    def information(part: Batch, part_keys: jax.Array | None) -> Any:
        sliced, rebuild = batches.split(part.inputs)

        def one(group: tuple) -> PyTree:
            leaves, targets, weights, group_keys = group
            return vectors_of_group(
                Batch(rebuild(leaves), targets, weights), group_keys
            )

        units = sliced, part.targets, part.weights, part_keys
        stack = map_some(one, units, batches.num_examples(part))
        return structure.reduce(jax.tree.map(tapping.merge_axes, stack))

    if chunk_size is None:
        first = batches.map_examples(lambda x: x[0], grouped)
        first_keys = None if keys is None else keys[0]
        at_once = chunking.default_size(
            chunking.num_entries(pull, first, first_keys), chunking.GROUP_ENTRIES
        )
    else:
        at_once = max(chunk_size // length, 1)
    return chunking.sum_informations(
        information, structure, params, grouped, keys, at_once
    )
