"""Memories: what is believed before a batch, and what is kept of it."""

from fisherflow_jax.memories.adaptive import Report as Report
from fisherflow_jax.memories.adaptive import adaptive as adaptive
from fisherflow_jax.memories.exponential import exponential as exponential
from fisherflow_jax.memories.memory import Memory as Memory
from fisherflow_jax.memories.random_walk import random_walk as random_walk
from fisherflow_jax.memories.stationary import stationary as stationary
from fisherflow_jax.memories.windowed import windowed as windowed
