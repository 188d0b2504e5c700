"""One batch on several devices: each squares its own rows, then informations add.

Squares are taken before the sum: summing pulled-back vectors over devices and squaring
once would throw away what each device knows on its own, for a drawing estimator the
variance of as many groups as there are devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax import information as ops
from fisherflow_jax._ground.batch import Batch, map_inputs, num_examples
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.structures.capabilities import COMPENSATED

PyTree = Any


def place(mesh: Mesh | None, batch: Batch, axis: int) -> Batch:
    """The batch with the rows along `axis` spread over the mesh, where there is one."""
    if mesh is None:
        return batch
    spread = NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs = map_inputs(
        lambda x: jax.device_put(x, spread),
        batch.inputs,
        lambda node: jax.device_put(node, everywhere),
    )
    return Batch(inputs, *jax.device_put((batch.targets, batch.weights), spread))


def sum_over_shards(
    estimator: Estimator,
    mesh: Mesh,
    params: PyTree,
    batch: Batch,
    key: jax.Array | None,
) -> Any:
    """The sum over the mesh's devices of `estimator(params, shard, its own key)`."""
    count = num_examples(batch)
    if count % mesh.size:
        raise ValueError(
            f"a batch of {count} examples does not divide over the mesh's {mesh.size} "
            "devices: pad it with rows of weight zero."
        )
    axes = mesh.axis_names
    rows: Any = PartitionSpec(axes)
    whole = PartitionSpec()
    inputs = map_inputs(lambda _: rows, batch.inputs, lambda _: whole)

    def of_shard(params: PyTree, shard: Batch, key: jax.Array | None) -> Any:
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        information = estimator.compute(params, shard, key)
        if COMPENSATED in estimator.structure.supports:  # adds entry by entry
            return jax.tree.map(lambda x: jax.lax.psum(x, axes), information)
        stack = jax.lax.all_gather(information, axes)
        return functools.reduce(ops.add, map(_part_of(stack), range(mesh.size)))

    # check_vma would make each shard's pull-back a sum over all shards, unsquared
    return jax.shard_map(
        of_shard,
        # within jax.set_mesh it is that mesh, whose axes in_auto_mode may have changed
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=(whole, Batch(inputs, rows, rows), whole),
        out_specs=whole,
        check_vma=False,
    )(params, batch, key)


def _part_of(stack: PyTree) -> Callable[[int], PyTree]:
    return lambda index: jax.tree.map(lambda x: x[index], stack)
