"""Comparing estimators on a model of one's own: measure, tabulate, draw.

On the command line: `fisherflow-estimators`, or `python -m fisherflow_jax.comparison`.
"""

from fisherflow_jax.comparison.comparing import Comparison as Comparison
from fisherflow_jax.comparison.comparing import compare as compare
from fisherflow_jax.comparison.comparing import table as table
from fisherflow_jax.comparison.estimating import estimate as estimate
from fisherflow_jax.comparison.measurement import Measurement as Measurement
from fisherflow_jax.comparison.measurement import load as load
from fisherflow_jax.comparison.measurement import save as save
from fisherflow_jax.comparison.plotting import plot as plot
from fisherflow_jax.comparison.problem import Problem as Problem
from fisherflow_jax.comparison.problem import load_problem as load_problem
