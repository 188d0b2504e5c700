"""How good is a structure here: errors, ratios and dimensions, in one table."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.diagnostics._errors import RelativeError as RelativeError
from fisherflow_jax.diagnostics._errors import relative_error as relative_error
from fisherflow_jax.diagnostics._errors import trace_ratio as trace_ratio
from fisherflow_jax.diagnostics._table import Row as Row
from fisherflow_jax.diagnostics._table import Table as Table
from fisherflow_jax.diagnostics._table import (
    effective_parameters as effective_parameters,
)
from fisherflow_jax.diagnostics._table import effective_rank as effective_rank
from fisherflow_jax.diagnostics._table import eigenvalues as eigenvalues
from fisherflow_jax.diagnostics._table import table as table
from fisherflow_jax.diagnostics._undetermined import undetermined as undetermined
from fisherflow_jax.posteriors import Direction as Direction

Direction.__module__ = __name__  # of a lower room that the package does not show
show(__name__)
