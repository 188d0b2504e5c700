r"""Approximate designs: weights on a pool, with a bound of what is left to gain.

:math:`I(w) = P + m \sum_x w_x F_x`, of m observations beside what is known, P.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from fisherflow_jax import information as ops
from fisherflow_jax import products
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.selection._acquisitions import Gain, information_gain
from fisherflow_jax.selection._candidates import candidates, check_fits, check_pool
from fisherflow_jax.selection._greedy import check_gain, scaled, target_of

PyTree = Any


class Design(NamedTuple):
    """Weights on the rows of a pool."""

    weights: jax.Array  # (n,), their sum one
    value: jax.Array  # (): log det I(w), or tr(M I(w)^-1)
    efficiency: jax.Array  # (), at least: a bound that holds whatever the weights


class Experiment(NamedTuple):
    """All rows of a pool, in parameters of unit scale."""

    rows: jax.Array  # V (n, r, d)
    prior: jax.Array  # P (d, d)
    target: jax.Array | None  # M (d, d); None: the determinant
    scales: jax.Array  # (d,), what parameters were multiplied by

    def information(self, weights: jax.Array) -> jax.Array:
        """`P + sum_x weights_x F_x`."""
        weighted = self.rows * weights[:, None, None]
        return self.prior + linalg.product("nrd,nre->de", weighted, self.rows)

    def inverse(self, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the information, and its log-determinant; NaN where it is singular."""
        factor = linalg.cholesky(self.information(weights))
        identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
        root = solve_triangular(factor, identity, lower=True)
        logdet = 2 * jnp.sum(jnp.log(linalg.diagonal(factor)))
        return linalg.product("ki,kj->ij", root, root), logdet

    def determined(self, weights: jax.Array) -> jax.Array:
        """Whether the information is further from singular than rounding."""
        matrix = linalg.equilibrated(self.information(weights))[0]
        pivots = linalg.diagonal(linalg.cholesky(matrix))
        least = 10 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)
        return jnp.min(jnp.square(pivots)) > least

    def value(self, inverse: jax.Array, logdet: jax.Array) -> jax.Array:
        if self.target is None:
            return logdet + 2 * jnp.sum(jnp.log(self.scales))
        return jnp.sum(self.target * inverse)


def experiment(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    with_prior: bool,
) -> Experiment:
    """The rows of a pool as they are, and what is known beside them."""
    like = trees.widen(belief.mean)
    model_of = candidates(belief, apply_fn, pool, likelihood, None, ())
    size, r, _ = model_of.sizes(None)
    d, dtype = trees.size(like), trees.float_dtype(like)
    check_fits(
        (2 * model_of.count * r * d + 4 * d * d) * dtype.itemsize,
        f"the rows of {model_of.count:,} candidates, {r} of each, for {d:,} parameters",
        "take part of the pool or of the parameters, or greedy, which holds none",
    )

    def row(one: list) -> jax.Array:
        example = model_of.of(one)
        pulled = products.gradients(belief.mean, apply_fn, example, model_of.columns)
        return trees.ravel(pulled, 1)

    rows = map_slices(jax.vmap(row), model_of.parts, size)
    prior = jnp.zeros((d, d), dtype)
    if with_prior:
        prior = ops.dense_matrix(belief.information, like, "a design").astype(dtype)
    target = None
    for given in target_of(criterion):
        target = _dense(given, like)
    entries = linalg.diagonal(prior) + jnp.sum(jnp.square(rows), (0, 1))
    scales = jnp.where(entries > 0, jnp.sqrt(entries), 1)
    if target is not None:
        target = target / (scales[:, None] * scales[None])
    prior = prior / (scales[:, None] * scales[None])
    return Experiment(rows / scales[None, None], prior, target, scales)


def _dense(target: PyTree, like: PyTree) -> jax.Array:
    """A target as a matrix `(d, d)`."""
    dtype = trees.float_dtype(like)
    if target is None:
        return jnp.eye(trees.size(like), dtype=dtype)
    if ops.is_information(target):
        return ops.dense_matrix(target, like, "a target").astype(dtype)
    trees.check_shapes(target, like, "a target is an information, or like the mean")
    flat = trees.ravel(jax.tree.map(jnp.asarray, target)).astype(dtype)
    return flat[:, None] * flat[None]


