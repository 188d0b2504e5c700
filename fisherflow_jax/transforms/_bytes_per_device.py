"""What an optimiser's state takes."""

import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any


def bytes_per_device(
    optimizer: optax.GradientTransformation,
    params: PyTree,
    mesh: Mesh | AbstractMesh | None = None,
) -> int:
    """Bytes that an optimiser's state takes on one device, from shapes alone.

    Args:
      optimizer: any Optax transformation, such as `ff.kfac(...)` or `ff.soap(...)`.
      params: the parameters, or their shapes (`jax.ShapeDtypeStruct`), with the
        shardings that they have or are to have.
      mesh: the mesh that parameters lie on, or a `jax.sharding.AbstractMesh` of devices
        that are not at hand; None: the one that is set, or one device.

    Returns:
      The bytes of the state that `init` makes, the largest share of a device: what lies
      as the parameters do (momentum, diagonals, second moments of Adam) is divided;
      what has an own shape (factors, inverses, roots) is where the optimiser's
      `factor_sharding` says, or whole on each. So it is where axes are explicit; among
      automatic ones the compiler may place what no rule names otherwise. Cost: none; no
      array is made.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 10), jnp.float32)}
      >>> ff.transforms.bytes_per_device(ff.adam(0.1), params)  # two vectors, counts
      80037
      >>> ff.transforms.bytes_per_device(
      ...     ff.soap(0.1), params
      ... )  # two factors, their bases
      8080808
      >>> ff.transforms.bytes_per_device(ff.soap(0.1, widest=512), params)
      84808
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
      >>> optimizer = ff.soap(0.1, factor_sharding="data")
      >>> ff.transforms.bytes_per_device(optimizer, params, mesh)  # momentum: whole
      1045808
    """
    if mesh is None:
        return _bytes(jax.eval_shape(optimizer.init, params))
    explicit = (AxisType.Explicit,) * len(mesh.axis_names)
    mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=explicit)

    def laid_out(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = getattr(getattr(leaf, "sharding", None), "spec", PartitionSpec())
        own = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    with jax.sharding.use_abstract_mesh(mesh):
        return _bytes(jax.eval_shape(optimizer.init, jax.tree.map(laid_out, params)))


def _bytes(state: PyTree) -> int:
    def own(leaf: jax.ShapeDtypeStruct) -> int:
        shape, sharding = leaf.shape, leaf.sharding
        shape = shape if sharding is None else sharding.shard_shape(shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(own, jax.tree.leaves(state)))
