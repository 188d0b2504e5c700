"""Which data to take: batches of labels, values of single rows, experiments."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.selection._acquisitions import disagreement as disagreement
from fisherflow_jax.selection._acquisitions import entropy as entropy
from fisherflow_jax.selection._acquisitions import information_gain as information_gain
from fisherflow_jax.selection._acquisitions import margin as margin
from fisherflow_jax.selection._acquisitions import (
    predictive_information as predictive_information,
)
from fisherflow_jax.selection._acquisitions import (
    variance_reduction as variance_reduction,
)
from fisherflow_jax.selection._design import Design as Design
from fisherflow_jax.selection._design import design as design
from fisherflow_jax.selection._exchange import exchange as exchange
from fisherflow_jax.selection._greedy import Selection as Selection
from fisherflow_jax.selection._greedy import greedy as greedy
from fisherflow_jax.selection._values import values as values

show(__name__)
