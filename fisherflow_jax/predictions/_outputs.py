"""The linearised model: its outputs at the mean, and how unsure they are."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import check_function, once
from fisherflow_jax.posteriors import mixture
from fisherflow_jax.predictions._streaming import Outputs, Wanted, moments, raw
from fisherflow_jax.products import believed, check_inputs, deciding, known

PyTree = Any


def linearized_outputs(
    state: Any,
    apply_fn: Callable,
    inputs: PyTree,
    *,
    covariance: bool = False,
    line_of: Likelihood | None = None,
    robust: bool | str = False,
    chunk_size: int | None = None,
) -> Outputs:
    r"""The model's outputs at the mean, and their spread under its linearisation.

    .. math:: z = f(\hat\theta, x) + J (\theta - \hat\theta), \qquad
       \mathrm{Cov}(z) = J I^{-1} J^\top

    What links, calibration and joint predictions start from. With scalar, diagonal and
    Kronecker structures nothing of the size of the Jacobian is formed: variances come
    from what enters each layer and what returns to it,

    .. math:: \mathrm{Var}(z_r) = \sum_{io} a_i^2 V_{io} g_{ro}^2

    in the eigenbasis of the two sides. Where the parameters are those of the last layer
    alone, g is the identity, and many classes need no backward pass.

    Args:
      state: anything with `.mean` and `.information`, or a bank's state.
      apply_fn: `(params, inputs) -> outputs (n, ..., k)`.
      inputs: leading axis n; parts in `ff.Shared` are passed whole.
      covariance: also that of the outputs on the last axis, position by position. It
        is `(n, 1, 1)` for outputs `(n,)`.
      line_of: also the variance of this likelihood's line, the scale of the intervals
        of `ff.predict`: for classes each one's log-odds against all others.
      robust: with the sandwich variance, as in `ff.standard_error`.
      chunk_size: examples at a time; None: as many as keep 16 MiB.

    Returns:
      `Outputs`. Cost: one factorisation, a backward pass for each output, and for each
      a triangular solve with d^2 (full), or products with the layers' sides (I + O, and
      I O where positions share a kernel). Last layer alone: I k an example, k^2 with a
      Kronecker eigenbasis.

    Raises:
      ValueError: for a `chunk_size` that is not a positive whole number, no examples,
        for a state or a model that do not go together, and as `ff.standard_error` does.
      TypeError: for something that is no state.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0, 1.0]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> x = jnp.array([[2.0, 1.0]])
      >>> outputs = ff.predictions.linearized_outputs(state, lambda p, x: x @ p, x)
      >>> print(outputs.mean, outputs.variance)  # 2^2 / 4 + 1^2 / 2
      [4.] [1.5]

    References:
      Immer, Korzepa, Bauer, "Improving predictions of Bayesian neural nets via local
      linearization", 2021.
      Kristiadi, Hein, Hennig, "Being Bayesian, even just a bit, fixes overconfidence in
      ReLU networks", 2020.
    """
    names = "state, apply_fn, inputs"
    check_function(apply_fn, f"ff.predictions.linearized_outputs({names})")
    inputs = check_inputs(state, inputs, chunk_size, robust)
    wanted = Wanted(
        variance=True,
        covariance=math.inf if covariance else 0,
        line_of=line_of,
        robust=robust,
        chunk_size=chunk_size,
    )
    return deciding(_compiled, state, apply_fn, inputs, wanted)


def _mixture(state: Any, apply_fn: Callable, inputs: PyTree, wanted: Wanted) -> Outputs:
    weights, members = believed(state, wanted.robust)
    model, line_of = once(apply_fn), wanted.line_of
    found = [raw(moments(one, model, inputs, wanted)) for one in members]
    if len(found) == 1:
        return found[0]
    weights = weights.astype(found[0].variance.dtype)
    means = [one.mean for one in found]
    mean, variance = mixture(weights, means, [one.variance for one in found])
    covariance = line_variance = None
    if line_of is not None:
        pairs = zip(members, means, strict=True)
        lines = [known(line_of, belief).line(outputs) for belief, outputs in pairs]
        spread = [one.line_variance for one in found]
        line_variance = mixture(weights, lines, spread)[1]
    if wanted.covariance:
        within = jnp.stack([jnp.asarray(one.covariance) for one in found])
        away = (jnp.stack(means) - mean[None]).reshape(within.shape[:-1])
        between = away[..., :, None] * away[..., None, :]
        covariance = jnp.tensordot(weights, within + between, 1)
    return Outputs(mean, variance, covariance, line_variance)


# compiled once a model and shape, so that a second call compiles nothing
_compiled = jax.jit(_mixture, static_argnums=(1, 3))
