"""Comparing estimators on a model of one's own: measure, tabulate, draw.

On the command line: `fisherflow-estimators`, or `python -m fisherflow_jax.comparison`.
"""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.comparison._comparing import Comparison as Comparison
from fisherflow_jax.comparison._comparing import compare as compare
from fisherflow_jax.comparison._comparing import plot as plot
from fisherflow_jax.comparison._comparing import table as table
from fisherflow_jax.comparison._measurement import Measurement as Measurement
from fisherflow_jax.comparison._measurement import estimate as estimate
from fisherflow_jax.comparison._measurement import load as load
from fisherflow_jax.comparison._measurement import save as save
from fisherflow_jax.comparison._problem import Problem as Problem
from fisherflow_jax.comparison._problem import load_problem as load_problem

show(__name__)
