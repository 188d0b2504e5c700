"""Estimators: which vectors enter at the model's outputs and are squared."""

from fisherflow_jax.estimators.estimator import Estimator as Estimator
from fisherflow_jax.estimators.exact import exact as exact
from fisherflow_jax.estimators.observed import observed as observed
from fisherflow_jax.estimators.scores import empirical as empirical
from fisherflow_jax.estimators.scores import monte_carlo as monte_carlo
from fisherflow_jax.estimators.squared_gradient import (
    squared_gradient as squared_gradient,
)
