"""What a memory is, and the quantities that pass through it.

A memory says what is believed before a batch (`predict`) and what is kept of it
(`remember`). It knows how informations add, scale and solve, and no
structure; only random_walk names the two simple ones, to hold its noise and transition.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees

PyTree = Any


class Belief(NamedTuple):
    """What is believed: the Gaussian, and the sums that go with it.

    In a preconditioner there is no Gaussian: `mean` is only a template.
    """

    mean: PyTree
    information: Any  # prior included
    meat: Any | None  # sum of squared scores, without the prior; decays apply squared
    count: jax.Array  # type: ignore[assignment]  # () effective number of observations
    residual: jax.Array | None  # () least value of the penalised sum of squares


class Prior(NamedTuple):
    """The Gaussian before any data: `N(origin, precision^-1)`.

    In a preconditioner both are None.
    """

    origin: PyTree
    precision: Any  # an information; a number is kept as a Scalar


class Site(NamedTuple):
    """What one batch adds. Sums of sites and the prior make a belief again."""

    curvature: Any  # its information F
    shift: PyTree  # F (theta - origin) + score; None in a preconditioner
    spread: Any | None  # sum of its squared scores
    weight: jax.Array  # () number of observations
    growth: jax.Array | None  # () what the belief's residual grows by
    residual_at_origin: jax.Array | None  # () its own sum of squares at the origin


class MovingAverage(NamedTuple):
    """How a preconditioner averages batches, where it does not add them up.

    The remembered value starts at zero, as Optax's moving averages do.
    """

    gain: float  # the weight of a batch's mean, `1 - decay`
    debias: Callable[[Any, jax.Array], Any]
    """`(a Scalar or a Diagonal, batches taken in) -> its mean`, to the last bit."""


class Memory(NamedTuple):
    """Made by the factories of `ff.memories`."""

    name: str
    init: Callable[[Site], Any]
    """`(a site of zeros) -> storage`."""
    predict: Callable[[Any, Belief, Prior], Belief]
    """`(storage, belief, prior) -> belief`, before the batch."""
    remember: Callable[[Any, Belief, Site, Prior], tuple[Any, Belief, Any]]
    """`(storage, belief with the site, site, prior) -> (storage, belief, report)`."""
    needs: dict[str, str] = {}  # noqa: RUF012 (never changed)
    """Capabilities asked of the structure, with the reason for each."""
    average: MovingAverage | None = None
    """In a preconditioner only; None: sums are kept."""


def include(belief: Belief, site: Site, mean: PyTree) -> Belief:
    """The belief with a site added, its mean found by the flow."""
    return Belief(
        mean,
        ops.add(site.curvature, belief.information),
        None if belief.meat is None else ops.add(site.spread, belief.meat),
        belief.count + site.weight,
        _plus(belief.residual, site.growth),
    )


def _plus(left: jax.Array | None, right: jax.Array | None) -> jax.Array | None:
    return None if left is None or right is None else left + right


def total(sites: Site, weights: jax.Array) -> Site:
    """The weighted sum of a stack of sites, leaves `(k, ...)`."""

    def plain(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), tree
        )

    return Site(
        ops.total(sites.curvature, weights),
        plain(sites.shift),
        None if sites.spread is None else ops.total(sites.spread, weights),
        plain(sites.weight),
        plain(sites.growth),
        plain(sites.residual_at_origin),
    )


def fuse(prior: Prior, site: Site, template: Belief) -> Belief:
    """The belief that the prior and a summed site make, kept as `template` is."""
    if prior.precision is None:
        kept = ops.conform(template.information, site.curvature)
        return Belief(template.mean, kept, None, site.weight, None)
    information = ops.add(site.curvature, prior.precision)
    step = ops.solve(information, site.shift)
    spread = site.spread
    if spread is not None:
        # as rich as the information, where the prior is richer than the structure
        spread = ops.add(spread, ops.scale(prior.precision, 0.0))
    residual = site.residual_at_origin
    if residual is not None:
        residual = residual - trees.dot(step, site.shift)
    return Belief(
        optax.tree.add(prior.origin, step),
        ops.conform(template.information, information),
        None if spread is None else ops.conform(template.meat, spread),
        site.weight,
        residual,
    )


def keep(storage: Any, belief: Belief, site: Site, prior: Prior):
    """Remembers the belief and nothing else."""
    del site, prior
    return storage, belief, ()


@functools.singledispatch
def age(storage: Any, belief: Belief, prior: Prior, steps: jax.Array) -> Belief:
    """The belief after `steps` updates without data, for merging workers.

    Raises:
      TypeError: for memories whose states do not merge.
    """
    raise TypeError(
        "windowed, adaptive and random_walk states do not merge (this one keeps a "
        f"{type(storage).__name__}): only sums of sites do, which stationary and "
        "exponential memories keep."
    )
