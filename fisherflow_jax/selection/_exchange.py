"""Exact designs: a number of observations, one exchanged for another while it helps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import checks, keys, linalg
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.selection._acquisitions import Gain, information_gain
from fisherflow_jax.selection._candidates import check_pool
from fisherflow_jax.selection._design import Experiment, experiment
from fisherflow_jax.selection._greedy import Selection, check_gain, chosen, scaled

PyTree = Any


def exchange(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    key: Any,
    count: int,
    *,
    criterion: Gain = information_gain(),  # noqa: B008
    num_starts: int = 10,
    num_exchanges: int = 1000,
) -> Selection:
    r"""Which experiments to make, a given number of them: the exact optimal design.

    From random rows of the pool, the one exchange of a chosen row i for a row j that
    improves most, as long as any does. For the determinant and one output it multiplies
    it by

    .. math:: 1 + d_j - (d_i d_j - d_{ij}^2) - d_i, \qquad
       d_{ij} = V_i I^{-1} V_j^\top.

    Experiments are repeated where that is best, unlike labels. The best of several
    starts is returned: a local optimum, and for few parameters in most cases the
    optimum itself. `design` bounds what any could reach.

    Args:
      state: anything with `.mean` and `.information`, which counts as what is known
        beside the experiments. For a design from nothing give a small prior precision.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      pool: inputs, leading axis n: the experiments that can be made.
      key: what draws the starts.
      count: the number of experiments, static.
      criterion: `information_gain()` or `variance_reduction(target)`.
      num_starts: how often to start.
      num_exchanges: at most so many from one start.

    Returns:
      A `Selection`, its indices in ascending order, repeated rows side by side; gains
      are of each after those before it, and sum to what all of them add to the state.
      Cost: of an exchange `count` times n r^2 d, and d^3. Memory: n r d.

    Raises:
      ValueError: as `design` and `greedy`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: params[0] + params[1] * x, ff.likelihoods.gaussian()
      >>> structure = ff.structures.full()
      >>> state = ff.posterior(jnp.zeros(2), structure, prior_precision=1e-3)
      >>> x = jnp.linspace(-1, 1, 5)
      >>> print(ff.selection.exchange(state, *model, x, key=0, count=4).indices)
      [0 0 4 4]

    References:
      Fedorov, "Theory of Optimal Experiments", 1972.
      Cook, Nachtsheim, "A comparison of algorithms for constructing exact D-optimal
      designs", 1980.
    """
    check_gain(criterion)
    for name, number in (
        ("count", count),
        ("num_starts", num_starts),
        ("num_exchanges", num_exchanges),
    ):
        checks.whole(number, name)
    belief, _ = check_pool(state, apply_fn, likelihood, pool)
    numbers = count, num_starts, num_exchanges
    return products.deciding(
        _compiled,
        belief,
        apply_fn,
        pool,
        likelihood,
        criterion,
        keys.key_data(key),
        numbers,
    )


def _exchange(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    key: jax.Array,
    numbers: tuple[int, int, int],
) -> Selection:
    count, num_starts, num_exchanges = numbers
    found = experiment(belief, apply_fn, pool, likelihood, criterion, True)
    shape, size = (num_starts, count), found.rows.shape[0]
    starts = jax.random.randint(keys.typed_key(key), shape, 0, size, jnp.int32)

    def improved(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        def better(carry: tuple) -> jax.Array:
            step, _, gain = carry
            # less is the rounding of gains of the order of their number
            least = 100 * float(jnp.finfo(gain.dtype).eps) * count
            return (gain > least) & (step < num_exchanges)

        def exchanged(carry: tuple) -> tuple:
            step, indices, _ = carry
            place, row, gain = _best(found, criterion, indices)
            moved = indices.at[place].set(row)
            return step + 1, jnp.where(gain > 0, moved, indices), gain

        first = (
            jnp.zeros((), jnp.int32),
            indices,
            jnp.asarray(jnp.inf, found.rows.dtype),
        )
        indices = jax.lax.while_loop(better, exchanged, first)[1]
        value = found.value(*found.inverse(_counts(found, indices)))
        return indices, value if found.target is None else -value

    indices, reached = jax.lax.map(improved, starts)
    reached = jnp.where(jnp.isfinite(reached), reached, -jnp.inf)
    return _in_order(found, criterion, belief, jnp.sort(indices[jnp.argmax(reached)]))


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_exchange, static_argnums=(1, 3, 6))


def _counts(found: Experiment, indices: jax.Array) -> jax.Array:
    return jnp.zeros(found.rows.shape[:1], found.rows.dtype).at[indices].add(1)


def _kernels(
    found: Experiment, inverse: jax.Array
) -> tuple[tuple[jax.Array, Any], Callable]:
    """K and Q of each row with itself, and of all with one, `(n, r, r)`."""
    turned = linalg.product("nrd,de->nre", found.rows, inverse)
    seen = None
    if found.target is not None:
        middle = linalg.product("ij,jk->ik", found.target, inverse)
        seen = linalg.product("nrd,de->nre", turned, middle)

    def of(spec: str, others: jax.Array) -> tuple[jax.Array, Any]:
        spread = None if seen is None else linalg.product(spec, seen, others)
        return linalg.product(spec, turned, others), spread

    own = of("nrd,nsd->nrs", found.rows)
    return own, lambda place: of("nrd,sd->nrs", found.rows[place])


def _best(
    found: Experiment, criterion: Gain, indices: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The place in the design, the row that is to take it, and what that improves."""
    (kernel, spread), column_of = _kernels(
        found, found.inverse(_counts(found, indices))[0]
    )
    size = kernel.shape[1]
    # a row that alone determines a parameter leaves no inverse but for rounding
    one = (1 + 10 * float(jnp.finfo(kernel.dtype).eps)) * jnp.eye(
        size, dtype=kernel.dtype
    )

    def without(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The best row in the place of one of the design, and what it improves."""
        crossed, others = column_of(row)
        root = linalg.inverse_factor(one - kernel[row])
        half = linalg.product("nrs,qs->nrq", crossed, root)
        left = kernel + linalg.product("nrq,nsq->nrs", half, half)
        spreads = None
        if spread is not None:
            inner = linalg.product("ir,rs,js->ij", root, spread[row], root)
            mixed = linalg.product("nrs,qs->nrq", others, root)
            mixed = mixed + linalg.product("nrq,qs->nrs", half, inner) / 2
            change = linalg.product("nrq,nsq->nrs", mixed, half)
            spreads = spread + change + jnp.swapaxes(change, 1, 2)
        gains = criterion.gain(left, spreads)
        gains = jnp.where(jnp.isfinite(gains), gains - gains[row], -jnp.inf)
        best = jnp.argmax(gains).astype(jnp.int32)
        return best, gains[best]

    rows, gains = jax.lax.map(without, indices)
    place = jnp.argmax(jnp.where(jnp.isnan(gains), -jnp.inf, gains))
    return place, rows[place], gains[place]


def _in_order(
    found: Experiment, criterion: Gain, belief: Gaussian, indices: jax.Array
) -> Selection:
    """With what each row adds to those before it."""
    none = jnp.zeros(found.rows.shape[:1], found.rows.dtype)
    start, column_of = _kernels(found, found.inverse(none)[0])
    free = jnp.ones(none.shape, bool)
    made = chosen(
        criterion,
        start,
        column_of,
        lambda gains, free, step: indices[step],
        indices.shape[0],
        free,
        True,
    )
    gains, remaining = (
        scaled(criterion, belief, x) for x in (made.gains, made.remaining)
    )
    return Selection(made.indices, gains, remaining)
