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
from fisherflow_jax.memories import Sum
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures._full import from_matrix

PyTree = Any


def project(
    structure: Structure, site: Sum, score: PyTree, at: PyTree
) -> tuple[Sum, PyTree]:
    """The marginals of `N(at + F^-1 score, F^-1)`, in the structure.

    What one batch says of each parameter or block on its own, and the batch's own
    estimate. The site's information F is a full one.

    A singular F (too few rows, an unused feature) is regularised relative to its own
    diagonal by 100 units of rounding, which gives the directions that it does not
    determine next to no precision.
    """
    matrix = ops.to_dense(site.curvature)
    diagonal = jnp.diagonal(matrix)
    ridge = 100 * jnp.finfo(matrix.dtype).eps
    scales = jnp.where(diagonal > 0, diagonal, jnp.ones_like(diagonal))
    regular = from_matrix(matrix + jnp.diag(ridge * scales), at)
    estimate = optax.tree.add(at, ops.solve(regular, score))

    site = kept(structure, site._replace(curvature=regular))
    observed = (site.weight > 0).astype(trees.float_dtype(at))
    quadratic = tuple(ops.scale(meat, observed) for meat in site.quadratic)
    curvature = ops.scale(site.curvature, observed)
    return site._replace(curvature=curvature, quadratic=quadratic), estimate


def kept(structure: Structure, sums: Sum) -> Sum:
    """Of sums about all parameters together: `W`, the inverse of a part of `F^-1`.

    Scores `s` become `W F^-1 s`, their squares `W (F^-1 M F^-1) W`.
    """
    full, part_of = sums.curvature, structure.from_full
    assert part_of is not None
    covariance = part_of(ops.inverse(full))
    information = ops.inverse(covariance)

    def middle(meat: Any) -> Any:
        return ops.sandwich(covariance, part_of(ops.sandwich(full, meat)))

    scores = sums.scores
    if scores:
        solved = jax.vmap(ops.solver(full))(scores.scores)
        turned = jax.vmap(lambda v: ops.matvec(information, v))(solved)
        scores = scores._replace(scores=turned)
    quadratic = tuple(map(middle, sums.quadratic))
    return sums._replace(curvature=information, quadratic=quadratic, scores=scores)
