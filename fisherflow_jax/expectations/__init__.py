"""Expectations: nodes and weights around a Gaussian, and over targets."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.expectations._gaussian import Expectation as Expectation
from fisherflow_jax.expectations._gaussian import at_mean as at_mean
from fisherflow_jax.expectations._gaussian import cubature as cubature
from fisherflow_jax.expectations._gaussian import hermite as hermite
from fisherflow_jax.expectations._gaussian import monte_carlo as monte_carlo
from fisherflow_jax.expectations._gaussian import outputs as outputs
from fisherflow_jax.expectations._gaussian import sigma_points as sigma_points
from fisherflow_jax.expectations._targets import OverTargets as OverTargets
from fisherflow_jax.expectations._targets import draws as draws
from fisherflow_jax.expectations._targets import enumeration as enumeration
from fisherflow_jax.expectations._targets import quantiles as quantiles

show(__name__)
