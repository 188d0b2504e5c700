"""Sequential inference at the cost of the rows."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import memories
from fisherflow_jax._ground import checks, choices, screening
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Memory, stationary
from fisherflow_jax.predictions import Prediction
from fisherflow_jax.sparse._reading import predict, sample
from fisherflow_jax.sparse._recipe import Recipe, faded, init
from fisherflow_jax.sparse._state import SparseInfo, SparseState
from fisherflow_jax.sparse._update import update


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

    @property
    def recipe(self) -> Recipe:
        """The flow's choices."""
        return self.update.args[0]  # type: ignore[attr-defined]


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
    storage, _ = faded(memory)
    if rate is not None:
        checks.positive(rate, "rate")
        if not memories.remembers_all(storage):
            raise ValueError(
                f"with a rate the squares of scores are kept, which {memory.name} does "
                "not fade as it fades their sum: take ff.memories.stationary()."
            )
    recipe = choices.shared(
        Recipe(likelihood, num_features, memory, normalise, bad_rows)
    )
    start = functools.partial(
        init, recipe, prior_precision=prior_precision, l1=l1, rate=rate
    )
    return SparseFlow(
        init=lambda prior_mean=0.0: start(prior_mean),
        update=functools.partial(update, recipe),
        predict=functools.partial(predict, recipe),
        sample=functools.partial(sample, recipe),
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
