"""Intervals better than Wald's: of few rows and skewed densities, or at all times."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.intervals._corrected import Interval as Interval
from fisherflow_jax.intervals._corrected import corrected as corrected
from fisherflow_jax.intervals._profile import Profile as Profile
from fisherflow_jax.intervals._profile import profile as profile
from fisherflow_jax.intervals._skewed import skewed as skewed
from fisherflow_jax.posteriors import EValue as EValue
from fisherflow_jax.posteriors import anytime as anytime
from fisherflow_jax.posteriors import e_value as e_value

EValue.__module__ = __name__
show(__name__)
