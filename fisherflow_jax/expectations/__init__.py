"""Expectations: nodes and weights around a Gaussian, and over targets."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.expectations._targets import OverTargets as OverTargets
from fisherflow_jax.expectations._targets import draws as draws
from fisherflow_jax.expectations._targets import enumeration as enumeration
from fisherflow_jax.expectations._targets import quantiles as quantiles

show(__name__)
