"""What users give in place of arrays of numbers, and what to do about it."""

from typing import Any

import jax
import numpy as np

PyTree = Any

# text, bytes and objects; the moments and spans of time
_NO_NUMBERS = "USOMm"


def check_numbers(tree: PyTree, name: str, keep: Any) -> None:
    """Raises for leaves that no array of numbers can be made of, naming `name`.

    Nodes of which `keep` is true are passed over.

    Raises:
      TypeError: for text, times, columns of these, sparse matrices, nested lists.
    """
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, list) or keep(x)):
        if isinstance(node, list) and _entries(node):
            verb = "are" if node is tree else "hold"
            raise TypeError(
                f"the batch's {name} {verb} a list, which is read as a tree of its "
                f"entries: give one array, numpy.asarray({name})."
            )
    whole = jax.tree.leaves(tree, is_leaf=lambda x: keep(x) or _is_sparse(x))
    for leaf in whole:
        if not keep(leaf):
            _check(leaf, name)


def _check(leaf: Any, name: str) -> None:
    if _is_sparse(leaf):
        raise TypeError(
            f"the batch's {name} hold a sparse matrix ({type(leaf).__name__}): give "
            "rows of numbers, by its .toarray() or .todense()."
        )
    kind = np.asarray(leaf).dtype if isinstance(leaf, str) else _kind(leaf)
    if kind is not None and kind.names is not None:
        raise TypeError(
            f"the batch's {name} are records with fields {kind.names}: give a column a "
            "field, numpy.lib.recfunctions.structured_to_unstructured("
            f"{name})."
        )
    if kind is None or kind.kind not in _NO_NUMBERS:
        return
    if hasattr(leaf, "dtypes") and hasattr(leaf, "columns"):
        kinds = zip(leaf.columns, leaf.dtypes, strict=True)
        wrong = [f"{column!r} ({kind})" for column, kind in kinds if not _adds(kind)]
        raise TypeError(
            f"the batch's {name} have columns that are not plain numbers: "
            f"{', '.join(wrong)}. Code categories as pandas.get_dummies(data, "
            "dtype=float), truth values and numbers of pandas' own types (Int64) by "
            ".astype(float), dates as a number of days."
        )
    raise TypeError(
        f"the batch's {name} are not numbers but {kind}: code labels as "
        "numpy.unique(labels, return_inverse=True)[1], and numbers held as objects "
        "become numbers by .astype(float)."
    )


def _entries(node: list) -> bool:
    """Whether a list has numbers or text alone, however deep."""
    leaves = jax.tree.leaves(node)
    return bool(leaves) and all(map(np.isscalar, leaves))


def _kind(leaf: Any) -> np.dtype | None:
    """The dtype of an array or of a table's rows; None: JAX decides what it is."""
    table = np.asarray(leaf) if hasattr(leaf, "dtypes") else leaf
    kind = getattr(table, "dtype", None)
    return kind if isinstance(kind, np.dtype) else None


def _is_sparse(node: Any) -> bool:
    return hasattr(node, "todense") or hasattr(node, "toarray")


def _adds(kind: Any) -> bool:
    """Whether a table with such a column is an array of numbers."""
    return isinstance(kind, np.dtype) and kind.kind in "iuf"
