"""Linear layers, found in any `apply_fn`, and tapped: what enters, what returns."""

from fisherflow_jax.layers import checkpoints as _checkpoints  # noqa: F401
from fisherflow_jax.layers.batch_taps import tap_batch as tap_batch
from fisherflow_jax.layers.finding import find_layers as find_layers
from fisherflow_jax.layers.layer import Layer as Layer
from fisherflow_jax.layers.layer import Layers as Layers
from fisherflow_jax.layers.taps import find_and_tap as find_and_tap
from fisherflow_jax.layers.taps import tap as tap
