"""Smaller models from what is known of them: pruning, rounding, bits."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.compression._allocate import Allocation as Allocation
from fisherflow_jax.compression._allocate import allocate_bits as allocate_bits
from fisherflow_jax.compression._mask import mask as mask
from fisherflow_jax.compression._mask import saliency as saliency
from fisherflow_jax.compression._prune import Compressed as Compressed
from fisherflow_jax.compression._prune import keep_zeros as keep_zeros
from fisherflow_jax.compression._prune import prune as prune
from fisherflow_jax.compression._round import Rounded as Rounded
from fisherflow_jax.compression._round import round_to_grid as round_to_grid

show(__name__)
