"""Keeping `1 / diag(F^-1)` of a batch instead of `diag(F)`.

A batch solved in full gives estimates of each parameter (or block) whose variances are
the diagonal (blocks) of the inverse. Weighting by their inverses is valid under any
correlation within the batch; the diagonal itself is not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Full, Structure
from fisherflow_jax.structures._full import from_matrix

PyTree = Any


def project(
    structure: Structure,
    full: Full,
    score: PyTree,
    at: PyTree,
    meat: Any | None,
    weight: jax.Array,
) -> tuple[Any, PyTree, Any | None]:
    """The marginals of `N(at + F^-1 score, F^-1)`, in the structure.

    What one batch says of each parameter or block on its own: the inverse of its part
    of `F^-1`, the batch's own estimate, and the meat.

    A singular F (too few rows, an unused feature) is regularised relative to its own
    diagonal by 100 units of rounding, which gives the directions that it does not
    determine next to no precision.
    """
    matrix = ops.to_dense(full)
    diagonal = jnp.diagonal(matrix)
    ridge = 100 * jnp.finfo(matrix.dtype).eps
    scales = jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal))
    regular = from_matrix(matrix + jnp.diag(ridge * scales), at)
    estimate = optax.tree.add(at, ops.solve(regular, score))

    assert structure.from_full is not None
    covariance = structure.from_full(ops.inverse(regular))
    information = ops.inverse(covariance)
    if meat is not None:
        robust = structure.from_full(ops.sandwich(regular, meat))
        meat = ops.sandwich(covariance, robust)  # W (F^-1 M F^-1) W
    observed = (weight > 0).astype(trees.float_dtype(at))
    meat = None if meat is None else ops.scale(meat, observed)
    return ops.scale(information, observed), estimate, meat
