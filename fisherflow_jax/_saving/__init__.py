"""States in files: one file each, of arrays and of what they are arrays of."""

from fisherflow_jax._saving._saving import load as load
from fisherflow_jax._saving._saving import save as save
