"""Kronecker factors as they are kept: of each symmetric matrix one triangle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import placement, trees, triangles
from fisherflow_jax.structures._algebra import linear
from fisherflow_jax.structures._algebra.kronecker_factors import rows_of


class PackedKronecker(NamedTuple):
    """A `Kronecker` whose factors are triangles, `(K, ceil(D / 2), D + 1)` for even D.

    The A of layers that one array enters (`layers.same_inputs`) is in it once. These
    add and are scaled as the factors; all else is for what `unpacked` gives.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
      >>> optimizer = ff.kfac(
      ...     *(0.1, apply_fn, ff.likelihoods.gaussian()),
      ...     inputs=x,
      ...     key=0,
      ...     store="float32",
      ... )
      >>> state = optimizer.init({"w": jnp.ones((4, 3))})
      >>> state[0].information.triangles.input_factors["w"].shape
      (1, 2, 5)
      >>> state[0].information.unpacked().input_factors["w"].shape
      (1, 4, 4)
    """

    triangles: Any  # a Kronecker in all but its factors' shapes

    def unpacked(self) -> Any:
        """The `Kronecker`, equal to the last bit."""
        places = {name: place for name, (_, place) in _own(self.triangles).items()}
        whole = _on_factors(triangles.unpacked, self.triangles)
        return placement.placed(_with_inputs(whole, places))


def pack(information: Any) -> PackedKronecker:
    """A `Kronecker` with half its numbers, or fewer."""
    first = {name: first for name, (first, _) in _own(information).items()}
    return PackedKronecker(
        _on_factors(triangles.packed, _with_inputs(information, first))
    )


def _own(information: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each stack the rows with their own inputs, and of each where its are."""
    same = information.layers.same_inputs
    pairs = {n: np.unique(rows, return_inverse=True) for n, rows in same.items()}
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()}


def _with_inputs(information: Any, rows: dict[str, np.ndarray]) -> Any:
    factors = information.input_factors
    taken = {name: rows_of(x, rows[name], 0) for name, x in factors.items()}
    return information._replace(input_factors=taken)


def _on_factors(function: Callable, information: Any) -> Any:
    """A function of matrices; diagonals stay as they are."""
    sides = information.input_factors, information.output_factors
    inputs, outputs = jax.tree.map(lambda x: function(x) if x.ndim > 2 else x, sides)
    return information._replace(input_factors=inputs, output_factors=outputs)


linear.register(PackedKronecker)
ops.is_finite.register(PackedKronecker, trees.all_finite)
