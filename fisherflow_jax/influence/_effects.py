"""The effect of each row on queries: all pairs, or the rows that matter most."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import products
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, trees
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.influence import _removal as removal
from fisherflow_jax.influence._removal import Asked, Fitted
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


class Top(NamedTuple):
    """Of each query the rows with the largest effects, and with the smallest.

    Made by `ff.influence.effects`.

    Fewer than were asked for while fewer rows were seen.
    """

    values: jax.Array  # (q, k), nats, the largest first: rows that help most
    indices: jax.Array  # (q, k) int32, their places in the stream of rows
    lowest_values: jax.Array  # (q, k), the smallest first: rows that harm most
    lowest_indices: jax.Array  # (q, k) int32
    num_rows: jax.Array  # () int32, rows seen


def effects(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    data: Any,
    queries: Any = None,
    *,
    on: Callable[[jax.Array], jax.Array] | PyTree | None = None,
    first_order: bool | None = None,
    top: int | None = None,
    earlier: Top | None = None,
    chunk_size: int | None = None,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
    progress: bool | None = None,
) -> jax.Array | Top:
    r"""By how much the loss of each query rises when each row is removed.

    .. math:: \mathrm{effect}_{qn} = \nabla \ell_q^\top (I - F_n)^{-1} \nabla \ell_n,
       \qquad \text{to first order } \nabla \ell_q^\top I^{-1} \nabla \ell_n

    in nats, of the *sum* of losses (no mean over rows). **Positive: without the row the
    query's loss is larger, so that the row helps**; negative: it harms. The parameters
    are taken to be the optimum of the rows and the prior together; with a full
    information the removal is one Newton step from there, with the information
    :math:`F_n` of the row taken out of I: for one output a division by one minus the
    leverage. For least squares the step is exact. The effect of a group of rows is the
    sum of theirs, to first order.

    The prior in the state's information is all the damping that there is; another is
    another state, `ff.posterior(params, information, prior_precision=...)`. The state's
    temperature, of `ff.laplace` or `ff.calibrate`, does not count: it says how sure one
    may be, and not how the optimum moves.

    Args:
      state: anything with `.mean` and `.information`, made of these rows: the rows'
        information and the prior, sums over rows.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`: a row's loss is minus its log-probability.
      data: the rows: a batch `(inputs, targets)` or `(inputs, targets, weights)`, a
        list or loader of batches, or `ff.Stacked`. Weights are multiplicities, and all
        of it is removed.
      queries: as `data`; their targets may be None where `on` is a function. None where
        `on` is a tree.
      on: None, the query's loss, with an unknown dispersion at the state's estimate; a
        function of one query's outputs `(...)`, without their leading axis, that
        returns a number, such as a margin; or contrasts: a pytree like the parameters,
        or with a leading axis q on each leaf, for the change of :math:`c^\top \theta`.
      first_order: without the row's leverage: one backward pass a row in place of one
        for each output. None: with every information but a full one, and for a
        likelihood whose root is drawn. Of an information that leaves products of
        parameters out, a row's leverage is too large, often above 1, and dividing by
        one minus it spoils the effects (docs/influence.md measures it).
      top: k, to keep the k rows with the largest effects on each query, and the k with
        the smallest, in place of the matrix.
      earlier: what an earlier call with `top` returned, to go on from with further
        rows; their places count on.
      chunk_size: rows at a time; None: as many as keep 16 MiB.
      bad_rows: "raise", or "drop": a row with a value that is not finite, or a target
        that cannot be, has no effect and none is had on it.
      to_batch: makes a batch of what a loader gives, if it is none.
      progress: whether a loader of rows shows a bar, as in `ff.accumulate`.

    Returns:
      `(q, n)`; with `top` a `Top`. Cost: a factorisation; for each query a backward
      pass, and a solve; for each row a backward pass for each of its k outputs, k
      solves and k^3 (to first order: one backward pass, and no solve); and d products a
      pair. With scalar, diagonal and Kronecker structures nothing is solved for, and
      of layers whose kernel is used once a row no gradient is formed: I + O numbers of
      a row and of a query are kept, and I O are multiplied for each pair; where T
      positions share a kernel the I O numbers of a chunk's rows. Memory: what is kept
      of all queries, a chunk of rows, and the result.

    Raises:
      ValueError: for a query without a loss, bad rows (unless they are dropped), a row
        whose leverage block has an eigenvalue of 1 or more (under jit NaN), `earlier`
        of other queries, and as `ff.scores` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda p, x: x * p, ff.likelihoods.gaussian()
      >>> x, y = jnp.ones(4), jnp.array([0.0, 1.0, 1.0, 2.0])
      >>> state = ff.Posterior(
      ...     jnp.array(1.0), ff.structures.Full(jnp.array([4.0])), jnp.array(1.0)
      ... )
      >>> query = jnp.ones(1), jnp.array([1.5])  # the last row pulls towards it
      >>> print(ff.influence.effects(state, *model, (x, y), query).round(3))
      [[-0.167 -0.    -0.     0.167]]
      >>> top = ff.influence.effects(state, *model, (x, y), query, top=1)
      >>> print(top.indices, top.lowest_indices)
      [[3]] [[0]]

    References:
      Koh, Liang, "Understanding black-box predictions via influence functions", 2017.
      Grosse et al., "Studying large language model generalization with influence
      functions", 2023.
    """
    function = on if callable(on) else None
    if top is not None:
        checks.whole(top, "top", of="rows to keep for each query")
    elif earlier is not None:
        raise ValueError("earlier is what a call with top returned: give top, too.")
    options: dict[str, Any] = {"bad_rows": bad_rows, "to_batch": to_batch}
    own = removal.begun(
        state, (apply_fn, likelihood), first_order, function, chunk_size
    )
    if on is None or function is not None:
        asked, solved = _queries(own, queries, options), None
    else:
        asked, solved = None, _contrasts(own, on, queries)
    options["progress"] = progress
    found = removal.results(own, data, _of_batch, asked, solved, **options)
    if top is None:
        return removal.side_by_side(found).T
    for values in found:
        earlier = _merged(earlier, values.T, top)
    return earlier  # type: ignore[return-value]


def _queries(own: tuple[Asked, Fitted], queries: Any, options: dict) -> PyTree:
    """What products with all queries need of them, with a leading axis q."""
    if queries is None:
        raise ValueError(
            "effects are on queries: give them, (inputs, targets), or on=, a tree like "
            "the parameters."
        )
    if isinstance(queries, tuple):  # a batch, whatever the loader of rows gives
        options = options | {"to_batch": None}
    found = removal.results(own, queries, _of_queries, name="the queries", **options)
    return removal.side_by_side(found)


def _of_queries(own: Asked, fitted: Fitted, batch: Batch) -> tuple[PyTree, None]:
    by, on = removal.by_row(own, fitted, batch, 1), own.on
    if on is None and batch.targets is None:
        raise ValueError(
            "the targets of the queries are None, and a query without targets has no "
            "loss: give them, or on=, a function of a query's outputs."
        )
    likelihood = products.known(own.model.likelihood, fitted.belief)

    def one(row: Batch) -> PyTree:
        def value(outputs: jax.Array) -> jax.Array:
            found = jnp.asarray(on(outputs[0]))  # type: ignore[misc]
            if found.shape != ():
                raise ValueError(
                    "on makes one number of a query's outputs "
                    f"{outputs.shape[1:]}; got shape {found.shape}."
                )
            return found * batches.observed(row)[0].weights[0].astype(found.dtype)

        def cotangent(outputs: jax.Array) -> jax.Array:
            if on is not None:
                return jax.grad(value)(outputs)[None]
            gradient = removal.loss_gradient(likelihood, outputs, row)
            return gradient[None].astype(outputs.dtype)

        kept = by.rows.right(batches.unshare(row.inputs), cotangent)
        return batches.zero_if_missing(row, kept)

    return by.map(one), None


def _contrasts(own: tuple[Asked, Fitted], on: PyTree, queries: Any) -> PyTree:
    """Solved, leaves `(q, *leaf.shape)`."""
    if queries is not None:
        raise ValueError(
            "on is a tree, contrasts of the parameters, which are their own queries: "
            "give queries=None; or a function of a query's outputs."
        )
    asked, fitted = own
    mean, on = fitted.belief.mean, jax.tree.map(jnp.asarray, on)
    rule = "a contrast is a tree like the parameters, or many along a leading axis"
    if jax.tree.map(jnp.shape, on) == jax.tree.map(jnp.shape, mean):
        on = jax.tree.map(lambda x: x[None], on)
    one = jax.tree.map(lambda x: x[0] if x.ndim else x, on)
    trees.check_shapes(one, mean, rule)
    if len({x.shape[:1] for x in jax.tree.leaves(on)}) != 1:
        raise ValueError(f"{rule}: got shapes {jax.tree.map(jnp.shape, on)}.")
    return choices.run(asked, _solved, fitted, on)


def _solved(own: Asked, fitted: Fitted, contrasts: PyTree) -> PyTree:
    information, factors = fitted.belief.information, fitted.factors
    solve = ops.solver(information) if factors is None else factors.divide
    return jax.vmap(solve)(trees.widen(contrasts))


def _of_batch(
    own: Asked, fitted: Fitted, batch: Batch, asked: PyTree, solved: PyTree
) -> tuple[jax.Array, Any]:
    """Effects `(n, q)`, leverages, and whether each removal is defined."""
    by = removal.by_labelled_row(own, fitted, batch, int(own.first_order))

    def one(row: Batch) -> tuple[PyTree, Any]:
        found = None if own.first_order else removal.removed(by, row)

        def cotangent(outputs: jax.Array) -> jax.Array:
            if found is None:
                away = removal.loss_gradient(by.likelihood, outputs, row)
            else:
                away = found.cotangent.reshape(outputs.shape)
            return away[None].astype(outputs.dtype)

        kept = by.rows.left(batches.unshare(row.inputs), cotangent)
        told = None if found is None else (found.leverage, found.is_defined)
        return batches.zero_if_missing(row, kept), told

    def of_chunk(given: tuple[PyTree, Any]) -> tuple[jax.Array, Any]:
        kept, told = given
        if asked is None:
            return by.rows.along(kept, solved)[:, 0], told
        return by.rows.pairs(kept, asked)[:, 0, :, 0], told

    return by.map(one, of_chunk)


@functools.partial(jax.jit, static_argnums=2)
def _merged(top: Top | None, values: jax.Array, k: int) -> Top:
    """With further rows, of which the effects are `(q, n)`."""
    if top is None:
        none, nowhere = values[:, :0], jnp.zeros((len(values), 0), jnp.int32)
        top = Top(none, nowhere, none, nowhere, jnp.zeros((), jnp.int32))
    elif len(top.values) != len(values):
        raise ValueError(
            f"earlier is of {len(top.values)} queries, and here are {len(values)}: it "
            "goes on with the queries that it was made of."
        )
    places = top.num_rows + jnp.arange(values.shape[1], dtype=jnp.int32)
    places = jnp.broadcast_to(places, values.shape)

    def best(sign: int, own: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, at = (jnp.concatenate(x, 1) for x in ((own, values), (at, places)))
        kept, order = jax.lax.top_k(sign * own, min(k, own.shape[1]))
        return sign * kept, jnp.take_along_axis(at, order, 1)

    highest = best(1, top.values, top.indices)
    lowest = best(-1, top.lowest_values, top.lowest_indices)
    return Top(*highest, *lowest, num_rows=top.num_rows + values.shape[1])
