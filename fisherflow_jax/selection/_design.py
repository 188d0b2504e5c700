r"""Approximate designs: weights on a pool, with a bound of what is left to gain.

:math:`I(w) = P + m \sum_x w_x F_x`, of m observations beside what is known, P.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import products
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.selection._acquisitions import Gain, information_gain
from fisherflow_jax.selection._candidates import candidates, check_fits, check_pool
from fisherflow_jax.selection._greedy import check_gain, dispersion

PyTree = Any


class Design(NamedTuple):
    """Weights on the rows of a pool. Made by `ff.selection.design`."""

    weights: jax.Array  # (n,), their sum one
    value: jax.Array  # (): log det I(w), or tr(M I(w)^-1)
    efficiency: jax.Array  # (), at least: a bound that holds whatever the weights


class Experiment(NamedTuple):
    """All rows of a pool, and what is known beside them."""

    rows: jax.Array  # V (n, r, d)
    prior: jax.Array  # P (d, d)
    target: jax.Array | None  # M (d, d); None: the determinant

    def root(self, weights: jax.Array) -> jax.Array:
        """R with `R I R^T = 1`, `I = P + sum_x weights_x F_x`; NaN if that is singular.

        Of parameters of very different scale too.
        """
        weighted = self.rows * weights[:, None, None]
        matrix = self.prior + linalg.product("nrd,nre->de", weighted, self.rows)
        unit, scales = linalg.equilibrated(matrix)
        factor = linalg.cholesky(unit)
        return linalg.solve_lower(factor, jnp.diag(1 / scales))

    def value(self, weights: jax.Array) -> jax.Array:
        """The log-determinant, or the trace of target times covariance."""
        root = self.root(weights)
        if self.target is None:
            return -2 * jnp.sum(jnp.log(linalg.diagonal(root)))
        return jnp.sum(linalg.product("ij,jk->ik", root, self.target) * root)


def experiment(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    with_prior: bool,
) -> Experiment:
    like = trees.widen(belief.mean)
    d, dtype = trees.size(like), trees.float_dtype(like)
    found = candidates(belief, apply_fn, pool, likelihood, information_gain(), None)
    size, r, _ = found.sizes(None)
    count, middle = len(found.parts[0]), criterion.middle(belief.mean)
    check_fits(
        dtype,
        (2, count, r, d),
        f"the rows of {count:,} candidates, {r} of each, for {d:,} parameters",
        "take part of the pool or of the parameters, or greedy, which holds none",
    )

    def row(one: list) -> jax.Array:
        example = found.of(one)
        return trees.ravel(
            products.gradients(belief.mean, apply_fn, example, found.columns), 1
        )

    rows = map_slices(jax.vmap(row), found.parts, size)
    prior, target = jnp.zeros((d, d), dtype), None
    if with_prior:
        prior = ops.dense_matrix(belief.information, like, "a design").astype(dtype)
    if middle is not None:
        columns = jax.vmap(middle)(trees.unravel(jnp.eye(d, dtype=dtype), like))
        target = trees.ravel(columns, 1)
    return Experiment(rows, prior, target)


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
    belief, pool, _ = check_pool(state, apply_fn, likelihood, pool)
    if count is not None:
        checks.positive(count, "count")
    numbers, model = (count, tolerance, num_steps), (apply_fn, pool, likelihood)
    found = products.deciding(_run, belief, *model, criterion, numbers)
    if not checks.holds(jnp.isfinite(found.efficiency)):
        raise ValueError(
            "the pool alone leaves parameters undetermined, whatever the weights: give "
            "count=, the number of observations planned, so that what the state knows "
            "counts, or a pool that tells of all of them."
        )
    return found


# compiled once a model and shape, so that a second call compiles nothing
@functools.partial(jax.jit, static_argnums=(1, 3))
def _run(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    numbers: tuple[Any, Any, Any],
) -> Design:
    count, tolerance, num_steps = numbers
    beside = count is not None
    found = experiment(belief, apply_fn, pool, likelihood, criterion, beside)
    dtype, linear = found.rows.dtype, found.target is not None
    number = jnp.asarray(count if beside else 1, dtype)
    least, power = 1 - jnp.asarray(tolerance, dtype), 0.5 if linear else 1.0

    def judged(weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The derivatives g, the value, and the efficiency at least."""
        value, slopes = jax.value_and_grad(found.value)(number * weights)
        slopes = number * jnp.abs(slopes)  # a trace falls
        whole = value if linear else jnp.asarray(found.prior.shape[0], dtype)
        # what is known, tr(I^-1 P) or tr(I^-1 M I^-1 P), is the rest of the whole
        rest = whole - jnp.sum(weights * slopes) if beside else jnp.zeros((), dtype)
        return slopes, value, whole / (rest + jnp.max(slopes))

    def unfinished(carry: tuple) -> jax.Array:
        step, (_, (_, _, efficiency)) = carry
        return (efficiency < least) & (step < num_steps)

    def advance(carry: tuple) -> tuple:
        step, (weights, reached) = carry
        moved = weights * reached[0] ** power
        moved = moved / jnp.sum(moved)
        after = moved, judged(moved)
        # an optimum may be singular: as far as the precision goes
        fine = jnp.isfinite(after[1][2])
        kept = jax.tree.map(lambda x, y: jnp.where(fine, x, y), after, carry[1])
        return jnp.where(fine, step + 1, num_steps).astype(jnp.int32), kept

    weights = jnp.full(found.rows.shape[:1], 1 / len(found.rows), dtype)
    slopes, value, efficiency = judged(weights)
    # a direction of which no row tells has a pivot of rounding
    entries = number * jnp.mean(jnp.sum(jnp.square(found.rows), 1), 0)
    entries = entries + linalg.diagonal(found.prior)
    roots = linalg.diagonal(found.root(number * weights))
    rounding = 10 * len(roots) * float(jnp.finfo(dtype).eps)
    determined = jnp.all(jnp.square(roots) * entries * rounding < 1)
    efficiency = jnp.where(determined, efficiency, jnp.nan)
    start = jnp.zeros((), jnp.int32), (weights, (slopes, value, efficiency))
    _, (weights, reached) = jax.lax.while_loop(unfinished, advance, start)
    value = reached[1] * dispersion(criterion, belief).astype(dtype)
    return Design(weights, value, jnp.minimum(reached[2], 1))
