"""Sums of an estimator's informations over many batches."""

from fisherflow_jax.accumulation._feeding import Saving as Saving
from fisherflow_jax.accumulation._feeding import Source as Source
from fisherflow_jax.accumulation._feeding import drive as drive
from fisherflow_jax.accumulation._feeding import unaliased as unaliased
from fisherflow_jax.accumulation._loading import Stacked as Stacked
from fisherflow_jax.accumulation._loading import as_stack as as_stack
from fisherflow_jax.accumulation._loading import check_loader as check_loader
from fisherflow_jax.accumulation._loading import converted as converted
from fisherflow_jax.accumulation._loading import counted as counted
from fisherflow_jax.accumulation._loading import each_batch as each_batch
from fisherflow_jax.accumulation._loading import with_bar as with_bar
from fisherflow_jax.accumulation._running import accumulate as accumulate
from fisherflow_jax.accumulation._spreading import global_batches as global_batches
from fisherflow_jax.accumulation._spreading import laid_out as laid_out
from fisherflow_jax.accumulation._updating import Accumulation as Accumulation
from fisherflow_jax.accumulation._updating import Accumulator as Accumulator
from fisherflow_jax.accumulation._updating import accumulator as accumulator
from fisherflow_jax.accumulation._updating import gathered as gathered