def design(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    count: Any = None,
    *,
    criterion: Gain = information_gain(),  # noqa: B008
    tolerance: float = 1e-3,
    num_steps: int = 10_000,
) -> Design:
    r"""How often to observe each row of a pool: the approximate optimal design.

    Weights w that maximise :math:`\log\det I(w)`, or minimise :math:`\mathrm{tr}(M
    I(w)^{-1})`, for

    .. math:: I(w) = P + m \sum_x w_x F_x

    by the multiplicative rule :math:`w_x \propto w_x g_x`, for the trace :math:`w_x
    \sqrt{g_x}`, with :math:`g_x = m\, \mathrm{tr}(V_x I^{-1} V_x^\top)`, for the trace
    :math:`m\, \mathrm{tr}(V_x I^{-1} M I^{-1} V_x^\top)`. Every step improves, and
    whatever the weights, the efficiency is at least

    .. math:: \frac{d}{\mathrm{tr}(I^{-1} P) + \max_x g_x}, \qquad
       \frac{\mathrm{tr}(M I^{-1})}{\mathrm{tr}(I^{-1} M I^{-1} P) + \max_x g_x},

    of :math:`(\det I / \det I^*)^{1/d}` and of the best trace over this one: the
    certificate of Kiefer and Wolfowitz, with the prior in it. The steps end by it.

    Args:
      state: anything with `.mean` and `.information`. The design is locally optimal: at
        the mean, where that matters.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`; of unit dispersion where that is unknown.
      pool: inputs, leading axis n: the experiments that can be made.
      count: m, a number, the observations that are planned, beside what the state knows
        (P is its information). None: of many, for which P does not count.
      criterion: `information_gain()`, D-optimality; or `variance_reduction(target)`:
        A (None), V or I (an information), c (a tree).
      tolerance: one minus the efficiency at which to stop.
      num_steps: at most so many.

    Returns:
      A `Design`. Where two neighbours share the weight of one point, merge them before
      rounding to numbers of observations; `exchange` finds these directly. If the steps
      end first, `efficiency` says how far they came. Cost: n r d^2 + d^3 a step, memory
      n r d + d^2.

    Raises:
      ValueError: where the pool leaves parameters undetermined and no prior counts, for
        a count that is not positive, more than 4,096 parameters, rows that would not
        fit in memory, and as `greedy`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def parabola(params, x):
      ...     return params[0] + params[1] * x + params[2] * x**2
      >>> model = parabola, ff.likelihoods.gaussian()
      >>> structure = ff.structures.full()
      >>> state = ff.posterior(jnp.zeros(3), structure, prior_precision=1.0)
      >>> x = jnp.linspace(-1, 1, 5)
      >>> found = ff.selection.design(state, *model, x)
      >>> print(found.weights.round(2))  # 1/3 at -1, 0 and 1
      [0.33 0.   0.33 0.   0.33]
      >>> bool(found.efficiency >= 0.999)
      True

    References:
      Kiefer, Wolfowitz, "The equivalence of two extremum problems", 1960.
      Silvey, Titterington, Torsney, "An algorithm for optimal designs on a design
      space", 1978.
      Yu, "Monotonic convergence of a general algorithm for computing optimal designs",
      2010.
    """
    check_gain(criterion)
    checks.fraction(tolerance, "tolerance")
    checks.whole(num_steps, "num_steps")
    belief, _ = check_pool(state, apply_fn, likelihood, pool)
    if count is not None:
        checks.positive(count, "count")
    found = products.deciding(
        _compiled,
        belief,
        apply_fn,
        pool,
        likelihood,
        criterion,
        count,
        tolerance,
        num_steps,
    )
    if not checks.holds(jnp.isfinite(found.efficiency)):
        raise ValueError(
            "the pool alone leaves parameters undetermined, whatever the weights: give "
            "count=, the number of observations planned, so that what the state knows "
            "counts, or a pool that tells of all of them."
        )
    return found


def _design(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    count: Any,
    tolerance: Any,
    num_steps: int,
) -> Design:
    with_prior = count is not None
    found = experiment(belief, apply_fn, pool, likelihood, criterion, with_prior)
    dtype, power = found.rows.dtype, 1.0 if found.target is None else 0.5
    number = jnp.asarray(1.0 if count is None else count, dtype)
    least = 1 - jnp.asarray(tolerance, dtype)

    def judged(weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The derivatives g, the value, and the efficiency at least."""
        inverse, logdet = found.inverse(number * weights)
        middle, total = inverse, jnp.asarray(inverse.shape[0], dtype)
        if found.target is not None:
            middle = linalg.product("ij,jk,kl->il", inverse, found.target, inverse)
            total = jnp.sum(found.target * inverse)
        turned = linalg.product("nrd,de->nre", found.rows, middle)
        slopes = number * jnp.sum(turned * found.rows, (1, 2))
        efficiency = total / (jnp.sum(middle * found.prior) + jnp.max(slopes))
        return slopes, found.value(inverse, logdet), efficiency

    def unfinished(carry: tuple) -> jax.Array:
        step, _, (_, _, efficiency) = carry
        return (efficiency < least) & (step < num_steps)

    def advance(carry: tuple) -> tuple:
        step, weights, reached = carry
        # rounding may leave a slope below zero, which is one of nothing
        moved = weights * jnp.maximum(reached[0], 0) ** power
        moved = moved / jnp.sum(moved)
        found = judged(moved)
        # an optimum may be singular: as far as the precision goes
        fine = jnp.isfinite(found[2])
        kept = weights, reached
        moved, found = jax.tree.map(
            lambda new, old: jnp.where(fine, new, old), (moved, found), kept
        )
        return jnp.where(fine, step + 1, num_steps), moved, found

    size = found.rows.shape[0]
    weights = jnp.full((size,), 1 / size, dtype)
    slopes, value, efficiency = judged(weights)
    # a direction of which no row tells has a pivot of rounding
    determined = found.determined(number * weights)
    efficiency = jnp.where(determined, efficiency, jnp.nan)
    start = jnp.zeros((), jnp.int32), weights, (slopes, value, efficiency)
    _, weights, (_, value, efficiency) = jax.lax.while_loop(unfinished, advance, start)
    if found.target is not None:
        value = scaled(criterion, belief, value)
    return Design(weights, value, jnp.minimum(efficiency, 1))


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_design, static_argnums=(1, 3, 7))
