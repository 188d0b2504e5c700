"""Estimators: which vectors enter at the model's outputs and are squared."""

from fisherflow_jax.estimators._choice import Choice as Choice
from fisherflow_jax.estimators._choice import bind as bind
from fisherflow_jax.estimators._choice import rule as rule
from fisherflow_jax.estimators._derivatives import observed as observed
from fisherflow_jax.estimators._derivatives import (
    squared_gradient as squared_gradient,
)
from fisherflow_jax.estimators._estimator import Estimator as Estimator
from fisherflow_jax.estimators._hutchinson import hutchinson as hutchinson
from fisherflow_jax.estimators._hutchinson import hutchinson_dg as hutchinson_dg
from fisherflow_jax.estimators._hutchinson import hutchinson_rank1 as hutchinson_rank1
from fisherflow_jax.estimators._hutchinson import hutchinson_rankk as hutchinson_rankk
from fisherflow_jax.estimators._hutchinson import hutchinson_sqrt as hutchinson_sqrt
from fisherflow_jax.estimators._probes import gaussian as gaussian
from fisherflow_jax.estimators._probes import rademacher as rademacher
from fisherflow_jax.estimators._squares import empirical as empirical
from fisherflow_jax.estimators._squares import exact as exact
from fisherflow_jax.estimators._squares import monte_carlo as monte_carlo
