"""What a whole stream says of the parameters at each of its times."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax import memories
from fisherflow_jax._ground import checks, choices, linalg, trees
from fisherflow_jax._ground.batch import Batch, as_batch, by_name
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import FisherFlow, FlowState, belief_of
from fisherflow_jax.structures._inverted import of_covariance

PyTree = Any


class Smoothed(NamedTuple):
    """Beliefs about the parameters at each time, given all times; leaves `(T, ...)`.

    One of them, `jax.tree.map(lambda x: x[t], smoothed)`, is a state as any other; of
    all at once, `jax.vmap(ff.standard_error)(smoothed)`.

    Attributes:
      mean: like the parameters.
      information: kept by its inverse, the smoothed covariance.
      count: `(T,)`, effective observations of the whole stream.
      dispersion: `(T,)`, estimated from the whole stream; None: it is known.
      degrees_of_freedom: `(T,)`, of that estimate; None: the dispersion is known.
      nuisance: the last state's, where the likelihood leaves something else unknown.
    """

    mean: PyTree
    information: Any
    count: jax.Array  # type: ignore[assignment]
    dispersion: jax.Array | None = None
    degrees_of_freedom: jax.Array | None = None
    nuisance: Any | None = None


def smooth(
    flow: FisherFlow, states: FlowState | Sequence[FlowState], batches: Any = None
) -> Smoothed:
    r"""The parameters at each time given the whole stream: Rauch-Tung-Striebel.

    A flow's state knows the batches up to its own. Backwards from the last, with
    `(m_t, P_t)` what is believed after batch t, `(m^-, P^-)` what the memory predicts
    of it for `t + 1`, and A the memory's transition,

    .. math:: G_t = P_t A^\top (P^-_{t+1})^{-1}, \quad
       m_{t|T} = m_t + G_t (m_{t+1|T} - m^-_{t+1}), \quad
       P_{t|T} = P_t + G_t (P_{t+1|T} - P^-_{t+1}) G_t^\top.

    Exact for a Gaussian likelihood and a linear model; of others it smooths the
    Gaussians that the flow believes.

    Args:
      flow: with full structure and a memory that moves the parameters
        (`ff.memories.random_walk`, `matern`). Where nothing moves them the last state
        is what all data say of every time.
      states: those after each update, stacked, leaves `(T, ...)`, as a scan returns
        them, or a list; the flow's first state may stand before them. An update that
        was refused (`info.skipped`) moved nothing.
      batches: the batches of these states, stacked or a list, where the memory's noise
        or transition is a function of the batch.

    Returns:
      `Smoothed`, with leaves `(T, ...)`. Cost: a factorisation and some products a
      time, and another where a state keeps its information, `d^3 T`, and memory
      `5 d^2 T`; all but the way back is of all times at once.

    Raises:
      ValueError: for another structure or memory, states that are not stacked, batches
        of another number than the states; if values are at hand, for states that are
        not of every update and a covariance that is not positive definite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda level, x: level * x,
      ...     ff.likelihoods.gaussian(scale=1.0),
      ...     memory=ff.memories.random_walk(0.5),
      ... )
      >>> def step(state, batch):
      ...     state, info = flow.update(state, batch)
      ...     return state, state
      >>> batches = jnp.ones((3, 1)), jnp.array([[0.0], [3.0], [3.0]])
      >>> last, states = jax.lax.scan(step, flow.init(jnp.zeros(())), batches)
      >>> smoothed = ff.smooth(flow, states)
      >>> print(states.mean[1].round(3), smoothed.mean[1].round(3))
      1.571 1.941
      >>> print(jax.vmap(ff.standard_error)(smoothed)[1].round(3))
      0.623

    References:
      Rauch, Tung, Striebel, "Maximum likelihood estimates of linear dynamic systems",
      1965.
    """
    belonging.check_flow(flow)
    states = _stacked(states)
    recipe = flow.recipe
    _check_moves(recipe, states)
    if batches is not None:
        batches = _one_for_each(batches, states.step.size)
    smoothed, sound = choices.run(recipe, _smoothed, states, batches)
    if not checks.holds(jnp.all(sound)):
        raise ValueError(
            f"the covariance of state {int(jnp.argmin(sound))} is not finite and "
            "positive definite, as predicted or smoothed: rounding took what a vague "
            "prior left. Scale the parameters, give a prior that knows more, or enable "
            "float64."
        )
    return smoothed


def _stacked(states: Any) -> FlowState:
    """The states with their times as leading axes."""
    if isinstance(states, (list, tuple)) and not isinstance(states, FlowState):
        if not states:
            raise ValueError("states are those after each update; got none.")
        for state in states:
            belonging.check_kind(state)
        states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    belonging.check_kind(states)
    if jnp.ndim(states.step) != 1:
        raise ValueError(
            "states are those after each update, stacked: leaves (T, ...), as "
            "jax.lax.scan returns them of a step that gives its state twice; got one "
            f"whose step has shape {jnp.shape(states.step)}."
        )
    taken = states.step[1:] - states.step[:-1]
    if not checks.holds((taken == 0) | (taken == 1)):
        wrong = int(jnp.argmin((taken == 0) | (taken == 1)))
        raise ValueError(
            "states are those after every update, in their order: state "
            f"{wrong + 1} has taken in {int(states.step[wrong + 1])} batches and the "
            f"one before it {int(states.step[wrong])}. What no batch was seen of is a "
            "batch of weight 0."
        )
    return states


def _check_moves(recipe: Recipe, states: FlowState) -> None:
    one = jax.eval_shape(lambda x: jax.tree.map(lambda leaf: leaf[0], x), states)
    belonging.check_state(recipe, one)
    information = jax.eval_shape(ops.plain, one.information)
    if memories.keeps_prior(states.memory):
        raise ValueError(
            f"nothing moves the parameters under the memory {recipe.memory.name}: the "
            "last state is what all batches say of every time. Smoothing is for "
            "ff.memories.random_walk and matern."
        )
    if not ops.facts(information).whole:
        raise ValueError(
            "smoothing needs the covariances between all parameters, which "
            f"{recipe.structure.name} does not keep: build the flow with "
            "structure=ff.structures.full()."
        )


def _one_for_each(batches: Any, count: int) -> Batch:
    """Batches stacked, as many as there are states."""
    if isinstance(batches, list):
        shapes = {str(jax.tree.map(jnp.shape, batch)) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(
                "the batches have different shapes: pad them with rows of weight 0 to "
                "those of the longest."
            )
        batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    batch = by_name(batches)
    found = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if found != {(count,)}:
        raise ValueError(
            f"there are {count} states, and the batches have first axes of "
            f"{sorted(found)}: give the batch of each state, stacked, as to a scan."
        )
    return batch


def _smoothed(
    recipe: Recipe, states: FlowState, batches: Batch | None
) -> tuple[Smoothed, jax.Array]:
    last = jax.tree.map(lambda leaf: leaf[-1], states)
    like, count = last.mean, states.step.size

    def back(rest: tuple, step: _Step) -> tuple[tuple, tuple]:
        mean, covariance = rest
        mean = step.mean + step.gain @ (mean - step.predicted)
        covariance = linalg.turned(step.gain, covariance) + step.left
        return (mean, covariance), (mean, covariance)

    final = trees.ravel(last.mean), _covariance(last.information)
    steps = _steps(recipe, states, batches)
    _, (means, covariances) = jax.lax.scan(back, final, steps, reverse=True)

    def widened(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)

    smoothed = Smoothed(
        mean=jax.vmap(lambda flat: trees.unravel(flat, like))(means),
        information=jax.vmap(lambda matrix: of_covariance(matrix, like))(covariances),
        count=widened(last.count),
        dispersion=widened(last.dispersion),
        degrees_of_freedom=widened(last.degrees_of_freedom),
        nuisance=widened(last.nuisance),
    )
    # what is not finite in a gain is in a whole row of it, and so in a variance
    variances = linalg.diagonal(covariances)
    sound = (variances > 0) & jnp.isfinite(variances) & jnp.isfinite(means)
    return smoothed, jnp.all(sound, 1)


class _Step(NamedTuple):
    """The way back to each state from the next, from the last to itself; `(T, ...)`."""

    mean: jax.Array
    predicted: jax.Array  # the mean of the next, before its batch
    gain: jax.Array
    left: jax.Array  # the covariance given the next parameters


def _steps(recipe: Recipe, states: FlowState, batches: Batch | None) -> _Step:
    # after the last state comes itself, which nothing has moved
    taken = jnp.append(states.step[1:] > states.step[:-1], False)
    parts = jax.tree.map(lambda x: jnp.roll(x, -1, 0), batches)
    size = trees.size(states.mean) // states.step.size
    identity = jnp.eye(size, dtype=trees.float_dtype(states.mean))
    identity = jnp.broadcast_to(identity, (len(taken), size, size))

    def step(state: FlowState, taken: jax.Array, batch: Batch | None) -> tuple:
        if batch is not None:
            batch = as_batch(batch, values=False)
            batch, _ = recipe.model.screen(state.mean, batch)(batch)  # as in an update
        believed = belief_of(state)
        mean, like = trees.ravel(believed.mean), believed.mean
        now = _covariance(believed.sums.curvature)

        def ahead(mean: jax.Array, covariance: jax.Array) -> tuple:
            sums = believed.sums._replace(curvature=of_covariance(covariance, like))
            belief = believed._replace(mean=trees.unravel(mean, like), sums=sums)
            belief = recipe.memory.predict(state.memory, belief, batch, like)
            return trees.ravel(belief.mean), _covariance(belief.sums.curvature)

        # linear in the mean, whatever the memory keeps its transition in
        move = jax.jacfwd(lambda x: ahead(x, now)[0])(mean)
        predicted, then = ahead(mean, now)
        noise = ahead(mean, jnp.zeros_like(now))[1]
        # an update that was refused moved nothing
        predicted = jnp.where(taken, predicted, mean)
        return mean, predicted, now, then, noise, move @ now, move

    found = jax.vmap(step)(states, taken, parts)
    mean, predicted, now, then, noise, across, move = found
    gain = jnp.swapaxes(linalg.definite_solve(then, across), 1, 2)
    left = _left(identity, now, gain, across, move, noise)
    kept = taken[:, None, None]
    gain = jnp.where(kept, gain, identity)
    return _Step(mean, predicted, gain, jnp.where(kept, left, jnp.zeros_like(left)))


def _left(
    identity: jax.Array,
    now: jax.Array,
    gain: jax.Array,
    across: jax.Array,
    move: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """The covariance of the parameters given the next."""
    if now.dtype == jnp.float64:
        return now - gain @ across
    # a sum of squares, of which a vague prior's size takes no digits
    own = identity - gain @ move
    return linalg.turned(own, now) + linalg.turned(gain, noise)


def _covariance(information: Any) -> jax.Array:
    return ops.to_dense(ops.inverse(information))
