"""Rows of examples, cotangents pulled back, and their products in a covariance."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.products._checks import believed as believed
from fisherflow_jax.products._checks import check_inputs as check_inputs
from fisherflow_jax.products._checks import check_model as check_model
from fisherflow_jax.products._checks import deciding as deciding
from fisherflow_jax.products._checks import known as known
from fisherflow_jax.products._checks import one_belief as one_belief
from fisherflow_jax.products._checks import one_by_one as one_by_one
from fisherflow_jax.products._layers import LayerCovariance as LayerCovariance
from fisherflow_jax.products._layers import LayerCovariances as LayerCovariances
from fisherflow_jax.products._layers import by_layers as by_layers
from fisherflow_jax.products._layers import layer_covariances as layer_covariances
from fisherflow_jax.products._pulled import Pull as Pull
from fisherflow_jax.products._pulled import Pulled as Pulled
from fisherflow_jax.products._pulled import Puller as Puller
from fisherflow_jax.products._pulled import by_gradients as by_gradients
from fisherflow_jax.products._pulled import root as root
from fisherflow_jax.products._pulled import units as units
from fisherflow_jax.products._rows import Columns as Columns
from fisherflow_jax.products._rows import Rows as Rows
from fisherflow_jax.products._rows import factors_of as factors_of
from fisherflow_jax.products._rows import gradients as gradients
from fisherflow_jax.products._rows import rows_of as rows_of

show(__name__)
