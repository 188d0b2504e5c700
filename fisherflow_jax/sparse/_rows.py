"""Rows of a sparse matrix, all with the same number of places."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, processes


class Rows(NamedTuple):
    """Rows with at most k entries that are not zero.

    An id that stands twice in a row counts as two features; `from_csr` adds them up.

    Attributes:
      indices: `(n, k)` whole numbers from 0 to num_features; num_features is padding.
      values: `(n, k)`, of any value where the index is padding.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> rows = ff.sparse.Rows(
      ...     jnp.array([[0, 3], [2, 4]]), jnp.ones((2, 2))
      ... )  # of four: 4 pads
      >>> rows.indices.shape
      (2, 2)
    """

    indices: Any
    values: Any


def from_csr(matrix: Any, *, width: int | None = None) -> Rows:
    """The rows of a scipy sparse matrix, padded to one width.

    Args:
      matrix: anything with scipy's `tocsr()`, `(n, num_features)`. Entries at one place
        are added up.
      width: places a row; None: as many as the fullest row has. Give it where batches
        follow each other, so that all have one shape.

    Returns:
      `Rows` of numpy arrays `(n, width)`; values in float32 or wider.

    Raises:
      TypeError: for what is no sparse matrix.
      ValueError: for a row with more entries than the width, naming the first.

    Example:
      >>> import fisherflow_jax as ff
      >>> import numpy as np
      >>> from scipy.sparse import csr_matrix
      >>> matrix = csr_matrix(np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
      >>> rows = ff.sparse.from_csr(matrix)
      >>> print(rows.indices.tolist(), rows.values.tolist())  # 3: nothing
      [[1, 3], [0, 2]] [[2.0, 0.0], [1.0, 3.0]]
    """
    if not hasattr(matrix, "tocsr"):
        raise TypeError(
            "from_csr takes a scipy sparse matrix; got "
            f"{checks.described(matrix)}. Of a dense one, scipy.sparse.csr_matrix(x)."
        )
    matrix = matrix.tocsr(copy=True)
    matrix.sum_duplicates()
    counts = np.diff(matrix.indptr)
    fullest = int(counts.max(initial=0))
    width = (
        fullest if width is None else checks.whole(width, "width", of="places a row")
    )
    if fullest > width:
        row = int(np.argmax(counts > width))
        raise ValueError(
            f"row {row} has {counts[row]} entries, more than width={width}; the "
            f"fullest row has {fullest}."
        )
    count, num_features = matrix.shape
    kind = np.result_type(matrix.data.dtype, np.float32)
    indices = np.full((count, width), num_features, np.int32)
    values = np.zeros((count, width), kind)
    used = np.arange(width) < counts[:, None]
    indices[used], values[used] = matrix.indices, matrix.data
    return Rows(indices, values)


def checked(rows: Any) -> Rows:
    """The rows as arrays, of right shapes and types."""
    if not isinstance(rows, Rows):
        raise TypeError(
            "inputs of a sparse flow are ff.sparse.Rows(indices, values); got "
            f"{checks.described(rows)}. Of a scipy matrix: ff.sparse.from_csr."
        )
    indices, values = jnp.asarray(rows.indices), jnp.asarray(rows.values)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices are whole numbers; got {indices.dtype}.")
    if indices.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            "indices and values are both (n, k); got shapes "
            f"{indices.shape} and {values.shape}."
        )
    return Rows(indices, values)


def told(rows: Rows, num_features: int) -> str | None:
    """The first index that is none, in words; None: all are some."""
    known = checks.readable(rows.indices)
    if checks.holds((known >= 0) & (known <= num_features)):
        return None
    indices = processes.on_host(rows.indices)
    row, place = map(int, np.argwhere((indices < 0) | (indices > num_features))[0])
    return (
        f"indices[{row}, {place}] = {indices[row, place]}, where features are 0 to "
        f"{num_features - 1}, and {num_features} is padding"
    )
