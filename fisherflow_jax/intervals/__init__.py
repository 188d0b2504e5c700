"""Intervals better than Wald's, where rows are few and densities are skewed."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.intervals._corrected import Interval as Interval
from fisherflow_jax.intervals._corrected import corrected as corrected
from fisherflow_jax.intervals._profile import Profile as Profile
from fisherflow_jax.intervals._profile import profile as profile
from fisherflow_jax.intervals._skewed import skewed as skewed

show(__name__)
