"""Whether predicted probabilities are frequencies: reliability, ECE, MCE."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.metrics import _rows as rows
from fisherflow_jax.metrics._binning import Binning, equal_width

_FIFTEEN = equal_width()


class ReliabilityCurve(NamedTuple):
    """Predicted probability against frequency, each `(num_bins,)`."""

    confidence: jax.Array  # mean predicted probability; NaN where the bin is empty
    accuracy: jax.Array  # share in which the event came true; NaN where it is empty
    num_examples: jax.Array  # that fell into the bin


class _Sums(NamedTuple):
    confidence: jax.Array  # (num_bins,), summed over the bin
    correct: jax.Array
    gap: jax.Array  # of confidence - correct
    number: jax.Array


def reliability_curve(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning = _FIFTEEN,
    mask: jax.Array | None = None,
) -> ReliabilityCurve:
    r"""Predicted probability against observed frequency, bin by bin.

    Of class probabilities the event is that the most probable class is the label, and
    the confidence is its probability. Of probabilities of label 1 the event is label 1:
    `reliability_curve(p[:, c], labels == c)` is the curve of one class c.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      binning: `equal_width(num_bins)` or `equal_mass(num_bins)`, or a `Binning` of your
        own.
      mask: `(n, ...)`, or `(n,)` for whole examples; False is padding and is not read.

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
    sums = _sums(probabilities, labels, binning, mask)
    return ReliabilityCurve(
        sums.confidence / sums.number, sums.correct / sums.number, sums.number
    )


def expected_calibration_error(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning = _FIFTEEN,
    mask: jax.Array | None = None,
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
        own.
      mask: `(n, ...)`, or `(n,)` for whole examples; False is padding and is not read.

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
    sums = _sums(probabilities, labels, binning, mask)
    return jnp.sum(jnp.abs(sums.gap)) / jnp.sum(sums.number)


def maximum_calibration_error(
    probabilities: jax.Array,
    labels: jax.Array,
    *,
    binning: Binning = _FIFTEEN,
    mask: jax.Array | None = None,
) -> jax.Array:
    r"""The largest distance between confidence and accuracy of any bin (MCE).

    .. math:: \max_b \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    over the bins that are not empty. A bin of one example can make it large: bins of
    equal mass are the safer choice.

    Args:
      probabilities: `(n, ..., C)`; or `(n, ...)`, the probability of label 1.
      labels: `(n, ...)`, whole numbers from 0 to C - 1.
      binning: `equal_width(num_bins)` or `equal_mass(num_bins)`, or a `Binning` of your
        own.
      mask: `(n, ...)`, or `(n,)` for whole examples; False is padding and is not read.

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
    sums = _sums(probabilities, labels, binning, mask)
    gaps = jnp.abs(sums.gap) / sums.number
    return jnp.max(jnp.where(sums.number == 0, jnp.zeros_like(gaps), gaps))


def _sums(probabilities, labels, binning: Binning, mask) -> _Sums:
    table, labels, weights, single = rows.classified(probabilities, labels, mask)
    if single:
        confidence, correct = table[:, 1], labels == 1
    else:
        confidence = jnp.max(table, -1)
        correct = jnp.argmax(table, -1).astype(labels.dtype) == labels
    correct = correct.astype(table.dtype)
    bins = binning.assign(confidence, weights != 0)
    # the gap is summed as it is: the difference of two long sums would lose digits
    columns = jnp.stack(
        [confidence, correct, confidence - correct, jnp.ones_like(correct)], -1
    )
    totals = jax.ops.segment_sum(columns * weights[:, None], bins, binning.num_bins)
    return _Sums(*totals.T)
