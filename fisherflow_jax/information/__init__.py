"""Operations on Fisher information, the same for every structure.

An information is a positive semi-definite operator on parameter space, always a sum
over observations. Its type says in which structure it is kept (see
`fisherflow_jax.structures`), and decides which implementation an operation calls.
Vectors are pytrees shaped like the parameters. Operations that create vectors or need
the number of parameters take a template `like` (a tree with the parameters' shapes);
only the scalar structure, which stores no shape, needs it.
"""

from fisherflow_jax.information._basis import Columns as Columns
from fisherflow_jax.information._basis import Floored as Floored
from fisherflow_jax.information._basis import Parameters as Parameters
from fisherflow_jax.information._basis import Parts as Parts
from fisherflow_jax.information._basis import Spectral as Spectral
from fisherflow_jax.information._basis import floored as floored
from fisherflow_jax.information._basis import nothing_to_spread as nothing_to_spread
from fisherflow_jax.information._basis import raised_along as raised_along
from fisherflow_jax.information._columns import ByColumns as ByColumns
from fisherflow_jax.information._columns import ColumnBlocks as ColumnBlocks
from fisherflow_jax.information._columns import by_columns as by_columns
from fisherflow_jax.information._columns import conditional_mean as conditional_mean
from fisherflow_jax.information._derived import Unfactorised as Unfactorised
from fisherflow_jax.information._derived import Whitener as Whitener
from fisherflow_jax.information._derived import check_like as check_like
from fisherflow_jax.information._derived import check_prior as check_prior
from fisherflow_jax.information._derived import color as color
from fisherflow_jax.information._derived import determinant as determinant
from fisherflow_jax.information._derived import effective as effective
from fisherflow_jax.information._derived import eigenvalues as eigenvalues
from fisherflow_jax.information._derived import factored as factored
from fisherflow_jax.information._derived import factorise as factorise
from fisherflow_jax.information._derived import parts as parts
from fisherflow_jax.information._derived import sample as sample
from fisherflow_jax.information._derived import whiten as whiten
from fisherflow_jax.information._derived import whitener as whitener
from fisherflow_jax.information._estimable import Directions as Directions
from fisherflow_jax.information._estimable import efficient as efficient
from fisherflow_jax.information._estimable import is_estimable as is_estimable
from fisherflow_jax.information._estimable import null_directions as null_directions
from fisherflow_jax.information._operations import LARGEST_DENSE as LARGEST_DENSE
from fisherflow_jax.information._operations import Facts as Facts
from fisherflow_jax.information._operations import add as add
from fisherflow_jax.information._operations import add_to as add_to
from fisherflow_jax.information._operations import conform as conform
from fisherflow_jax.information._operations import dense_matrix as dense_matrix
from fisherflow_jax.information._operations import diagonal as diagonal
from fisherflow_jax.information._operations import facts as facts
from fisherflow_jax.information._operations import fuse as fuse
from fisherflow_jax.information._operations import inverse as inverse
from fisherflow_jax.information._operations import inverse_diagonal as inverse_diagonal
from fisherflow_jax.information._operations import is_finite as is_finite
from fisherflow_jax.information._operations import is_information as is_information
from fisherflow_jax.information._operations import logdet as logdet
from fisherflow_jax.information._operations import matvec as matvec
from fisherflow_jax.information._operations import plain as plain
from fisherflow_jax.information._operations import propagate as propagate
from fisherflow_jax.information._operations import provides as provides
from fisherflow_jax.information._operations import quadratic_form as quadratic_form
from fisherflow_jax.information._operations import rounded as rounded
from fisherflow_jax.information._operations import sandwich as sandwich
from fisherflow_jax.information._operations import scale as scale
from fisherflow_jax.information._operations import shapes as shapes
from fisherflow_jax.information._operations import solve as solve
from fisherflow_jax.information._operations import solver as solver
from fisherflow_jax.information._operations import spectral as spectral
from fisherflow_jax.information._operations import squares as squares
from fisherflow_jax.information._operations import to_dense as to_dense
from fisherflow_jax.information._operations import total as total
from fisherflow_jax.information._operations import trace as trace
from fisherflow_jax.information._places import embed as embed
from fisherflow_jax.information._places import restrict as restrict
from fisherflow_jax.information._regularised import Regularised as Regularised
from fisherflow_jax.information._regularised import regularised as regularised
from fisherflow_jax.information._regularised import resolved as resolved
