"""Sequential inference at the cost of the rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import memories
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, screening
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Belief, Memory, Prior, Sum, stationary
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.predictions import Prediction, predict
from fisherflow_jax.sparse import _rows
from fisherflow_jax.sparse._rows import Rows
from fisherflow_jax.sparse._state import SparseInfo, SparseState, check_expected
from fisherflow_jax.structures import Diagonal, Scalar

PyTree = Any

# Beyond which what is stored is multiplied by its scale: exp(-40), of numbers that
# reach from 1e-38 to 1e38.
_FAINTEST = -40.0


class SparseFlow(NamedTuple):
    """A sparse flow's functions. Made by `ff.sparse.flow`.

    Attributes:
      init: `(prior_mean=0.0) -> state`.
      update: `(state, batch) -> (state, info)`, as `lax.scan` calls it; a batch is
        `(rows, targets)` or `(rows, targets, weights)`.
      predict: `(state, rows, *, level=.95, link=None) -> Prediction`, as `ff.predict`.
      sample: `(state, rows, key) -> (n,)`, the rows' linear predictors under one draw
        of the parameters.
    """

    init: Callable[..., SparseState]
    update: Callable[..., tuple[SparseState, SparseInfo]]
    predict: Callable[..., Prediction]
    sample: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class _Recipe:
    likelihood: Likelihood
    num_features: int
    memory: Memory
    normalise: bool
    bad_rows: str


def flow(
    likelihood: Likelihood,
    num_features: int,
    *,
    memory: Memory = stationary(),  # noqa: B008
    prior_precision: Any = 1.0,
    l1: jax.typing.ArrayLike = 0.0,
    normalise: bool = True,
    rate: jax.typing.ArrayLike | None = None,
    bad_rows: str = "raise",
) -> SparseFlow:
    r"""Sequential inference for a linear predictor with very many features.

    Of each feature a mean and an information are kept (the diagonal), as two sums that
    only the features of a row add to. With `m` the means before a batch, `eta = x m`
    the linear predictor of a row, `h` the likelihood's Fisher information at it and `s`
    its score,

    .. math:: J_j \mathrel{+}= \sum_i w_i h_i x_{ij}^2, \quad
       b_j \mathrel{+}= \sum_i w_i \Big(h_i x_{ij}^2 (m_j - m_{0j})
         + \frac{s_i x_{ij}}{1 + h_i v_i}\Big), \quad
       m_j = m_{0j} + \frac{b_j}{I_{0j} + J_j},

    one explicit step of `ff.fisher_flow(structure=diagonal(), num_steps=1)`. The
    denominator, with :math:`v_i` the variance of `eta_i`, is the factor of one row's
    exact update; it keeps many features that are new at once from overshooting.

    Args:
      likelihood: from `ff.likelihoods`, with one output a target and nothing unknown.
      num_features: of the parameters `(num_features,)`. One that is 1 in every row is
        the intercept.
      memory: `ff.memories.stationary()` or `exponential(decay)` with its floor; the
        whole state fades by one number.
      prior_precision: positive: a number, or one a feature. The choice that matters
        most: of the order of one over the squared size of the weights.
      l1: at least 0: :math:`b_j` is shortened by it where a mean is read, so that
        features which say little have the prior mean exactly.
      normalise: False: without the denominator.
      rate: J is the root of the summed squared scores over this rate, in place of the
        expected information: with `normalise=False`, FTRL-Proximal. Stationary memory;
        there are no intervals by it.
      bad_rows: "raise" or "drop", as in `ff.fisher_flow`; a row is bad for an index out
        of range too.

    Returns:
      A `SparseFlow(init, update, predict, sample)`. The state takes `2 num_features`
      numbers; its `.mean` and `.information` are computed when they are read, so that
      functions of a state take it, at the cost of all features. An update, a prediction
      and a draw of n rows with k places cost `O(n k)`: nothing of the size of the state
      is copied in a scan, or where the state is donated,
      `jax.jit(flow.update, donate_argnums=0)`; a call that keeps the state before
      copies it. In float32 the sums stop growing at 2^24 times what a row adds.

    Raises:
      ValueError: for a likelihood with several outputs a target or something unknown, a
        memory that does not fade, options out of range; and outside jit for bad rows.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.sparse.flow(ff.likelihoods.bernoulli(), 1_000_000)
      >>> rows = ff.sparse.Rows(jnp.array([[0, 7], [0, 900_000]]), jnp.ones((2, 2)))
      >>> state, info = flow.update(flow.init(), (rows, jnp.array([1.0, 0.0])))
      >>> print(flow.predict(state, rows).mean.round(3))
      [0.551 0.449]

    References:
      McMahan et al., "Ad click prediction: a view from the trenches", 2013.
      Graepel et al., "Web-scale Bayesian click-through rate prediction for sponsored
      search advertising", 2010.
    """
    checks.made(likelihood, Likelihood, "likelihood", "ff.likelihoods.bernoulli()")
    checks.made(memory, Memory, "memory", "ff.memories.stationary()")
    _check_likelihood(likelihood)
    num_features = checks.whole(num_features, "num_features")
    if num_features >= np.iinfo(np.int32).max:
        raise ValueError(
            f"num_features must be below 2^31; got {num_features}: hash the features."
        )
    checks.positive(prior_precision, "prior_precision")
    checks.not_negative(l1, "l1")
    screening.check_option(bad_rows)
    storage, _ = _faded(memory)
    if rate is not None:
        checks.positive(rate, "rate")
        if not memories.remembers_all(storage):
            raise ValueError(
                f"with a rate the squares of scores are kept, which {memory.name} does "
                "not fade as it fades their sum: take ff.memories.stationary()."
            )
    recipe = choices.shared(
        _Recipe(likelihood, num_features, memory, normalise, bad_rows)
    )
    start = functools.partial(
        _init, recipe, prior_precision=prior_precision, l1=l1, rate=rate
    )
    return SparseFlow(
        init=lambda prior_mean=0.0: start(prior_mean),
        update=functools.partial(_update, recipe),
        predict=functools.partial(_predict, recipe),
        sample=functools.partial(_sample, recipe),
    )


def _check_likelihood(likelihood: Likelihood) -> None:
    outputs = jax.ShapeDtypeStruct((2,), jnp.result_type(float))
    try:
        single = likelihood.shape_of_targets(outputs) == outputs.shape
    except (TypeError, ValueError, IndexError):
        single = False
    if likelihood.with_dispersion is not None or likelihood.nuisance is not None:
        what = "something unknown, which is not estimated here"
    elif likelihood.random_root:
        what = "no expected information but a drawn one"
    elif not single or not likelihood.diagonal or likelihood.known is not None:
        what = "several outputs a target"
    else:
        return
    raise ValueError(
        f"{likelihood.name} has {what}: a sparse flow has one linear predictor a row, "
        "as of bernoulli(), poisson(), gaussian(scale), gamma(shape)."
    )


def _faded(memory: Memory, storage: Any = None) -> tuple[Any, jax.Array]:
    """The memory's storage, and the factor by which an update fades a sum."""
    one = jnp.ones((), jnp.result_type(float))
    unit = Sum(curvature=Scalar(one), weight=one, linear=None)
    if storage is None:
        storage = memory.init(unit)
    # a unit of information that is all the prior's: the floor leaves it as it is
    belief = Belief(jnp.zeros_like(one), unit, Prior(jnp.zeros_like(one), Scalar(one)))
    try:
        aged = memories.age(storage, belief, jnp.ones((), jnp.int32))
    except TypeError as error:
        raise ValueError(
            f"a sparse flow's memory fades all by one number, which {memory.name} does "
            "not: take ff.memories.stationary() or exponential(decay)."
        ) from error
    kept = aged.sums.curvature.value
    if not checks.holds(2 * kept >= 1 + aged.sums.weight):
        raise ValueError(
            f"{memory.name} forgets the prior too (floor=False), which a feature that "
            "does not come back would lose altogether: keep the floor."
        )
    return storage, aged.sums.weight


