"""The geometry of models: metrics, connections, divergences and distances."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.geometry._divergences import Geometry as Geometry
from fisherflow_jax.geometry._divergences import fisher_divergence as fisher_divergence
from fisherflow_jax.geometry._divergences import from_divergence as from_divergence
from fisherflow_jax.geometry._divergences import kl as kl
from fisherflow_jax.geometry._metric import jeffreys as jeffreys
from fisherflow_jax.geometry._metric import metric as metric
from fisherflow_jax.geometry._metric import pullback as pullback

show(__name__)
