"""Operations on Fisher information, the same for every structure.

An information is a positive semi-definite operator on parameter space, always a sum
over observations. Its type says in which structure it is kept (see
`fisherflow_jax.structures`), and decides which implementation an operation calls.
Vectors are pytrees shaped like the parameters. Operations that create vectors or need
the number of parameters take a template `like` (a tree with the parameters' shapes);
only the scalar structure, which stores no shape, needs it.
"""

from fisherflow_jax.information._operations import add as add
from fisherflow_jax.information._operations import add_to as add_to
from fisherflow_jax.information._operations import conform as conform
from fisherflow_jax.information._operations import diagonal as diagonal
from fisherflow_jax.information._operations import fuse as fuse
from fisherflow_jax.information._operations import inverse as inverse
from fisherflow_jax.information._operations import inverse_diagonal as inverse_diagonal
from fisherflow_jax.information._operations import logdet as logdet
from fisherflow_jax.information._operations import matvec as matvec
from fisherflow_jax.information._operations import plain as plain
from fisherflow_jax.information._operations import propagate as propagate
from fisherflow_jax.information._operations import quadratic_form as quadratic_form
from fisherflow_jax.information._operations import sample as sample
from fisherflow_jax.information._operations import sandwich as sandwich
from fisherflow_jax.information._operations import scale as scale
from fisherflow_jax.information._operations import solve as solve
from fisherflow_jax.information._operations import solver as solver
from fisherflow_jax.information._operations import to_dense as to_dense
from fisherflow_jax.information._operations import total as total
from fisherflow_jax.information._operations import trace as trace
