"""Linear layers, found in any `apply_fn`, and tapped: what enters, what returns."""

from fisherflow_jax.layers._alone import OneAlone as OneAlone
from fisherflow_jax.layers._alone import Undecided as Undecided
from fisherflow_jax.layers._alone import compared as compared
from fisherflow_jax.layers._alone import moves as moves
from fisherflow_jax.layers._alone import note as note
from fisherflow_jax.layers._alone import one_row as one_row
from fisherflow_jax.layers._finding import deciding as deciding
from fisherflow_jax.layers._finding import find_layers as find_layers
from fisherflow_jax.layers._finding import interaction as interaction
from fisherflow_jax.layers._finding import layers_of as layers_of
from fisherflow_jax.layers._layer import Layer as Layer
from fisherflow_jax.layers._layer import Layers as Layers
from fisherflow_jax.layers._layer import expecting as expecting
from fisherflow_jax.layers._taps import find_and_tap as find_and_tap
from fisherflow_jax.layers._taps import find_and_tap_batch as find_and_tap_batch
from fisherflow_jax.layers._taps import tap as tap
from fisherflow_jax.layers._taps import tap_batch as tap_batch
