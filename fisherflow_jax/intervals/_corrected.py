"""The cubic Wald interval: one third derivative puts both tails right."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, choices, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.directional import derivative
from fisherflow_jax.flow import Solution
from fisherflow_jax.intervals import _stored as stored
from fisherflow_jax.intervals._combinations import Combinations, combinations
from fisherflow_jax.intervals._stored import Asked, Stored
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.posteriors import two_sided

PyTree = Any

# Contrasts whose third derivatives are taken side by side.
_AT_ONCE = 32
_STEPS = 50  # of the search for the estimate


class Interval(NamedTuple):
    """Of linear combinations of the parameters, each field shaped like their values.

    Made by `ff.intervals.skewed`.

    Attributes:
      estimate: of `corrected` Firth's; of `skewed` the posterior mean.
      standard_error: the root of the inverse information there.
      lower: end of the interval.
      upper: end of the interval.
      skewness: the third derivative of the log-density along the combination, in
        standard errors; of `skewed` the posterior's skewness.
    """

    estimate: PyTree
    standard_error: PyTree
    lower: PyTree
    upper: PyTree
    skewness: PyTree


def corrected(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    batches: Any,
    contrast: PyTree | str | Callable | None = None,
    *,
    level: float = 0.95,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
) -> Interval:
    r"""Confidence intervals with both tails right, from few rows.

    .. math:: z(\psi) = t + a t^2 + \tfrac13 a^2 t^3 + 2 a, \quad
       t = \frac{\tilde\psi - \psi}{\mathrm{se}}, \quad
       a = \tfrac16 \, \ell'''\Big[\frac{I^{-1} c}{\mathrm{se}}\Big]^3

    is standard normal to the order :math:`1/n`, where Wald's t is to
    :math:`1/\sqrt n`: the interval holds every :math:`\psi = c^\top \theta` with
    :math:`|z|` below the normal quantile. The estimate is Firth's, the highest point of
    :math:`\ell + \tfrac12 \log |I|`, which has no bias of order 1/n and is finite where
    classes are separated; it does not depend on a prior. For an exponential family in
    its canonical parameter: logistic (`bernoulli`), softmax (`categorical`), Poisson,
    normal, with outputs that are linear in the parameters (offsets may be added).

    Args:
      state: anything with `.mean` and `.information`: the search begins at its mean.
        Its prior does not count.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`, with nothing unknown.
      batches: all rows: a batch `(inputs, targets)` or `(inputs, targets, weights)`, a
        list or loader of batches, or `ff.Stacked`. They are held together.
      contrast: a parameter's name (`layers.0.weight`, or one entry of it,
        `layers.0.weight[0,2]`); the weights c, a tree like the parameters; a linear
        function of them. None: every parameter.
      level: of the interval, in (0, 1).
      bad_rows: "raise", or "drop": a row with a value that is not finite, or a target
        that cannot be, has weight 0, as it has under jit.
      to_batch: makes a batch of what a loader gives, if it is none.

    Returns:
      An `Interval`. Cost: some ten evaluations of the log-likelihood and the whole
      information, with derivatives; a solve and a third derivative a combination.

    Raises:
      ValueError: for an unknown dispersion, a model that is not canonical, data that do
        not determine all parameters, a search that does not end, and as the arguments
        say. Under jit the ends are NaN where values would have to tell.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.bernoulli()
      >>> x = jnp.stack([jnp.ones(12), jnp.linspace(-2.0, 2.0, 12)], 1)
      >>> y = (x[:, 1] > 0).astype(float)  # separated: no maximum of the likelihood
      >>> state = ff.fisher_flow(*model).init(jnp.zeros(2))
      >>> found = ff.intervals.corrected(state, *model, (x, y), "theta[1]")
      >>> print(f"{found.estimate:.2f} in [{found.lower:.2f}, {found.upper:.2f}]")
      2.55 in [0.92, 13.96]

    References:
      Firth, "Bias reduction of maximum likelihood estimates", 1993.
      Hall, "On the removal of skewness by transformation", 1992.
      Brazzale, Davison, Reid, "Applied asymptotics", 2007.
    """
    model = Model(apply_fn, likelihood)
    mean = stored.believed(state, likelihood).mean
    asked, like = combinations(contrast, mean)
    quantile = two_sided(level, None, trees.float_dtype(mean))
    rows = stored.together(stored.rows_of(model, mean, batches, bad_rows, to_batch))
    own = choices.shared(Asked(model))
    # one program, whatever is asked for
    fit = choices.run(own, _fit, mean, rows)
    found, told = choices.run(own, _ends, mean, rows, fit, asked, quantile)
    _check(*told)
    return Interval(*(trees.unravel(x, like) for x in found))


def _fit(own: Asked, mean: PyTree, batch: Batch) -> Solution:
    """Firth's estimate."""
    rows = Stored.of(own, mean, batch)
    return stored.highest(rows.penalised, rows.information, trees.ravel(mean), _STEPS)


def _ends(
    own: Asked,
    mean: PyTree,
    batch: Batch,
    fit: Solution,
    asked: Combinations,
    quantile: jax.Array,
) -> tuple[Interval, tuple]:
    rows, at = Stored.of(own, mean, batch), fit.mean
    factors = ops.regularised(fit.information, at)

    def one(row: jax.Array) -> tuple[jax.Array, ...]:
        along = factors.divide(row)
        error = jnp.sqrt(row @ along)
        along = along / error
        third = derivative(rows.log_likelihood, at, along, along, along)
        return error, third, rows.is_canonical(at, along)

    error, third, canonical = jax.lax.map(one, asked.rows, batch_size=_AT_ONCE)
    determined = stored.determines_all(fit.information, at)
    told = determined, jnp.all(canonical), fit.unfinished == 0
    sound = canonical & determined & told[2]
    estimate = asked.of(at)
    lower = estimate - error * _inverse(quantile, third / 6)
    upper = estimate - error * _inverse(-quantile, third / 6)
    lower, upper = (jnp.where(sound, x, jnp.nan) for x in (lower, upper))
    return Interval(estimate, error, lower, upper, third), told


def _inverse(z: jax.Array, a: jax.Array) -> jax.Array:
    """The t with `t + a t^2 + a^2 t^3 / 3 + 2 a = z`."""
    # cbrt(1 + u) - 1 over a, which is u / a for a small u
    u = 3 * a * (z - 2 * a)
    root = jnp.cbrt(1 + u)
    return 3 * (z - 2 * a) / (root * root + root + 1)


def _check(determined: Any, canonical: Any, ended: Any) -> None:
    """Raises where values are at hand, and told otherwise."""
    if not checks.holds(determined):
        raise ValueError(
            "the data do not determine all parameters (redundant columns, columns of "
            "zeros), so that Firth's estimate is not one point: leave them out, with "
            "ff.only, or take ff.intervals.skewed, which has a prior."
        )
    if not checks.holds(canonical):
        raise ValueError(
            "corrected is for an exponential family in its canonical parameter, where "
            "the log-likelihood's Hessian is minus the information whatever the "
            "targets; here it is not (another link, or outputs that are not linear in "
            "the parameters). ff.intervals.profile(..., log_prior="
            "ff.geometry.jeffreys(metric)) is the interval to take."
        )
    if not checks.holds(ended):
        raise ValueError(
            "the search for Firth's estimate did not end: give a state nearer to it, "
            "such as ff.warm_start's."
        )
