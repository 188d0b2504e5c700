"""Likelihoods of classes: categorical (one of C) and bernoulli (yes or no)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax._ground.quadrature import sigmoid_moments
from fisherflow_jax.likelihoods import _categorical_roots as categorical_roots
from fisherflow_jax.likelihoods import _distances as distances
from fisherflow_jax.likelihoods import _likelihood as shared
from fisherflow_jax.likelihoods import _quasi as quasi
from fisherflow_jax.likelihoods._likelihood import (
    LOGIT,
    SOFTMAX,
    Likelihood,
    one_output,
)


def _variance(log_odds: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(log_odds) * jax.nn.sigmoid(-log_odds)


@jax.custom_jvp
def _log_share(log_odds: jax.Array, share: jax.Array) -> jax.Array:
    """`share log p + (1 - share) log(1 - p)`: no digits are lost in either tail."""
    return (share - (log_odds > 0).astype(log_odds.dtype)) * log_odds - jnp.log1p(
        jnp.exp(-jnp.abs(log_odds))
    )


_log_share.defjvps(
    lambda t, _, z, share: (
        t * (share * jax.lax.logistic(-z) - (1 - share) * jax.lax.logistic(z))
    ),
    lambda t, _, z, share: t * z,
)


def _kl_of_classes(logits: jax.Array, other: jax.Array) -> jax.Array:
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


@shared.family
def categorical() -> Likelihood:
    r"""One of C classes, given logits.

    .. math::
      p(y = c \mid z) = p_c = e^{z_c} / \sum_j e^{z_j},

    with output Fisher information :math:`\operatorname{diag}(p) - p p^\top = L L^\top`,
    where :math:`L = \operatorname{diag}(\sqrt p) - p \sqrt p^\top` is the square root
    of the diagonal, centred. It is applied in O(C); no C x C matrix is formed.

    Outputs are logits `(n, ..., C)` with C at least 1; targets are integer classes
    `(n, ...)`. A class below 0 or from C on has log-probability NaN, and a NaN
    gradient. The mean is the vector of probabilities, and the line of class c its
    log-odds :math:`z_c - \log \sum_{j \ne c} e^{z_j}`, finite for saturated logits. One
    class alone is certain: its log-probability is 0, its information 0 and its log-odds
    infinite. A yes-or-no target with one logit is `bernoulli()`.

    Returns:
      A `Likelihood`, the same object for every call.

    Raises:
      ValueError: by `check`, for outputs without classes, targets that are not
        integers, or shapes that do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.categorical()
      >>> logits = jnp.log(jnp.array([[0.2, 0.3, 0.5]]))
      >>> [round(float(p), 3) for p in likelihood.mean(logits)[0]]
      [0.2, 0.3, 0.5]
      >>> round(float(jnp.exp(likelihood.log_prob(logits, jnp.array([2])))[0]), 3)
      0.5

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    name = "categorical"

    def check(outputs: Any, targets: Any) -> None:
        shape = shared.check_outputs(name, outputs)
        if len(shape) == 0 or shape[-1] < 1:
            raise ValueError(
                f"{name}: outputs must be logits of at least 1 class on the last axis, "
                f"got shape {shape}. For a yes-or-no target with one logit, use "
                "bernoulli()."
            )
        if targets is None:
            return
        target_shape, dtype = shared.shape_and_dtype(targets)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"{name}: targets must be integer classes, got dtype {dtype} "
                f"(shape {target_shape}). Give one-hot targets as their argmax."
            )
        rule = "targets must have the shape of the outputs without the axis of classes"
        shared.check_targets(name, shape, shape[:-1], targets, rule)

    def log_prob(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        check(outputs, targets)
        log_p = jax.nn.log_softmax(widen(outputs))
        classes = jnp.asarray(targets)
        if classes.dtype.itemsize < 4:
            # The number of classes may not fit the targets' own type.
            classes = classes.astype(jnp.int32)
        num_classes = log_p.shape[-1]
        possible = (classes >= 0) & (classes < num_classes)
        index = jnp.clip(classes, 0, num_classes - 1)[..., None]
        own = jnp.take_along_axis(log_p, index, -1)[..., 0]
        return shared.nan_outside(possible, own)

    def line(outputs: ArrayLike) -> jax.Array:
        logits = widen(outputs)
        if logits.shape[-1] == 1:
            # A constant: the limit below would have a NaN gradient.
            return jnp.full_like(logits, jnp.inf)
        # Log-odds do not see a shift; large logits would lose their last digits.
        logits = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
        log_p = jax.nn.log_softmax(logits)
        classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        largest = classes == jnp.argmax(logits, -1, keepdims=True).astype(jnp.int32)
        rest = jnp.where(largest, -jnp.inf, logits)
        others = jax.nn.logsumexp(rest, axis=-1, keepdims=True)
        # p <= 1/2 for all but the largest logit, where 1 - p would cancel.
        p = jnp.exp(jnp.where(largest, -jnp.inf, log_p))
        return jnp.where(largest, logits - others, log_p - jnp.log1p(-p))

    def root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        # exp(log p / 2) stays finite, with finite derivatives, where p underflows.
        root_p = jnp.exp(0.5 * jax.nn.log_softmax(widen(outputs)))
        probes = like(probes, root_p)
        projection = jnp.sum(root_p * probes, -1, keepdims=True)
        cotangents = root_p * (probes - root_p * projection)
        return cotangents.astype(jnp.asarray(outputs).dtype)

    return Likelihood(
        name=name,
        log_prob=log_prob,
        mean=lambda outputs: jax.nn.softmax(widen(outputs)),
        variance=lambda outputs: _variance(line(outputs)),
        sample=lambda key, outputs: jax.random.categorical(key, widen(outputs)),
        root=root,
        probe_shape=tuple,
        line=line,
        scale=SOFTMAX,
        support=lambda targets: jnp.asarray(targets) >= 0,
        check=check,
        cholesky=categorical_roots.CHOLESKY,
        diagonal_bound=categorical_roots.DIAGONAL_BOUND,
        low_rank=categorical_roots.low_rank,
        kl=shared.on_wide(_kl_of_classes),
        distance=shared.on_wide(distances.categorical),
    )


@shared.family
def bernoulli(dispersion: ArrayLike | None = 1.0) -> Likelihood:
    r"""Yes or no, given a logit.

    .. math::
      \log p(y \mid z) = y \log \sigma(z) + (1 - y) \log \sigma(-z),

    with output Fisher information :math:`\sigma(z) \sigma(-z)`. A target may be a
    fraction in [0, 1]: a share of successes, whose log-probability is then a
    cross-entropy.

    Outputs are logits `(n, ...)`; targets are 0 or 1, or in between, of the same shape.
    A target outside [0, 1] has log-probability NaN, and a NaN gradient.

    Args:
      dispersion: a number :math:`\phi`: the variance is
        :math:`\phi \sigma(z) \sigma(-z)`, the score and the information are divided by
        it (quasi-binomial), the log-probability is Efron's double binomial. None:
        unknown. The likelihood is then that of unit dispersion; a flow estimates
        :math:`\phi` by Pearson's statistic. A share of k trials has k as its weight,
        and each row is then one observation of the dispersion with
        `ff.fisher_flow(..., weights_are="variance")`. Draws are beta distributed, and
        NaN for a dispersion above one, which no number between 0 and 1 has.

    Returns:
      A `Likelihood`, the same object for equal arguments.

    Raises:
      ValueError: for a dispersion that is not positive; by `check`, for shapes that
        differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.bernoulli()
      >>> float(likelihood.mean(jnp.zeros(1))[0])
      0.5
      >>> likelihoods.bernoulli() is likelihood
      True

    References:
      McCullagh, Nelder, "Generalized Linear Models", 1989.
      Efron, "Double exponential families and their use in generalized linear
      regression", 1986.
    """

    if not quasi.is_one(dispersion):
        return _quasi_binomial(bernoulli(), dispersion)

    def support(targets: ArrayLike) -> jax.Array:
        targets = jnp.asarray(targets)
        if targets.dtype == bool:
            return jnp.ones(targets.shape, bool)
        return (targets >= 0) & (targets <= 1)

    def sample(key: jax.Array, logits: jax.Array) -> jax.Array:
        draws = jax.random.bernoulli(key, jax.nn.sigmoid(logits))
        return draws.astype(logits.dtype)

    def root(logits: jax.Array) -> jax.Array:
        # sqrt(p (1 - p)), of full precision and differentiable at every logit.
        distance = jnp.abs(logits)
        return jnp.exp(-0.5 * distance) / (1 + jnp.exp(-distance))

    parts = support, _log_share, _variance, sample, root, distances.bernoulli
    built = one_output("bernoulli", LOGIT, *parts)

    def expected_log_prob(
        mean: jax.Array, variance: jax.Array, covariance: Any, targets: ArrayLike
    ) -> jax.Array:
        # of a share the cross-entropy to the averaged probability
        found = sigmoid_moments(widen(mean), variance)
        share = like(targets, found.log_mean)
        value = share * found.log_mean + (1 - share) * found.log_rest
        return shared.nan_outside(support(targets), value)

    return built._replace(expected_log_prob=expected_log_prob)


def _quasi_binomial(family: Likelihood, dispersion: ArrayLike | None) -> Likelihood:
    def saturated(share: jax.Array) -> jax.Array:
        return xlogy(share, share) + xlogy(1 - share, 1 - share)

    def pearson(logits: jax.Array, share: jax.Array) -> jax.Array:
        # (y - p)^2 / (p q), of logits that saturate too
        other = 1 - share
        ones = jnp.where(share > 0, share**2 * jnp.exp(-logits), 0)
        zeros = jnp.where(other > 0, other**2 * jnp.exp(logits), 0)
        return jnp.maximum(ones + zeros - 2 * share * other, 0)

    def sample(key: jax.Array, logits: jax.Array, variance: jax.Array) -> jax.Array:
        ratio = variance / _variance(logits)
        return quasi.beta_draws(key, jax.nn.sigmoid(logits), ratio)

    return quasi.with_dispersion(
        family, dispersion, bernoulli, saturated, pearson, sample
    )
