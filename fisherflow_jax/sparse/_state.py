"""The two sums that a sparse flow keeps, and what it believes by them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.structures import Diagonal, Scalar


class SparseState(NamedTuple):
    r"""A diagonal belief, as sums that only the features of a batch add to.

    Made by `ff.sparse.flow`.

    With the prior's precision :math:`I_0` and mean :math:`m_0`,

    .. math:: J = I - I_0, \quad b = I (m - m_0)

    are linear in what the batches add, and fade by one number, which stands apart: what
    is stored is to be multiplied by `exp(log_scale)`.

    Attributes:
      curvature: `(num_features,)`, J; with `rate`, the sum of squared scores.
      shift: `(num_features,)`, b.
      log_scale: `()`, at most zero.
      prior_mean: `()` or `(num_features,)`.
      prior_entries: `()` or `(num_features,)`, of the prior's precision.
      l1: `()`, by which |b| is shortened where a mean is read.
      rate: `()`, of FTRL-Proximal; None: J is the expected information.
      memory: the memory's storage.
      count: `()`, effective observations.
      step: `()` int32, updates taken in.
      num_skipped: `()` int32, batches refused for a result that is not finite.
      rows_skipped: `()` int32, rows left out.
    """

    curvature: jax.Array
    shift: jax.Array
    log_scale: jax.Array
    prior_mean: jax.Array
    prior_entries: jax.Array
    l1: jax.Array
    rate: jax.Array | None
    memory: Any
    count: jax.Array  # type: ignore[assignment]
    step: jax.Array
    num_skipped: jax.Array
    rows_skipped: jax.Array

    @property
    def mean(self) -> jax.Array:
        """`(num_features,)`; computed of all features when asked for."""
        return self._read(self.curvature, self.shift).mean

    @property
    def information(self) -> Diagonal:
        """Of `(num_features,)` entries, prior included; computed when asked for.

        Raises:
          ValueError: with `rate`, by which it is none.
        """
        check_expected(self)
        return Diagonal(self._read(self.curvature, self.shift).information)

    @property
    def prior_precision(self) -> Diagonal | Scalar:
        """The prior's part of the information."""
        entries = self.prior_entries
        return Diagonal(entries) if entries.ndim else Scalar(entries)

    def at(self, indices: jax.Array) -> "Entries":
        """What is believed of some features, `indices.shape`; of padding, the prior."""
        curvature, shift = (
            x.at[indices].get(mode="fill", fill_value=0)
            for x in (self.curvature, self.shift)
        )
        return self._read(curvature, shift, indices)

    def _read(self, curvature: Any, shift: Any, indices: Any = None) -> "Entries":
        scale = jnp.exp(self.log_scale)
        origin, precision = self.prior_mean, self.prior_entries
        if indices is not None:
            origin, precision = (
                x.at[indices].get(mode="fill", fill_value=1) if x.ndim else x
                for x in (origin, precision)
            )
        curvature, shift = curvature * scale, shift * scale
        information = curvature
        if self.rate is not None:
            information = jnp.sqrt(curvature) / self.rate
        information = precision + information
        kept = jnp.sign(shift) * jnp.maximum(jnp.abs(shift) - self.l1, 0)
        mean = jnp.broadcast_to(origin + kept / information, shift.shape)
        return Entries(mean, information, curvature, origin)


class Entries(NamedTuple):
    """What is believed of some features, all of one shape but the origin."""

    mean: jax.Array
    information: jax.Array
    curvature: jax.Array  # or the sum of squared scores
    origin: jax.Array


class SparseInfo(NamedTuple):
    """What an update reports. Made by `ff.sparse.flow`.

    Attributes:
      log_likelihood: `()`, of the batch, each row at the mean before it: prequential.
      output: `(n,)`, each row's linear predictor at the mean before the batch.
      variance: `(n,)`, its variance then.
      rows_skipped: `()` int32, the batch's bad rows.
      skipped: `()` bool: a result was not finite, nothing moved.
      missing: `()` bool: all weights were zero, only the memory moved on.
    """

    log_likelihood: jax.Array
    output: jax.Array
    variance: jax.Array
    rows_skipped: jax.Array
    skipped: jax.Array
    missing: jax.Array


def check_expected(state: SparseState) -> None:
    """Raises where the state keeps the root of summed squared scores."""
    if state.rate is not None:
        raise ValueError(
            "with a rate the flow keeps roots of summed squared scores, which are no "
            "information: there are no intervals and no draws by it. Build the flow "
            "without a rate."
        )
