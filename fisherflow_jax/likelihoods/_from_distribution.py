"""A likelihood from a distribution, with a root of its expected information."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fisherflow_jax._ground import arrays, checks, linalg
from fisherflow_jax.expectations import OverTargets
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods._expected_information import (
    Family,
    Make,
    family_of,
    told,
    usual_promotion,
)

_NAME = "from_distribution"


@shared.family
def from_distribution(make: Make, rule: OverTargets | None = None) -> shared.Likelihood:
    r"""Any distribution as a likelihood: what outputs make is what targets follow.

    .. math::
      y \sim p(\cdot \mid z), \qquad
      L L^\top = \mathrm E\, s s^\top, \quad s = \nabla_z \log p(y \mid z)

    The information of the outputs is computed for each target by a rule of
    `ff.expectations`, and its root is deterministic unless targets are drawn. It is the
    expected square of the score, and not minus a Hessian: for a Laplace location the
    latter is zero almost everywhere.

    Args:
      make: the outputs of one target, a number `()` or a vector `(K,)`, to its
        distribution: one of `numpyro.distributions`, or any object with `log_prob`,
        `sample(key, shape)`, and `icdf` or `enumerate_support`. Outputs are
        unbounded: `lambda z: dist.Gamma(jnp.exp(z[0]), jnp.exp(z[1]))`. Which of both
        it takes is seen from shapes.
      rule: `ff.expectations.enumeration()`, `quantiles(order, breaks)` or `draws(n)`.
        None: the first that the distribution can do of enumeration, the Hessian of a
        divergence that numpyro has in closed form, quantiles, and 64 draws.

    Returns:
      A `Likelihood`, the same object for the same function. Outputs are `(n, ...)` with
      one number a target, or `(n, ..., K)`; targets `(n, ...)`, and the shape of an
      event behind. The root has as many columns as a target has outputs. Mean, variance
      and support are those of the distribution. Cost of the root: a score of the
      distribution for each target of the rule, no pass of the model; as many copies of
      the outputs are held. With `draws` the root needs a key.

    Raises:
      ValueError: for a `make` that fails or returns a batch of distributions; for a
        family that is not regular, such as `Uniform(0, z)`, whose mean score is not
        zero: when made, where it is so of outputs like 0 or 1, else by the root, which
        under jit is NaN there; by `check`, for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpyro.distributions as dist
      >>> from fisherflow_jax import expectations, likelihoods
      >>> laplace = likelihoods.from_distribution(
      ...     lambda z: dist.Laplace(z, 2.0),
      ...     expectations.quantiles(100, breaks=(0.5,)),
      ... )
      >>> outputs = jnp.zeros(3)
      >>> laplace.root(outputs, jnp.ones(3)).round(4)  # 1 / 2
      Array([0.5, 0.5, 0.5], dtype=float32)

    References:
      Rao, "Information and the accuracy attainable in the estimation of
      statistical parameters", 1945.
    """
    family = family_of(make, rule)
    family.check_regular()
    mean = functools.partial(_moment, family, "mean")
    return shared.Likelihood(
        name=_NAME,
        log_prob=functools.partial(_log_prob, family),
        mean=mean,
        variance=functools.partial(_moment, family, "variance"),
        sample=functools.partial(_sample, family),
        root=functools.partial(_root, family),
        probe_shape=tuple,
        line=mean,
        scale=shared.IDENTITY,
        support=functools.partial(_support, family.made),
        check=functools.partial(_check, family),
        random_root=family.random,
        diagonal=not family.several,
        kl=None if family.random else functools.partial(_kl, family),
    )


def _check(family: Family, outputs: Any, targets: Any) -> None:
    shape = shared.check_outputs(_NAME, outputs)
    rule = "targets must have the shape of the outputs"
    if family.several:
        if len(shape) == 0:
            raise ValueError(
                f"{_NAME}: the last axis of the outputs holds those of one target; "
                f"got shape {shape}."
            )
        rule = f"{rule} without the last axis"
    z = jax.ShapeDtypeStruct(shape[-1:] * family.several, jnp.result_type(float))
    drawn = functools.partial(_drawn, family, key=jax.random.key(0))
    with usual_promotion():
        event = jax.eval_shape(lambda z: drawn(z), z).shape
    if event:
        rule = f"{rule}, and an event's {event}"
    lead = shape[:-1] if family.several else shape
    shared.check_targets(_NAME, shape, (*lead, *event), targets, rule)


def _drawn(family: Family, z: jax.Array, key: jax.Array) -> jax.Array:
    target = jnp.asarray(family.make(z).sample(key))
    whole = jnp.issubdtype(target.dtype, jnp.integer)
    return target if whole else arrays.like(target, z)


def _sample(family: Family, key: jax.Array, outputs: ArrayLike) -> jax.Array:
    wide = arrays.widen(outputs)
    drawn = functools.partial(_drawn, family)
    return family.each(drawn, wide, family.keys(key, wide))


def _log_prob(family: Family, outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
    _check(family, outputs, targets)

    def one(z: jax.Array, target: jax.Array) -> jax.Array:
        support = getattr(family.make(z), "support", None)
        if not callable(support):
            return arrays.like(family.make(z).log_prob(target), z)
        possible = jnp.all(support(target))
        # outputs that are none, so that no derivative is a number either
        z = shared.nan_outside(possible, z)
        value = arrays.like(family.make(z).log_prob(target), z)
        return shared.nan_outside(possible, value)

    return family.each(one, arrays.widen(outputs), jnp.asarray(targets))


def _root(
    family: Family, outputs: ArrayLike, probes: Any, key: Any = None
) -> jax.Array:
    if family.random and key is None:
        raise ValueError(
            f"{_NAME}: {family.rule} draws targets, so that root needs a key: "
            "root(outputs, probes, key)."
        )
    wide = arrays.widen(outputs)
    found = family.measured(wide, key)
    wrong = family.wrong(found)
    if not checks.holds(~wrong):
        raise ValueError(f"{_NAME}: {told(found, np.asarray(wrong))}")
    nan = jnp.full_like(found.information, jnp.nan)
    matrices = jnp.where(wrong[..., None, None], nan, found.information)
    matrices, probes = arrays.like(matrices, wide), arrays.like(probes, wide)
    if family.several:
        roots = linalg.semidefinite_root(matrices)
        columns = linalg.product("...ij,...j->...i", roots, probes)
    else:
        columns = jnp.sqrt(matrices[..., 0, 0]) * probes
    return columns.astype(jnp.asarray(outputs).dtype)


def _moment(family: Family, which: str, outputs: ArrayLike) -> jax.Array:
    def one(z: jax.Array) -> jax.Array:
        distribution = family.make(z)
        found = getattr(distribution, which, None)
        if found is None:
            raise ValueError(f"{_NAME}: {type(distribution).__name__} has no {which}.")
        return arrays.like(found() if callable(found) else found, z)

    return family.each(one, arrays.widen(outputs))


def _kl(family: Family, outputs: ArrayLike, other: ArrayLike) -> jax.Array:
    wide = arrays.widen(outputs)
    return family.each(family.divergence, wide, arrays.like(other, wide))


def _support(made: Any, targets: ArrayLike) -> jax.Array:
    """Whatever the outputs: the constraint of the distribution's class, or finite."""
    support = getattr(type(made), "support", None)
    event = len(getattr(made, "event_shape", ()))
    targets = jnp.asarray(targets)
    found = jnp.isfinite(arrays.widen(targets))
    found = jnp.all(found, tuple(range(found.ndim - event, found.ndim)))
    # of one that depends on the outputs the class has a property alone
    if callable(support) and not isinstance(support, property):
        with usual_promotion():
            found = found & jnp.asarray(support(targets))
    return found
