"""What a state says of a change of the parameters, and which of them may change."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.layers import Layers
from fisherflow_jax.posteriors import check_about, gaussian

PyTree = Any


class Quadratic(NamedTuple):
    r"""The rise of the objective around an estimate, :math:`\tfrac c2 d^\top I d`."""

    mean: PyTree
    information: Any
    factor: Any  # c: what the belief divides its information by

    def rise(self, params: PyTree) -> jax.Array:
        """In nats, a number."""
        step = jax.tree.map(jnp.subtract, params, self.mean)
        return self.factor * ops.quadratic_form(self.information, step) / 2


def quadratic(state: Any) -> Quadratic:
    """That of a state.

    Raises:
      TypeError: for what is no state, and for a mixture.
      ValueError: for an information about other parameters than the mean.
    """
    one = gaussian(state)
    check_about(one.information, one.mean)
    factor = getattr(state, "temperature", 1.0)
    if one.dispersion is not None:
        factor = factor / one.dispersion
    return Quadratic(one.mean, one.information, factor)


def earlier(mask: PyTree | None, like: PyTree) -> PyTree:
    """A mask of booleans like the parameters; None: all of them are kept."""
    if mask is None:
        return jax.tree.map(lambda x: jnp.ones(x.shape, bool), like)
    trees.check_shapes(mask, like, "mask must be like the parameters")
    for name, leaf in trees.named_leaves(mask):
        if np.dtype(getattr(leaf, "dtype", type(leaf))) != bool:
            raise ValueError(
                "mask holds booleans, True for what is kept; that of parameter "
                f"{name} has dtype {np.asarray(leaf).dtype}."
            )
    return jax.tree.map(jnp.asarray, mask)


def compressible(like: PyTree, chosen: Any, layers: Layers | None) -> list[str]:
    """The names of arrays that are pruned or rounded; None: kernels.

    These are the kernels of the layers or, without their table, all arrays of two axes
    or more.

    Raises:
      ValueError: where there are none; and as `chosen` does elsewhere.
    """
    named, kernels = trees.named_leaves(like), kernels_of(layers)
    if chosen is None:
        sure = layers is not None
        chosen = [n for n, x in named if (n in kernels if sure else x.ndim > 1)]
        if not chosen:
            raise ValueError(
                f"there is no kernel among the parameters {[n for n, _ in named]}, "
                f"{'no layer' if sure else 'no array of two axes or more'}: say which "
                "are to be pruned or rounded, chosen=lambda name: True for all."
            )
    flags = jax.tree.leaves(trees.chosen(like, chosen))
    return [name for (name, _), flag in zip(named, flags, strict=True) if flag]


def kernels_of(layers: Layers | None) -> dict[str, Any]:
    """The layer of each kernel, by its name."""
    found = () if layers is None else layers.layers
    return {layers.names[x.kernel]: x for x in found}  # type: ignore[union-attr]


def check_finite(tree: PyTree, what: str, way: str = "") -> None:
    """Raises for entries that are not finite, as far as they are at hand, by name."""
    for name, leaf in trees.named_leaves(tree):
        if not checks.is_finite(leaf):
            raise ValueError(f"{what} of parameter {name} is not finite{way}.")
