"""The most probable next tokens of a sequence model, with intervals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import chunks, trees
from fisherflow_jax._ground.checks import whole
from fisherflow_jax.likelihoods import SOFTMAX, Likelihood
from fisherflow_jax.model import check_choices, once
from fisherflow_jax.posteriors import Gaussian, check_level, two_sided
from fisherflow_jax.predictions import _streaming as streaming
from fisherflow_jax.predictions._streaming import Wanted

PyTree = Any


class TopTokens(NamedTuple):
    """The k most probable classes, each `(n, ..., k)`, the most probable first.

    Made by `ff.predictions.top_tokens`.
    """

    ids: jax.Array
    probabilities: jax.Array  # of the model at the mean: not averaged
    std: jax.Array  # of the probability
    lower: jax.Array  # of the probability
    upper: jax.Array


def top_tokens(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    inputs: PyTree,
    k: int,
    *,
    level: float = 0.95,
    robust: bool | str = False,
    chunk_size: int | None = None,
) -> TopTokens:
    r"""Next-token probabilities with their uncertainty, of the k most probable tokens.

    The log-odds of a class against all others,

    .. math:: \eta_c = z_c - \log \sum_{j \ne c} e^{z_j}, \qquad
       \nabla \eta_c = \frac{e_c - p}{1 - p_c},

    are linearised for those k of V classes alone: k backward passes a position, not V.
    The interval is symmetric in the log-odds, within 0 and 1 in probability.
    Probabilities and their standard deviations are those of
    `ff.predict(..., link=ff.predictions.plug_in())`: to average over the parameters
    takes the uncertainty of all V classes.

    Args:
      state: anything with `.mean` and `.information`.
      apply_fn: `(params, inputs) -> logits (n, ..., V)`, such as `(n, T, V)`.
      likelihood: `ff.likelihoods.categorical()`, with any root.
      inputs: leading axis n, such as token ids `(n, T)`.
      k: how many classes, at most V.
      level: of the interval of the probability, in (0, 1).
      robust: with the sandwich variance, as in `ff.standard_error`.
      chunk_size: examples at a time; None: as many as keep 16 MiB.

    Returns:
      `TopTokens` of arrays `(n, ..., k)`. Cost: one factorisation, and k backward
      passes and solves a position.

    Raises:
      ValueError: for a k that is not between 1 and V, another likelihood, a bank, and
        as `ff.predict` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> table = jnp.array([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
      >>> information = ff.structures.Scalar(jnp.array(9.0))
      >>> state = ff.posterior(table, information, prior_precision=1.0)
      >>> top = ff.predictions.top_tokens(
      ...     state,
      ...     lambda params, ids: params[ids],
      ...     ff.likelihoods.categorical(),
      ...     jnp.array([[0, 2]]),
      ...     k=2,
      ... )
      >>> print(top.ids)
      [[[1 2]
        [2 0]]]
      >>> print(top.probabilities[0, 0].round(1), top.lower[0, 0].round(1))
      [0.7 0.2] [0.5 0.1]
    """
    check_level(level)
    check_choices(apply_fn, likelihood)
    inputs = products.check_inputs(state, inputs, chunk_size, robust)
    if likelihood.scale != SOFTMAX:
        raise ValueError(
            f"top_tokens is for categorical targets; got {likelihood.name}."
        )
    belief = products.one_belief(state, "top_tokens takes one state", robust)
    whole(k, "k", of="classes")
    wanted = Wanted(line_of=likelihood, robust=robust, chunk_size=chunk_size)
    ids, line, variance = products.deciding(
        _compiled, belief, apply_fn, inputs, k, wanted
    )
    dtype = trees.wide_dtype(line.dtype, variance.dtype)
    line, std = line.astype(dtype), jnp.sqrt(variance.astype(dtype))
    reach = two_sided(level, None, dtype) * std
    share = jax.nn.sigmoid(line)
    return TopTokens(
        ids=ids,
        probabilities=share,
        std=share * jax.nn.sigmoid(-line) * std,
        lower=jax.nn.sigmoid(line - reach),
        upper=jax.nn.sigmoid(line + reach),
    )


def _top(
    belief: Gaussian, apply_fn: Callable, inputs: PyTree, k: int, wanted: Wanted
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which they are, their log-odds, and the variance of these."""
    examples = streaming.examples_of(belief, once(apply_fn), inputs, wanted)
    size, at_once = streaming.sizes(examples, wanted.chunk_size, False)

    def one(parts: list) -> tuple[jax.Array, jax.Array, jax.Array]:
        outputs, pull = examples.pull(parts)
        if k > outputs.shape[-1]:
            raise ValueError(f"k = {k} is more than the {outputs.shape[-1]} classes.")
        ids = jax.lax.top_k(outputs, k)[1]

        def log_odds(logits: jax.Array) -> jax.Array:
            # by the likelihood's own line, which is finite for saturated logits
            return jnp.take_along_axis(wanted.line_of.line(logits), ids, -1)

        variance = streaming.variance_of(log_odds, outputs, pull, at_once)
        return ids[0], log_odds(outputs)[0], variance

    ids, line, variance = chunks.map_chunks(jax.vmap(one), examples.parts, size)
    return ids, line, streaming.dispersed(variance, belief, wanted.robust)


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_top, static_argnums=(1, 3, 4))
