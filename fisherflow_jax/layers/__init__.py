"""Linear layers, found in any `apply_fn`, and tapped: what enters, what returns."""

from fisherflow_jax.layers import _checkpoints  # noqa: F401
from fisherflow_jax.layers._batch_taps import tap_batch as tap_batch
from fisherflow_jax.layers._finding import find_layers as find_layers
from fisherflow_jax.layers._inputs import expecting as expecting
from fisherflow_jax.layers._layer import Layer as Layer
from fisherflow_jax.layers._layer import Layers as Layers
from fisherflow_jax.layers._taps import find_and_tap as find_and_tap
from fisherflow_jax.layers._taps import tap as tap