def _init(
    recipe: _Recipe, prior_mean: Any, *, prior_precision: Any, l1: Any, rate: Any
) -> SparseState:
    dtype, count = jnp.result_type(float), recipe.num_features

    def of_each(value: Any, name: str) -> jax.Array:
        value = jnp.array(value, dtype)
        if value.shape not in ((), (count,)):
            raise ValueError(
                f"{name} is a number or one a feature, shape ({count},); got shape "
                f"{value.shape}."
            )
        return value

    none = jnp.zeros((), jnp.int32)
    state = SparseState(
        curvature=jnp.zeros(count, dtype),
        shift=jnp.zeros(count, dtype),
        log_scale=jnp.zeros((), dtype),
        prior_mean=of_each(prior_mean, "prior_mean"),
        prior_entries=of_each(prior_precision, "prior_precision"),
        l1=jnp.array(l1, dtype),
        rate=None if rate is None else jnp.array(rate, dtype),
        memory=_faded(recipe.memory)[0],
        count=jnp.zeros((), dtype),
        step=none,
        num_skipped=none,
        rows_skipped=none,
    )
    return jax.tree.map(jnp.copy, state)  # no two leaves share a buffer


def _update(
    recipe: _Recipe, state: SparseState, batch: Any
) -> tuple[SparseState, SparseInfo]:
    _check_state(recipe, state)
    given = batches.by_name(batch)
    if given.targets is None:
        raise ValueError("a flow learns from targets; the batch's are None.")
    given = given._replace(inputs=_rows.checked(given.inputs))
    batch = batches.as_batch(given, values=False)
    _check_batch(recipe, batch)
    after, info = choices.compiled(recipe, _take_in)(state, batch)
    if not checks.is_traced((info, given)):
        _check_taken_in(recipe, given, info)
    return after, info


