"""Sums of an estimator's informations over many batches."""

from fisherflow_jax.accumulation.loading import Stacked as Stacked
from fisherflow_jax.accumulation.running import accumulate as accumulate
from fisherflow_jax.accumulation.updating import Accumulation as Accumulation
from fisherflow_jax.accumulation.updating import Accumulator as Accumulator
from fisherflow_jax.accumulation.updating import accumulator as accumulator
