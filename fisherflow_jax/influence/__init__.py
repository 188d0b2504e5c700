"""Influence: what removing a row would change, without fitting again."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.influence._effects import Top as Top
from fisherflow_jax.influence._effects import effects as effects
from fisherflow_jax.influence._left_out import LeaveOneOut as LeaveOneOut
from fisherflow_jax.influence._left_out import leave_one_out as leave_one_out
from fisherflow_jax.influence._left_out import leverage as leverage
from fisherflow_jax.influence._left_out import self_influence as self_influence

show(__name__)
