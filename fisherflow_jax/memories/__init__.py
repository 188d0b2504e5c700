"""Memories: what is believed before a batch, and what is kept of it."""

from fisherflow_jax.memories._adaptive import ChangeReport as ChangeReport
from fisherflow_jax.memories._adaptive import adaptive as adaptive
from fisherflow_jax.memories._exponential import exponential as exponential
from fisherflow_jax.memories._matern import matern as matern
from fisherflow_jax.memories._memory import Belief as Belief
from fisherflow_jax.memories._memory import Memory as Memory
from fisherflow_jax.memories._memory import Prior as Prior
from fisherflow_jax.memories._memory import Shift as Shift
from fisherflow_jax.memories._memory import Squares as Squares
from fisherflow_jax.memories._memory import Sum as Sum
from fisherflow_jax.memories._memory import age as age
from fisherflow_jax.memories._memory import keeps_prior as keeps_prior
from fisherflow_jax.memories._memory import remembers_all as remembers_all
from fisherflow_jax.memories._random_walk import random_walk as random_walk
from fisherflow_jax.memories._stationary import stationary as stationary
from fisherflow_jax.memories._waiting import waiting as waiting
from fisherflow_jax.memories._windowed import windowed as windowed
