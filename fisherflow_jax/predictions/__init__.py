"""Predictions with their uncertainty, by linearising the model at the mean."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.predictions._joint import Joint as Joint
from fisherflow_jax.predictions._joint import joint as joint
from fisherflow_jax.predictions._links import Averaged as Averaged
from fisherflow_jax.predictions._links import Link as Link
from fisherflow_jax.predictions._links import laplace_bridge as laplace_bridge
from fisherflow_jax.predictions._links import log_normal as log_normal
from fisherflow_jax.predictions._links import output_samples as output_samples
from fisherflow_jax.predictions._links import plug_in as plug_in
from fisherflow_jax.predictions._links import probit as probit
from fisherflow_jax.predictions._outputs import linearized_outputs as linearized_outputs
from fisherflow_jax.predictions._prediction import Prediction as Prediction
from fisherflow_jax.predictions._prediction import (
    observation_interval as observation_interval,
)
from fisherflow_jax.predictions._prediction import predict as predict
from fisherflow_jax.predictions._quadrature import quadrature as quadrature
from fisherflow_jax.predictions._streaming import Outputs as Outputs
from fisherflow_jax.predictions._top_tokens import TopTokens as TopTokens
from fisherflow_jax.predictions._top_tokens import top_tokens as top_tokens
from fisherflow_jax.predictions._weight_samples import WeightSamples as WeightSamples
from fisherflow_jax.predictions._weight_samples import weight_samples as weight_samples

Prediction.__module__ = "fisherflow_jax"
show(__name__)
