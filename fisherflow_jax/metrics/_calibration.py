"""Whether predicted probabilities are frequencies: bins, reliability, ECE, MCE."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, counted


class Binning(NamedTuple):
    """A rule that sorts numbers in [0, 1] into bins.

    One is made by `ff.metrics.equal_mass`.

    Attributes:
      assign: `(values (m,), weights (m,))` -> bins `(m,)`, int32 from 0 to num_bins
        - 1; those of weight 0 are padding.
    """

    num_bins: int
    assign: Callable[[jax.Array, jax.Array], jax.Array]


def equal_width(num_bins: int = 15) -> Binning:
    r"""Bins of equal width: bin k holds :math:`(k / B, (k + 1) / B]`, the first also 0.

    Args:
      num_bins: B, at least 1.

    Returns:
      A `Binning`.

    Raises:
      ValueError: if `num_bins` is not a positive whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> values = jnp.array([0.0, 0.25, 0.5, 0.51, 1.0])
      >>> print(metrics.equal_width(2).assign(values, values >= 0))
      [0 0 0 1 1]

    References:
      Guo, Pleiss, Sun, Weinberger, "On calibration of modern neural networks", 2017.
    """
    checks.whole(num_bins, "num_bins")
    # edges are compared, not multiplied with: 0.28 * 25 rounds to above 7
    edges = np.arange(1, num_bins) / num_bins

    def assign(values: jax.Array, weights: jax.Array) -> jax.Array:
        above = values[:, None] > jnp.asarray(edges, values.dtype)[None, :]
        return jnp.sum(above, -1, dtype=jnp.int32)

    return Binning(num_bins, assign)


def equal_mass(num_bins: int = 15) -> Binning:
    r"""Bins of equally many examples, so that none is left to a few of them.

    The value of rank r (the weight of those below it) of n (of all) goes to bin
    :math:`\lfloor B r / n \rfloor`. Without weights, sizes differ by at most
    one where all values do; equal values share a bin, so that the order of the examples
    does not matter, and bins may then be empty.

    Args:
      num_bins: B, at least 1.

    Returns:
      A `Binning`. Cost: a sort.

    Raises:
      ValueError: if `num_bins` is not a positive whole number.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> values = jnp.array([0.9, 0.91, 0.92, 0.99])
      >>> print(metrics.equal_mass(2).assign(values, values >= 0))
      [0 0 1 1]

    References:
      Nguyen, O'Connor, "Posterior calibration and exploratory analysis for natural
      language processing models", 2015.
    """
    checks.whole(num_bins, "num_bins")

    def assign(values: jax.Array, weights: jax.Array) -> jax.Array:
        weights = weights.astype(values.dtype)
        rank = counted.weight_below(values, weights, "left")
        bins = jnp.floor(num_bins * rank / jnp.sum(weights))
        return jnp.clip(bins.astype(jnp.int32), 0, num_bins - 1)

    return Binning(num_bins, assign)


class ReliabilityCurve(NamedTuple):
    """Predicted probability against frequency, each `(num_bins,)`.

    Made by `ff.metrics.reliability_curve`.
    """

    confidence: jax.Array  # mean predicted probability; NaN where the bin is empty
    accuracy: jax.Array  # share in which the event came true; NaN where it is empty
    num_examples: jax.Array  # that fell into the bin: their weights' sum


def reliability_curve(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning | None = None,
    weights: counted.Weights = None,
) -> ReliabilityCurve:
    r"""Predicted probability against observed frequency, bin by bin.

    Of class probabilities the event is that the most probable class is the label, and
    the confidence is its probability. Of probabilities of label 1 the event is label 1:
    `reliability_curve(p[:, c], labels == c)` is the curve of one class c.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      binning: `equal_width(num_bins)` or `equal_mass(num_bins)`, or a `Binning` of your
        own; None: 15 of equal width.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A `ReliabilityCurve(confidence, accuracy, num_examples)` of arrays `(num_bins,)`.

    Raises:
      ValueError: as `accuracy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p, y = jnp.array([0.1, 0.3, 0.8, 0.8]), jnp.array([0, 1, 1, 0])
      >>> curve = metrics.reliability_curve(p, y, binning=metrics.equal_width(2))
      >>> print(curve.confidence, curve.accuracy, curve.num_examples)
      [0.2 0.8] [0.5 0.5] [2. 2.]

    References:
      DeGroot, Fienberg, "The comparison and evaluation of forecasters", 1983.
      Niculescu-Mizil, Caruana, "Predicting good probabilities with supervised
      learning", 2005.
    """
    confidence, correct, _, number = _sums(probabilities, labels, binning, weights)
    return ReliabilityCurve(confidence / number, correct / number, number)


def expected_calibration_error(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning | None = None,
    weights: counted.Weights = None,
) -> jax.Array:
    r"""The mean distance between confidence and accuracy (ECE).

    .. math:: \sum_b \frac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    A finite sample puts a perfectly calibrated model above zero, the more so the more
    bins there are: compare models on the same examples and bins, and read
    `bootstrap(expected_calibration_error, ...)`.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      binning: `equal_width(num_bins)` or `equal_mass(num_bins)`, or a `Binning` of your
        own; None: 15 of equal width.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number from 0 to 1. Cost: one pass over the probabilities, and a sort for bins
      of equal mass.

    Raises:
      ValueError: as `accuracy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p, y = jnp.array([0.1, 0.3, 0.8, 0.8]), jnp.array([0, 1, 1, 0])
      >>> binning = metrics.equal_width(2)
      >>> print(metrics.expected_calibration_error(p, y, binning=binning).round(3))
      0.3

    References:
      Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using
      Bayesian binning", 2015.
      Kumar, Liang, Ma, "Verified uncertainty calibration", 2019.
    """
    *_, gap, number = _sums(probabilities, labels, binning, weights)
    return jnp.sum(jnp.abs(gap)) / jnp.sum(number)


def maximum_calibration_error(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning | None = None,
    weights: counted.Weights = None,
) -> jax.Array:
    r"""The largest distance between confidence and accuracy of any bin (MCE).

    .. math:: \max_b \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    over the bins that are not empty. A bin of one example can make it large: bins of
    equal mass are the safer choice.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      binning: `equal_width(num_bins)` or `equal_mass(num_bins)`, or a `Binning` of your
        own; None: 15 of equal width.
      weights: `(n, ...)`, or `(n,)` for whole examples: at least 0, or booleans; what
        has weight 0, or False, is padding and is not read. None: all count once.

    Returns:
      A number from 0 to 1. Cost: that of `expected_calibration_error`.

    Raises:
      ValueError: as `accuracy` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> p, y = jnp.array([0.1, 0.3, 0.8, 0.8]), jnp.array([0, 0, 1, 0])
      >>> binning = metrics.equal_width(2)
      >>> print(metrics.maximum_calibration_error(p, y, binning=binning).round(3))
      0.3

    References:
      Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using
      Bayesian binning", 2015.
    """
    *_, gap, number = _sums(probabilities, labels, binning, weights)
    gaps = jnp.abs(gap) / number
    return jnp.max(jnp.where(number == 0, jnp.zeros_like(gaps), gaps))


def _sums(probabilities, labels, binning: Binning | None, weights) -> jax.Array:
    """Over each bin, summed: confidence, correct, gap and number, `(4, num_bins)`."""
    binning = equal_width() if binning is None else binning
    table, labels, known, single = counted.classified(probabilities, labels, weights)
    if single:
        confidence, correct = table[:, 1], labels == 1
    else:
        confidence = jnp.max(table, -1)
        correct = jnp.argmax(table, -1).astype(labels.dtype) == labels
    correct = correct.astype(table.dtype)
    bins = binning.assign(confidence, known)
    # the gap is summed as it is: the difference of two long sums would lose digits
    columns = jnp.stack(
        [confidence, correct, confidence - correct, jnp.ones_like(correct)], -1
    )
    return jax.ops.segment_sum(columns * known[:, None], bins, binning.num_bins).T
