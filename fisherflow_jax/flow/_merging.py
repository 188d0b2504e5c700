"""Several beliefs as one: workers of a flow, and models with their informations."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _workers as workers
from fisherflow_jax.flow._quadratics import UNFINISHED, in_common, minimum
from fisherflow_jax.flow._state import FlowState
from fisherflow_jax.structures import _prior as priors

PyTree = Any

# Of equal models 1, of different initialisations 0: below, more is apart than common.
_LEAST_IN_COMMON = 0.5
_NUMBERS = "temperature", "prior_precision"


class Merged(NamedTuple):
    """The Gaussian `N(mean, information^-1)` that several models make; a state.

    Attributes:
      mean: like theirs.
      information: of all their data and one prior, divided by the temperature.
      temperature: `()`, theirs.
      prior_precision: the prior's part of the information; None: not known.
      residual: `()`, of the equation for the mean, relative to its right-hand side; 0
        where the information is factorised and not iterated with.
      num_left_out: `()` int32, models that were left out for a value that is not
        finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([4.0]))
      >>> pairs = [(jnp.array([0.0]), information), (jnp.array([1.0]), information)]
      >>> merged = ff.merge(pairs, prior_precision=1.0)
      >>> print(merged.mean.round(3), merged.information.entries)
      [0.5] [9.]
    """

    mean: PyTree
    information: Any
    temperature: jax.Array
    prior_precision: Any | None
    residual: Any = 0.0
    num_left_out: Any = 0


def merge(
    states: Sequence[Any], start: Any = None, *, prior_precision: Any = None
) -> Any:
    r"""Makes one belief of several, each of its own data.

    .. math:: I = I_s + \sum_k (I_k - I_s), \quad
       I (\theta - \theta_s) = \sum_k I_k (\theta_k - \theta_s)

    What the beliefs share, the prior or all that a common start knew, counts once.
    Exact for linear-Gaussian models: what one machine finds that saw all the data, in
    any order. Elsewhere each linearises at its own estimate; `ff.refine` removes what
    that costs a flow.

    **Posteriors** (`ff.posterior`, `ff.continual.consolidate`, `ff.laplace(...).state`,
    merged ones) have one prior precision P and one temperature. `start` is where the
    prior has its mean (:math:`I_s = P`), or the posterior that all of them set out
    from. Without one the prior holds them at their plain mean, which is then the answer
    where no data speak. **Pairs** `(mean, information)` are estimates from the data
    alone, with what these say, F_k; `prior_precision` is added once:
    :math:`(P + \sum_k F_k) (\theta - \theta_s) = \sum_k F_k (\theta_k - \theta_s)`.
    Models that agree are returned as they are.

    **A flow's states** set out from its state `start`. With exponential memory the
    workers run in parallel time, and what they add is taken from the common state as it
    has aged since; they must have made the same number of updates (skipped batches are
    none; under jit, NaN if not). Its log-evidence is then the workers' own sum with the
    correction that is exact for stationary memory: approximate, and not a sequence's.
    A start that is older than the one the workers shared cannot be told from it: what
    they share beyond it counts once for each of them.

    A Kronecker structure keeps added factors; the mean is solved for with the sum of
    the operators, by at most 100 conjugate gradients which the added factors
    precondition, to a relative residual of 1e-6. Low-rank states are fused without loss
    and recompressed; what recompression moved between the diagonal and the directions
    can make a difference of states indefinite, so the sum's diagonal part is not let
    below that of the start.

    Args:
      states: the beliefs, at least one, all of a kind and of one structure. Of a stack
        that `jax.vmap` made, `[jax.tree.map(itemgetter(k), stack) for k in range(K)]`
        (`operator.itemgetter`).
      start: what they set out from. A flow's state for a flow's states; else a mean
        like theirs, a posterior, or None.
      prior_precision: with pairs: a positive number, a pytree prefix of numbers, or an
        information.

    Returns:
      Of a flow's states a state: mean, information, count, log-evidence, scores,
      dispersion and counters; compensated pairs stay compensated. Else a `Merged`. A
      model that is not finite is left out and counted (`num_left_out`; of a flow in
      `num_skipped`). A mean whose residual stays above 1e-4 is one more of a flow's
      `events.searches_unfinished`. Cost: a factorisation of the sum, a few products
      with each information, and as many for each conjugate gradient.

    Warns:
      ff.DataWarning: where models are left out; and where less than half of the squared
        length of their matrices is common to them: models that were initialised apart
        have 0 in common, and no average of them is a model. It is not said of models
        with fewer than two matrices, which have no hidden units to permute. And where
        the residual stays above 1e-4.

    Raises:
      TypeError: for windowed, adaptive and random_walk memories, which do not merge;
        for what is no belief, or a mixture of kinds.
      ValueError: without states; for other trees, shapes, structures, priors or
        temperatures than the first one's, or states of another flow; for a posterior
        that does not say its prior; for exponential memory where the workers did not
        make the same number of updates; where values are at hand, for a worker with
        fewer observations or updates than the start, with as many updates and
        another mean, or with another prior.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> one, two = (
      ...     ff.posterior(
      ...         jnp.array(mean),
      ...         ff.structures.Diagonal(jnp.array(data)),
      ...         prior_precision=1.0,
      ...     )
      ...     for mean, data in (([2.0, 0.0], [2.0, 5.0]), ([4.0, 4.0], [5.0, 2.0]))
      ... )
      >>> print(ff.merge([one, two]).mean)
      [3.375 1.25 ]
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x * params,
      ...     ff.likelihoods.gaussian(),
      ...     prior_precision=1e-6,
      ... )
      >>> start = flow.init(jnp.array(0.0))
      >>> one, _ = flow.update(start, (jnp.ones(2), jnp.array([1.0, 3.0])))
      >>> two, _ = flow.update(start, (jnp.ones(2), jnp.array([5.0, 7.0])))
      >>> merged = ff.merge([one, two], start)
      >>> print(merged.mean.round(3), merged.count)
      4.0 4.0

    References:
      Smola, Vishwanathan, Eskin, "Laplace propagation", 2003.
      Matena, Raffel, "Merging models with Fisher-weighted averaging", 2022.
      Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless knowledge fusion by merging weights of
      language models", 2023.
    """
    if hasattr(states, "mean"):
        raise TypeError(
            "merge takes the states in a list, ff.merge([a, b], start), and of a flow "
            "start is what they set out from: flow.init(params), or a later state; got "
            f"a {type(states).__name__} in place of the list."
        )
    states = list(states)
    if not states:
        raise ValueError("merge needs at least one worker's state; got none.")
    if prior_precision is not None and any(hasattr(x, "mean") for x in states):
        raise ValueError(
            "prior_precision is for pairs (mean, information), not states."
        )
    if any(isinstance(state, FlowState) for state in (*states, start)):
        merged, taken, residual = workers.fuse(states, start)
    else:
        states = [_model(state, prior_precision) for state in states]
        merged, taken = _fused(states, start, held=prior_precision is None)
        residual = merged.residual
    _warn([state.mean for state in states], taken, residual)
    return merged


def _fused(models: list[Merged], start: Any, held: bool) -> tuple[Merged, list]:
    if about := hasattr(start, "information"):
        start = _model(start)
    _check_alike([*models, start] if about else models)
    merged, taken = _joined(models, start, held)
    if not checks.holds(merged.num_left_out < len(models)):
        raise ValueError("no model is finite: there is nothing to merge.")
    return merged, taken


@functools.partial(jax.jit, static_argnames="held")
def _joined(models: list[Merged], start: Any, held: bool) -> tuple[Merged, list]:
    taken = [trees.all_finite((x.mean, x.information)) for x in models]
    number = jnp.sum(jnp.stack(taken), dtype=jnp.int32)
    sound = models[0]  # the first that is finite
    for model, own in zip(models[::-1], taken[::-1], strict=True):
        sound = trees.where(own, model, sound)
    pairs = list(zip(taken, models, strict=True))
    if start is None:
        means = [trees.where(own, one.mean, sound.mean) for own, one in pairs]

        def average(one: jax.Array, *each: jax.Array) -> jax.Array:
            # by differences: equal models are their mean to the last bit
            return one + sum(x - one for x in each) / number.astype(one.dtype)

        start = jax.tree.map(average, sound.mean, *means)
    if not isinstance(start, Merged):
        known = ops.add(ops.scale(sound.information, 0.0), models[0].prior_precision)
        start = sound._replace(mean=start, information=known)
    trees.check_shapes(start.mean, sound.mean, "start must be like the means")
    beliefs = [trees.where(own, one[:2], start[:2]) for own, one in pairs]
    moves = [optax.tree.sub(mean, start.mean) for mean, _ in beliefs]
    found = minimum(start.information, [x for _, x in beliefs], moves, held=held)
    merged = start._replace(
        mean=optax.tree.add(start.mean, found.step),
        information=ops.conform(start.information, found.information),
        residual=found.residual,
        num_left_out=len(models) - number,
    )
    return merged, taken


def _model(state: Any, prior_precision: Any = None) -> Merged:
    """What is read of a posterior, or made of a pair."""
    if hasattr(state, "mean") and hasattr(state, "information"):
        mean, information = state.mean, ops.plain(state.information)
        prior = getattr(state, "prior_precision", None)
    elif prior_precision is not None and isinstance(state, (tuple, list)):
        mean, information = trees.real_arrays(state[0], "mean"), gathered(state[1])
        rule = "an information is about other parameters than its mean"
        entries = jax.eval_shape(ops.diagonal, information, mean)
        trees.check_shapes(entries, mean, rule)
        prior = priors.as_precision(gathered(prior_precision), mean, information)
        information = ops.add(information, prior)
    else:
        raise TypeError(
            "merge takes a list: flows' states and their start, posteriors, or pairs "
            f"(mean, information) and prior_precision; got {checks.described(state)}."
        )
    mean = trees.widen(mean)
    dtype = trees.float_dtype(mean)
    temperature = jnp.asarray(getattr(state, "temperature", 1.0), dtype)
    return Merged(mean, information, temperature, prior)


def _check_alike(models: list[Merged]) -> None:
    """Raises where a model differs from the first in what all must share."""
    first = models[0]
    for number, model in enumerate(models):
        if model.prior_precision is None:
            raise ValueError(
                f"model {number} does not say its prior: use ff.posterior, or pairs."
            )
        for what in ("mean", "information", *_NUMBERS):
            one, other = (getattr(x, what) for x in (model, first))
            alike, told = belonging.form(one) == belonging.form(other), ""
            if not alike:
                told = belonging.told(one, other)
            elif what in _NUMBERS and not checks.is_traced((one, other)):
                pairs = zip(*map(jax.tree.leaves, (one, other)), strict=True)
                alike = all(_is_near(x, y) for x, y in pairs)
                told = " not ".join(map(checks.shown, (one, other)))
            if not alike:
                raise ValueError(
                    f"model {number} has another {what} than the first, {told}: all "
                    "share parameters, structure, prior and temperature."
                )


def _is_near(one: Any, other: Any) -> bool:
    one, other = map(checks.readable, (one, other))
    return checks.holds(abs(one - other) <= 1e-8 + 1e-5 * abs(other))


def _warn(means: list, taken: Sequence[jax.Array], residual: jax.Array) -> None:
    """Of what merging cannot mend, where the values are at hand."""
    if checks.is_traced((means, taken, residual)):
        return
    kept = [mean for mean, own in zip(means, taken, strict=True) if own]
    left = [f"model {number}" for number, own in enumerate(taken) if not own]
    said = []
    if left:
        said.append(f"left out, for values that are not finite: {', '.join(left)}.")
    if kept and (shared := float(in_common(kept))) < _LEAST_IN_COMMON:
        said.append(
            f"the models have {shared:.2f} of their matrices' squared length in common "
            "(equal ones 1, different initialisations 0): tune all from one start."
        )
    if residual > UNFINISHED:
        said.append(f"the mean has a residual of {residual:.1g}: raise the precision.")
    for message in said:
        warn_once(means, message)
