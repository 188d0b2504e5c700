"""What all plots share: where they draw, and how parameters are named."""

from typing import Any

import jax
import numpy as np

from fisherflow_jax._ground import trees

PyTree = Any

GREY = "0.6"


def axes_or_new(ax: Any, height: float | None = None) -> Any:
    """The given Axes, or those of a new figure, of a height in inches.

    Raises:
      ImportError: if matplotlib is needed and missing.
    """
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "ff.plots draws with matplotlib, which is not installed: "
            "pip install matplotlib."
        ) from error
    size = None if height is None else (pyplot.rcParams["figure.figsize"][0], height)
    return pyplot.subplots(layout="constrained", figsize=size)[1]


def finish(ax: Any, label: str | None, legend: str = "best", **texts: Any) -> Any:
    """Writes what is said of the axes, and a legend where there is a label."""
    ax.set(**texts)
    ax.spines[["top", "right"]].set_visible(False)
    if label is not None:
        ax.legend(frameon=False, loc=legend)
    return ax


def columns(
    tree: PyTree, batch_dims: int, name: str, shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Leaves `(*batch, ...)` as one array `(*batch, d)` of float64, of that shape."""
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(tree)]
    if not leaves or any(x.ndim < batch_dims or x.size == 0 for x in leaves):
        raise ValueError(
            f"{name} must be arrays with entries"
            + (" and a leading axis of steps" if batch_dims else "")
            + f"; got shapes {[x.shape for x in leaves]}."
        )
    if len({x.shape[:batch_dims] for x in leaves}) != 1:
        raise ValueError(
            f"{name} must agree in their leading axis; got shapes "
            f"{[x.shape for x in leaves]}."
        )
    flat = np.concatenate([x.reshape((*x.shape[:batch_dims], -1)) for x in leaves], -1)
    return flat if shape is None else same_shape(name, flat, shape)


def ends(
    estimate: PyTree, lower: PyTree, upper: PyTree, batch_dims: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates and both ends of their intervals, as `columns`, of one shape."""
    middle = columns(estimate, batch_dims, "estimate")
    low = columns(lower, batch_dims, "lower", middle.shape)
    return middle, low, columns(upper, batch_dims, "upper", middle.shape)


def names_of(tree: PyTree, names: Any, batch_dims: int, count: int) -> list[str]:
    """One name a parameter: those given, or theirs."""
    if names is None:
        return trees.entry_names(tree, batch_dims)
    flat = [str(name) for leaf in jax.tree.leaves(names) for name in np.ravel(leaf)]
    if len(flat) != count:
        raise ValueError(f"names must be one a parameter ({count}); got {len(flat)}.")
    return flat


def entries(tree: PyTree, chosen: Any) -> np.ndarray:
    """The places of the chosen parameters' entries, in ravelled order."""
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(tree)]
    if chosen is None:
        return np.arange(sum(sizes))
    picked = [bool(x) for x in jax.tree.leaves(trees.chosen(tree, chosen))]
    return np.flatnonzero(np.repeat(picked, sizes))


def same_shape(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values, float)
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}; got {array.shape}.")
    return array