def _check_state(recipe: _Recipe, state: Any) -> None:
    if not isinstance(state, SparseState):
        raise TypeError(
            "a sparse flow's functions take a state of its own init; got "
            f"{checks.described(state)}."
        )
    if state.shift.shape != (recipe.num_features,):
        raise ValueError(
            f"the state has {state.shift.size} features, and the flow "
            f"{recipe.num_features}."
        )


def _check_batch(recipe: _Recipe, batch: batches.Batch) -> None:
    count = batch.inputs.indices.shape[0]
    recipe.likelihood.check(jnp.zeros(count), batch.targets)
    if batch.weights.shape != (count,):
        raise ValueError(
            f"weights are one a row, shape ({count},); got {batch.weights.shape}."
        )
    if batch.clusters is not None:
        raise ValueError("a sparse flow keeps no scores of clusters.")


def _screen(recipe: _Recipe, count: int) -> screening.Screen:
    likelihood = recipe.likelihood
    return screening.Screen(
        likelihood.name, likelihood.support, None, (count,), together=False
    )


def _admitted(recipe: _Recipe, batch: batches.Batch) -> tuple[batches.Batch, jax.Array]:
    """The batch without its bad rows, padding holding zeros."""
    indices, values = batch.inputs
    padding = indices == recipe.num_features
    values = jnp.where(padding, jnp.zeros_like(values), values)
    wrong = (indices < 0) | (indices > recipe.num_features)
    rows = Rows(indices, jnp.where(wrong, jnp.nan, values))
    return _screen(recipe, len(indices))(batch._replace(inputs=rows))


def _check_taken_in(recipe: _Recipe, given: batches.Batch, info: SparseInfo) -> None:
    """Raises where an update is seen to have failed, saying why."""
    refused = recipe.bad_rows == "raise" and info.rows_skipped > 0
    if not refused and not info.skipped:
        return
    told = _rows.told(given.inputs, recipe.num_features)
    if told is not None:
        raise ValueError(
            f'{told}. Mend the row; under jit, and with bad_rows="drop", such rows are '
            "left out and counted."
        )
    padding = given.inputs.indices == recipe.num_features
    values = jnp.where(padding, 0, given.inputs.values)
    clean = given._replace(inputs=given.inputs._replace(values=values))
    _screen(recipe, len(values)).refuse(clean)
    if info.skipped:
        raise ValueError(
            "what the batch adds is not finite, for an overflow (under jit it would be "
            "skipped and counted)."
        )


def _take_in(
    recipe: _Recipe, state: SparseState, batch: batches.Batch
) -> tuple[SparseState, SparseInfo]:
    batch, rows_skipped = _admitted(recipe, batch)
    (indices, values), weights = batch.inputs, batch.weights
    dtype = state.shift.dtype
    values, weights = values.astype(dtype), weights.astype(dtype)
    factor = _faded(recipe.memory, state.memory)[1].astype(dtype)
    state = _rescaled(state._replace(log_scale=state.log_scale + jnp.log(factor)))
    before = state.at(indices)
    output = jnp.sum(before.mean * values, 1)
    variance = jnp.sum(jnp.square(values) / before.information, 1)

    def each(outputs: jax.Array) -> jax.Array:
        return recipe.likelihood.log_prob(outputs, batch.targets)

    found, pull = jax.vjp(each, output)
    (slope,) = pull(jnp.ones_like(found))
    score = (slope * weights)[:, None] * values
    root = recipe.likelihood.root(output, jnp.ones_like(output))
    fisher = jnp.square(root)
    curvature = (fisher * weights)[:, None] * jnp.square(values)
    if recipe.normalise:
        score = score / (1 + fisher * variance)[:, None]

    scale = jnp.exp(state.log_scale)
    adds = curvature if state.rate is None else jnp.square(score)
    total = jnp.sum(jnp.where(weights > 0, found * weights, 0))
    sound = jnp.isfinite(jnp.sum(adds) + jnp.sum(score) + total)
    # decided before anything is added: nothing is chosen between two states
    adds = jnp.where(sound, adds / scale, 0)
    sums = state.curvature.at[indices].add(adds, mode="drop")
    if state.rate is not None:
        curvature = _risen(state, sums, indices, before.curvature, adds * scale)
    shift = (curvature * (before.mean - before.origin) + score) / scale
    shift = jnp.where(sound, shift, 0)
    shifts = state.shift.at[indices].add(shift, mode="drop")
    weight = jnp.where(sound, jnp.sum(weights), 0)
    after = state._replace(
        curvature=sums,
        shift=shifts,
        count=state.count * factor + weight,
        step=state.step + sound.astype(jnp.int32),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        rows_skipped=state.rows_skipped + rows_skipped,
    )
    info = SparseInfo(
        log_likelihood=total,
        output=output,
        variance=variance,
        rows_skipped=rows_skipped,
        skipped=~sound,
        missing=~jnp.any(weights > 0),
    )
    return after, info


