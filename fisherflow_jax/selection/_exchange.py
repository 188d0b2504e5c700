"""Exact designs: a number of observations, one exchanged for another while it helps."""

import functools
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
from fisherflow_jax.selection._design import experiment
from fisherflow_jax.selection._greedy import Selection, check_gain, run

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
    num_sweeps: int = 100,
) -> Selection:
    r"""Which experiments to make, a given number of them: the exact optimal design.

    From the greedy choice and from random rows, each row i of the design in turn is
    exchanged for the row j of the pool that improves most, until none does. For the
    determinant and one output that multiplies it by

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
      num_starts: how often to start, the first time from the greedy choice.
      num_sweeps: visits to all of the design, at most, from one start.

    Returns:
      A `Selection`, its indices in ascending order, repeated rows side by side; gains
      are of each after those before it, and sum to what all of them add to the state.
      Cost: of a visit n r d^2 + d^3. Memory: n r d.

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
    checks.whole(count, "count", of="experiments")
    checks.whole(num_starts, "num_starts")
    checks.whole(num_sweeps, "num_sweeps")
    belief, pool, free = check_pool(state, apply_fn, likelihood, pool)
    starts = jax.random.randint(keys.typed_key(key), (num_starts, count), 0, len(free))
    starts = starts.astype(jnp.int32)
    model = apply_fn, pool, likelihood
    return products.deciding(_run, belief, *model, criterion, starts, num_sweeps)


# compiled once a model and shape, so that a second call compiles nothing
@functools.partial(jax.jit, static_argnums=(1, 3))
def _run(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    criterion: Gain,
    starts: jax.Array,
    num_sweeps: Any,
) -> Selection:
    found = experiment(belief, apply_fn, pool, likelihood, criterion, True)
    size, dtype, count = len(found.rows), found.rows.dtype, starts.shape[1]
    # less is rounding: of logarithms, or of a trace of any size
    rounding, unit = 100 * float(jnp.finfo(dtype).eps), float(found.target is None)

    def counts(indices: jax.Array) -> jax.Array:
        return jnp.zeros((size,), dtype).at[indices].add(1)

    def visited(indices: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """With the best row at a place, and what that improves."""
        row = indices[place]
        root = found.root(counts(indices).at[row].add(-1))
        white = linalg.product("nrd,ed->nre", found.rows, root)
        kernels = [linalg.product("nrd,nsd->nrs", white, white)]
        if found.target is not None:
            seen = linalg.product("nrd,de->nre", white, root)
            kernels.append(linalg.product("nrd,de,nse->nrs", seen, found.target, seen))
        gains = criterion.gain(*kernels)
        finite = jnp.where(jnp.isfinite(gains), gains, -jnp.inf)
        other = jnp.argmax(finite).astype(jnp.int32)
        gain, least = gains[other] - gains[row], rounding * (unit + gains[other])
        better = gain > least
        return indices.at[place].set(jnp.where(better, other, row)), better

    def unfinished(carry: tuple) -> jax.Array:
        step, _, better = carry
        return better & (step < num_sweeps)

    def swept(carry: tuple) -> tuple:
        step, indices, _ = carry
        places = jnp.arange(count, dtype=jnp.int32)
        indices, better = jax.lax.scan(visited, indices, places)
        return step + 1, indices, jnp.any(better)

    def improved(indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.zeros((), jnp.int32), indices, jnp.array(True)
        indices = jax.lax.while_loop(unfinished, swept, first)[1]
        value = found.value(counts(indices))
        value = value if found.target is None else -value
        return indices, jnp.where(jnp.isfinite(value), value, -jnp.inf)

    def in_order(order: jax.Array | None) -> Selection:
        given = jnp.ones((size,), bool), None, order
        options = count, None, True, None
        return run(belief, apply_fn, pool, likelihood, criterion, given, options)

    starts = jnp.concatenate([in_order(None).indices[None], starts[1:]])
    indices, reached = jax.lax.map(improved, starts)
    return in_order(jnp.sort(indices[jnp.argmax(reached)]))
