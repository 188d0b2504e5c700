"""A sequence of tasks: what is known of earlier ones holds the parameters of later."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.continual._consolidate import consolidate as consolidate
from fisherflow_jax.continual._extend import extend as extend
from fisherflow_jax.continual._penalty import ElasticPenaltyState as ElasticPenaltyState
from fisherflow_jax.continual._penalty import add_elastic_penalty as add_elastic_penalty
from fisherflow_jax.continual._penalty import elastic_penalty as elastic_penalty

show(__name__)
