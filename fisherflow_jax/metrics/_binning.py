"""Into which bin a predicted probability falls."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Binning(NamedTuple):
    """A rule that sorts numbers in [0, 1] into bins."""

    num_bins: int
    assign: Callable[[jax.Array, jax.Array], jax.Array]
    """`(values (m,), used (m,) bool)` -> bins `(m,)`, int32 from 0 to num_bins - 1."""


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
    _check(num_bins)
    # edges are compared, not multiplied with: 0.28 * 25 rounds to above 7
    edges = np.arange(1, num_bins) / num_bins

    def assign(values: jax.Array, used: jax.Array) -> jax.Array:
        del used
        above = values[:, None] > jnp.asarray(edges, values.dtype)[None, :]
        return jnp.sum(above, -1, dtype=jnp.int32)

    return Binning(num_bins, assign)


def equal_mass(num_bins: int = 15) -> Binning:
    r"""Bins of equally many examples, so that none is left to a few of them.

    The value of rank r (how many are below it) of n goes to bin
    :math:`\lfloor B r / n \rfloor`. Sizes differ by at most one where all values do;
    equal values share a bin, so that the order of the examples does not matter, and
    bins may then be empty.

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
    _check(num_bins)

    def assign(values: jax.Array, used: jax.Array) -> jax.Array:
        ordered = jnp.sort(jnp.where(used, values, jnp.inf))
        rank = jnp.searchsorted(ordered, values).astype(jnp.int32)
        count = jnp.maximum(jnp.sum(used, dtype=jnp.int32), 1)
        return jnp.minimum(num_bins * rank // count, num_bins - 1)

    return Binning(num_bins, assign)


def _check(num_bins: int) -> None:
    if not isinstance(num_bins, int) or num_bins < 1:
        raise ValueError(f"num_bins must be a positive whole number; got {num_bins!r}.")
