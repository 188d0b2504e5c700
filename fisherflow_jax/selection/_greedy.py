r"""Greedy choice in output space: a pivoted block Cholesky of 1 + K.

With :math:`K_{xy} = V_x I^{-1} V_y^\top`, a chosen row s changes kernels by products of
rows alone: with :math:`C C^\top = 1 + K_{ss}`,

.. math:: K \gets K - Z Z^\top, \qquad Z = K_{xs} C^{-\top}.

Nothing is added to a structure, so that this is exact for all of them. With a target M,
:math:`Q_{xy} = V_x I^{-1} M I^{-1} V_y^\top` is minus the derivative of K where M is
added to I, and is carried along as that.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import checks, linalg, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.selection._acquisitions import Gain, information_gain
from fisherflow_jax.selection._candidates import candidates, check_fits, check_pool

PyTree = Any

# Bytes of a whole pool's rows up to which they are kept, and not made anew: 1 GiB.
_KEPT = 2**30


class Selection(NamedTuple):
    """Rows of a pool in the order of their choice. Made by `ff.selection.greedy`."""

    indices: jax.Array  # (count,) int32
    gains: jax.Array  # (count,), of each, given those before it
    remaining: jax.Array  # (n,), what each row of the pool would add to them all


def greedy(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    count: int,
    *,
    acquisition: Gain = information_gain(),  # noqa: B008
    rank: int | None = None,
    excluded: Any = None,
    costs: Any = None,
    replace: bool = False,
    chunk_size: int | None = None,
) -> Selection:
    r"""Chooses rows to label, each given those chosen before it.

    No labels are used. A batch is not the rows of the largest single gains, which
    repeat each other: the kernel :math:`K_{xy} = V_x I^{-1} V_y^\top` of rows
    :math:`V = L^\top J` is conditioned on each choice,

    .. math:: K_{xy} \gets K_{xy} - K_{xs} (1 + K_{ss})^{-1} K_{sy},

    which is exact for every structure of the information. (Adding a row to a Kronecker
    or diagonal information and choosing again is not: the gain of a row's duplicate
    hardly falls.) Between batches, when the labels are there, update the state.

    Args:
      state: anything with `.mean` and `.information`, the prior in it. With a
        temperature it is as unsure as that says, and a new row tells it more.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`; its output Fisher at the mean is used.
      pool: inputs, leading axis n; parts in `ff.Shared` are passed whole.
      count: how many rows, static.
      acquisition: `ff.selection.information_gain()` or `variance_reduction(target)`.
      rank: columns of each target's root of the output Fisher, the leading ones, by
        which gains are those of a lower bound; None: all of them, C - 1 of C classes.
      excluded: `(n,)` booleans: rows never chosen, such as those labelled already.
      costs: `(n,)`, positive: gain over cost decides. Greedy by ratio alone can be far
        from the best; take the better of it and of the choice without costs.
      replace: whether a row may be chosen again: an experiment can be, a label not.
      chunk_size: rows pulled back at a time; None: as many as keep 16 MiB.

    Returns:
      A `Selection`; ties go to the lowest index. `remaining` has what each row would
      add next, rows that are chosen or excluded among them. Rows whose kernel is not
      finite are not chosen. Where no row is left, under jit, gains are -inf. Cost: a
      backward pass for each of the r columns of every row, and for each choice products
      of all rows with the chosen one, n I O + n r^2 O a layer (scalar, diagonal,
      kronecker) or n r^2 d, and n r^2 for each row chosen before. Memory: n r^2 for
      each choice (twice that with a target); n (I + r O) of the layers, or n r d, up to
      1 GiB, beyond which rows are pulled back anew for each choice.

    Raises:
      ValueError: for a `count` that is no positive whole number or more than the rows
        that may be chosen, masks and costs of other shapes, rows that are not finite, a
        target or state about other parameters, a bank, a rank beyond the outputs', and
        where the kernels would take more than a quarter of the memory: the bytes.
      TypeError: for what is no gain, such as `entropy()`, which `values` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> structure = ff.structures.full()
      >>> state = ff.posterior(jnp.zeros(2), structure, prior_precision=1.0)
      >>> pool = jnp.array([[2.0, 0.0], [2.1, 0.0], [0.0, 1.0]])
      >>> found = ff.selection.greedy(state, *model, pool, 2)
      >>> print(found.indices, found.gains.round(2))  # log(1 + 2.1^2) / 2, log(2) / 2
      [1 2] [0.84 0.35]
      >>> print((100 * found.remaining).round())  # what each would add to these two
      [28. 30. 20.]

    References:
      Fedorov, "Theory of Optimal Experiments", 1972.
      Krause, Singh, Guestrin, "Near-optimal sensor placements in Gaussian processes",
      2008.
    """
    check_gain(acquisition)
    checks.whole(count, "count", of="rows")
    belief, pool, free = check_pool(
        state, apply_fn, likelihood, pool, chunk_size=chunk_size, excluded=excluded
    )
    _check_choice(count, free, costs, replace)
    given = jnp.asarray(free), None if costs is None else jnp.asarray(costs), None
    options = count, rank, replace, chunk_size
    model = apply_fn, pool, likelihood
    return products.deciding(run, belief, *model, acquisition, given, options)


def check_gain(acquisition: Any) -> None:
    """Raises unless it is one by which several rows can be chosen."""
    if not isinstance(acquisition, Gain):
        raise TypeError(
            "what conditions on rows that are chosen is ff.selection.information_gain()"
            f" or variance_reduction(target); got {checks.described(acquisition)}. "
            "Other acquisitions have values, ff.selection.values(...), of single rows."
        )


def _check_choice(count: int, free: Any, costs: Any, replace: bool) -> None:
    size = free.shape[0]
    if costs is not None:
        if jnp.shape(costs) != (size,):
            raise ValueError(
                f"costs are one number a row of the pool, ({size},); got shape "
                f"{jnp.shape(costs)}."
            )
        checks.positive(costs, "costs")
    left = size if checks.is_traced(free) else int(free.sum())
    if left == 0:
        raise ValueError(f"all {size} rows of the pool are excluded.")
    if count > left and not replace:
        told = "" if left == size else f", {size - left} of {size} being excluded"
        raise ValueError(
            f"count = {count}, but {left} rows of the pool can be chosen{told}: ask "
            "for fewer, or replace=True, where a row may be chosen again."
        )


def _conditioned(
    place: jax.Array,
    step: jax.Array,
    kernel: jax.Array,
    factors: jax.Array,
    column: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """K_xx and all Z, `(n, r, r)` and `(n, r, count r)`, with one more row chosen."""
    size = kernel.shape[1]
    identity = jnp.eye(size, dtype=kernel.dtype)
    inverse = linalg.inverse_factor(identity + kernel[place])
    rest = column - linalg.product("nrp,sp->nrs", factors, factors[place])
    z = linalg.product("nrs,qs->nrq", rest, inverse)
    factors = jax.lax.dynamic_update_slice_in_dim(factors, z, step * size, 2)
    return kernel - linalg.product("nrq,nsq->nrs", z, z), factors


# compiled once a model and shape, so that a second call compiles nothing
@functools.partial(jax.jit, static_argnums=(1, 3, 6))
def run(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    acquisition: Gain,
    given: tuple[jax.Array, jax.Array | None, jax.Array | None],
    options: tuple[int, int | None, bool, int | None],
) -> Selection:
    """Rows one after the other; `given` are those free, costs, and which to choose."""
    (free, costs, order), (count, rank, replace, chunk_size) = given, options
    found = candidates(belief, apply_fn, pool, likelihood, acquisition, rank)
    size, r, bytes_of_one = found.sizes(chunk_size)
    dtype = trees.float_dtype(belief.mean)
    check_fits(
        dtype,
        (len(free), r, r, count + 1, len(found.kinds)),
        f"{count} rows of a pool of {len(free):,}, with kernels of {r} columns each,",
        "take rank=, the leading columns of each target's root (rank=8, say), fewer "
        "rows, or part of the pool",
    )
    keeps = len(free) * bytes_of_one <= _KEPT

    def first(one: list) -> tuple:
        return found.own(one), found.left(one) if keeps else None

    kernels, lefts = map_slices(jax.vmap(first), found.parts, size)
    factors = [jnp.zeros((len(free), r, count * r), dtype) for _ in kernels]

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, tuple]:
        *known, free = carry
        gains = acquisition.gain(*known[0])
        free = free & jnp.isfinite(gains)
        ratios = gains if costs is None else gains / costs.astype(dtype)
        place = jnp.argmax(jnp.where(free, ratios, -jnp.inf)).astype(jnp.int32)
        if order is not None:
            place = order[index]
        gain = jnp.where(free[place], gains[place], -jnp.inf)
        columns = found.all_with([x[place] for x in found.parts], lefts, size)
        kinds = list(zip(*known, columns, strict=True))
        update = functools.partial(_conditioned, place, index)
        # Q is the derivative of K along the target, and stays it
        if len(kinds) == 1:
            moved = (update(*kinds[0]),)
        else:
            moved = jax.jvp(update, kinds[0], kinds[1])
        kernels, factors = map(list, zip(*moved, strict=True))
        left = free.at[place].set(free[place] & replace)
        return (kernels, factors, left), (place, gain)

    steps = jnp.arange(count, dtype=jnp.int32)
    last, (indices, gains) = jax.lax.scan(step, (kernels, factors, free), steps)
    remaining = acquisition.gain(*last[0])
    unit = dispersion(acquisition, belief).astype(dtype)
    return Selection(indices, gains * unit, remaining * unit)


def dispersion(acquisition: Gain, belief: Gaussian) -> jax.Array:
    """What a variance is multiplied by: 1 where no dispersion is estimated."""
    if belief.dispersion is None or acquisition.middle(belief.mean) is None:
        return jnp.ones(())
    return belief.dispersion
