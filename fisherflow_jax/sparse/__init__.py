"""Linear predictors with very many features, of which a row has a few.

A diagonal flow whose update costs what the rows hold, not what the features are.
"""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.sparse._flow import SparseFlow as SparseFlow
from fisherflow_jax.sparse._flow import flow as flow
from fisherflow_jax.sparse._rows import Rows as Rows
from fisherflow_jax.sparse._rows import from_csr as from_csr
from fisherflow_jax.sparse._state import SparseInfo as SparseInfo
from fisherflow_jax.sparse._state import SparseState as SparseState

show(__name__)
