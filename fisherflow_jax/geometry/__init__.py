"""The geometry of models: metrics, connections, divergences and distances."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.geometry._bounds import cramer_rao as cramer_rao
from fisherflow_jax.geometry._distance import distance as distance
from fisherflow_jax.geometry._distance import length as length
from fisherflow_jax.geometry._divergences import Geometry as Geometry
from fisherflow_jax.geometry._divergences import fisher_divergence as fisher_divergence
from fisherflow_jax.geometry._divergences import from_divergence as from_divergence
from fisherflow_jax.geometry._divergences import kl as kl
from fisherflow_jax.geometry._flow import Flowed as Flowed
from fisherflow_jax.geometry._flow import natural_gradient_flow as natural_gradient_flow
from fisherflow_jax.geometry._geodesics import Geodesic as Geodesic
from fisherflow_jax.geometry._geodesics import acceleration as acceleration
from fisherflow_jax.geometry._geodesics import exp as exp
from fisherflow_jax.geometry._logarithm import Logarithm as Logarithm
from fisherflow_jax.geometry._logarithm import log as log
from fisherflow_jax.geometry._metric import jeffreys as jeffreys
from fisherflow_jax.geometry._metric import metric as metric
from fisherflow_jax.geometry._metric import pullback as pullback

show(__name__)