def _rescaled(state: SparseState) -> SparseState:
    """The state, its sums multiplied by their scale where that has become faint.

    A loop of one turn or none, and no branch, which would copy what it hands through.
    """
    faint = state.log_scale < _FAINTEST
    scale = jnp.exp(state.log_scale)

    def turn(carry: tuple) -> tuple:
        _, *sums = carry
        return (jnp.zeros_like(faint), *(x * scale for x in sums))

    _, *sums = jax.lax.while_loop(
        lambda carry: carry[0], turn, (faint, state.curvature, state.shift)
    )
    log_scale = jnp.where(faint, 0, state.log_scale)
    return state._replace(curvature=sums[0], shift=sums[1], log_scale=log_scale)


def _risen(
    state: SparseState, sums: jax.Array, indices: jax.Array, before: Any, adds: Any
) -> jax.Array:
    """What each entry adds to a root of sums: its share of what its feature gains."""
    after = sums.at[indices].get(mode="fill", fill_value=0) * jnp.exp(state.log_scale)
    whole = jnp.where(after > before, after - before, 1)
    return adds / whole * (jnp.sqrt(after) - jnp.sqrt(before)) / state.rate


def _line(recipe: _Recipe, state: Any, rows: Any) -> tuple[Rows, Any, Any]:
    """The rows, their features' means, and their features' variances."""
    _check_state(recipe, state)
    indices, values = _rows.checked(rows)
    if not checks.is_traced(indices):
        told = _rows.told(Rows(indices, values), recipe.num_features)
        if told is not None:
            raise ValueError(f"{told}.")
    padding = indices == recipe.num_features
    wrong = (indices < 0) | (indices > recipe.num_features)
    values = jnp.where(wrong, jnp.nan, jnp.where(padding, 0, values))
    found = state.at(indices)
    return Rows(indices, values.astype(found.mean.dtype)), found.mean, found.information


def _predict(
    recipe: _Recipe,
    state: SparseState,
    rows: Rows,
    *,
    level: float = 0.95,
    link: Any = None,
) -> Prediction:
    """The expected target of each row, as `ff.predict`; fields `(n,)`."""
    rows, mean, information = _line(recipe, state, rows)
    check_expected(state)
    line = jnp.sum(mean * rows.values, 1)
    variance = jnp.sum(jnp.square(rows.values) / information, 1)

    def one(line: jax.Array, variance: jax.Array) -> Prediction:
        # of a model with one parameter: the row's linear predictor
        belief = Gaussian(line, Diagonal(1 / variance))
        whole = predict(
            belief, _itself, recipe.likelihood, jnp.ones(1), level=level, link=link
        )
        return jax.tree.map(lambda x: x[0], whole)

    return jax.vmap(one)(line, variance)


def _itself(params: jax.Array, inputs: jax.Array) -> jax.Array:
    return params * inputs


def _sample(recipe: _Recipe, state: SparseState, rows: Rows, key: Any) -> jax.Array:
    """Linear predictors `(n,)` under one draw, the same for a feature in all rows."""
    rows, mean, information = _line(recipe, state, rows)
    check_expected(state)
    key = keys.typed_key(key)

    def noise(index: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, index), (), mean.dtype)

    each = jax.vmap(jax.vmap(noise))(rows.indices.astype(jnp.uint32))
    return jnp.sum((mean + each / jnp.sqrt(information)) * rows.values, 1)
