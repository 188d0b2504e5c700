"""Quantiles of a skewed posterior, from its mode and a third derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import choices, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.directional import derivative
from fisherflow_jax.intervals import _stored as stored
from fisherflow_jax.intervals._combinations import combinations
from fisherflow_jax.intervals._corrected import Interval
from fisherflow_jax.intervals._stored import Asked, Stored
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.posteriors import two_sided

PyTree = Any

_AT_ONCE = 32


def skewed(
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
    r"""Credible intervals of a skewed posterior, by the Cornish-Fisher expansion.

    .. math:: q_p = \hat\psi + \mathrm{se} \big(\delta + z_p
       + \tfrac{\gamma}{6} (z_p^2 - 1)\big), \quad
       \gamma = \ell'''[w, w, w], \quad
       \delta = \tfrac12 \, \mathrm{tr}(I^{-1} \ell'''[w]), \quad
       w = \frac{I^{-1} c}{\mathrm{se}}

    where Laplace's are :math:`\hat\psi + \mathrm{se} \, z_p`: the errors fall from the
    order :math:`1/\sqrt n` to :math:`1/n`. They are the quantiles of what the state
    believes, its Gaussian prior included. As confidence intervals they cover too little
    where rows are few: `corrected` is for that.

    Args:
      state: anything with `.mean`, the mode, and `.information`, of these rows and a
        Gaussian prior: a flow's state (refine it first: the mode is where the third
        derivative is taken), or a posterior, whose temperature counts.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`, with nothing unknown.
      batches: all rows, one batch after another, as of `ff.intervals.corrected`.
      contrast: as of `ff.intervals.corrected`.
      level: the posterior probability of the interval, in (0, 1).
      bad_rows: as of `ff.intervals.corrected`.
      to_batch: makes a batch of what a loader gives, if it is none.

    Returns:
      An `Interval`; the ends are NaN where the skewness times the normal quantile is 3
      or more, from where on the expansion does not rise. Cost: d second derivatives of
      the log-likelihood with a gradient, and a third derivative a combination; memory
      d^2.

    Raises:
      ValueError: for an unknown dispersion, and as the arguments say.
      TypeError: for a mixture.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.poisson()
      >>> flow = ff.fisher_flow(*model, prior_precision=1e-6)
      >>> batch = jnp.ones(3), jnp.array([1.0, 2.0, 1.0])
      >>> state = ff.warm_start(flow, flow.init(jnp.zeros(())), batch)
      >>> found = ff.intervals.skewed(state, *model, [batch])
      >>> print(found.lower.round(2), found.upper.round(2))  # of the log of a rate
      -0.94 1.02
      >>> lower, upper = ff.confidence_interval(state)
      >>> print(lower.round(2), upper.round(2))
      -0.69 1.27

    References:
      Cornish, Fisher, "Moments and cumulants in the specification of distributions",
      1938.
      Tierney, Kadane, "Accurate approximations for posterior moments and marginal
      densities", 1986.
    """
    model = Model(apply_fn, likelihood)
    belief = stored.believed(state, likelihood)
    asked, like = combinations(contrast, belief.mean)
    dtype = trees.float_dtype(belief.mean)
    quantile = two_sided(level, None, dtype)
    temperature = jnp.asarray(getattr(state, "temperature", 1.0), dtype)
    own = choices.shared(Asked(model))
    given = belief.mean, belief.information
    error, along, inverse = choices.run(own, _directions, *given, asked.rows)
    sums: Any = None
    for batch in stored.rows_of(model, belief.mean, batches, bad_rows, to_batch):
        found = choices.run(own, _thirds, belief.mean, batch, along, inverse)
        sums = found if sums is None else optax.tree.add(sums, found)
    center = asked.of(trees.ravel(belief.mean))
    ends = _quantiles(center, error, *sums, temperature, quantile)
    return Interval(*(trees.unravel(x, like) for x in ends))


def _directions(
    own: Asked, mean: PyTree, information: Any, rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The errors `(k,)`, the directions `(k, d)`, and the covariance."""
    solve = ops.solver(information)

    def divided(row: jax.Array) -> jax.Array:
        return trees.ravel(solve(trees.unravel(row, mean)))

    inverse = jax.vmap(divided)(jnp.eye(trees.size(mean), dtype=rows.dtype))
    along = rows @ inverse
    error = jnp.sqrt(jnp.sum(rows * along, 1))
    return error, along / error[:, None], inverse


def _thirds(
    own: Asked, mean: PyTree, batch: Batch, along: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of a batch, along each direction: thrice, and once with the covariance."""
    log_likelihood = Stored.of(own, mean, batch).log_likelihood
    at = trees.ravel(mean)
    basis = jnp.eye(at.size, dtype=at.dtype)

    def trace(at: jax.Array) -> jax.Array:
        def bend(pair: tuple) -> jax.Array:
            return derivative(log_likelihood, at, *pair)

        return jnp.sum(jax.lax.map(bend, (basis, inverse), batch_size=_AT_ONCE))

    def third(w: jax.Array) -> jax.Array:
        return derivative(log_likelihood, at, w, w, w)

    return jax.lax.map(third, along, batch_size=_AT_ONCE), along @ jax.grad(trace)(at)


@jax.jit
def _quantiles(
    center: jax.Array,
    error: jax.Array,
    third: jax.Array,
    pull: jax.Array,
    temperature: jax.Array,
    quantile: jax.Array,
) -> Interval:
    skewness, shift = third / temperature, 0.5 * pull / temperature
    mean, bend = center + error * shift, skewness / 6 * (jnp.square(quantile) - 1)
    rises = jnp.abs(skewness) * quantile < 3
    lower, upper = (
        jnp.where(rises, mean + error * (bend + z), jnp.nan)
        for z in (-quantile, quantile)
    )
    return Interval(mean, error, lower, upper, skewness)
