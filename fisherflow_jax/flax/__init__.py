"""For flax: a training state that passes the batch on to the optimiser."""

from fisherflow_jax.flax._train_state import TrainState as TrainState
