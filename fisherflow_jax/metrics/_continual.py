"""How well a sequence of tasks was learned, and how much of it was kept."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Continual(NamedTuple):
    """What a table of accuracies says; each `()`. Made by `ff.metrics.continual`.

    Attributes:
      average: over all tasks, at the end.
      backward_transfer: the mean change of earlier tasks since each was learned;
        negative: forgotten.
      forward_transfer: the mean gain of tasks before they were learned over the
        untrained model; None without its accuracies.
      forgetting: the mean loss of earlier tasks since each was at its best.
    """

    average: jax.Array
    backward_transfer: jax.Array
    forward_transfer: jax.Array | None
    forgetting: jax.Array


def continual(
    accuracies: jax.typing.ArrayLike, untrained: jax.typing.ArrayLike | None = None
) -> Continual:
    r"""Average accuracy, transfer and forgetting over a sequence of tasks.

    With :math:`R_{ij}` the accuracy on task j after training on task i:

    .. math:: \tfrac1T \sum_j R_{Tj}, \quad
       \tfrac1{T-1} \sum_{j<T} (R_{Tj} - R_{jj}), \quad
       \tfrac1{T-1} \sum_{j>1} (R_{j-1,j} - r_j), \quad
       \tfrac1{T-1} \sum_{j<T} (\max_{i} R_{ij} - R_{Tj})

    Args:
      accuracies: R, `(T, T)`, of two tasks or more; any score of which more is better.
        Entries above the first superdiagonal enter `forgetting` alone.
      untrained: r, `(T,)`, the accuracies before any training.

    Returns:
      A `Continual`.

    Raises:
      ValueError: for other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import metrics
      >>> table = jnp.array([[0.9, 0.2], [0.6, 0.8]])
      >>> found = metrics.continual(table, untrained=jnp.array([0.1, 0.1]))
      >>> print(*(x.round(2) for x in found))
      0.7 -0.3 0.1 0.3

    References:
      Lopez-Paz, Ranzato, "Gradient episodic memory for continual learning", 2017.
      Chaudhry et al., "Riemannian walk for incremental learning", 2018.
    """
    table = jnp.asarray(accuracies)
    count = len(table) if table.ndim else 0
    if table.shape != (count, count) or count < 2:
        raise ValueError(
            "accuracies are a row after each task with a column for each task, two of "
            f"them or more; got shape {table.shape}."
        )
    learned, last = jnp.diagonal(table), table[-1]
    forward = None
    if untrained is not None:
        before = jnp.asarray(untrained)
        if before.shape != (count,):
            raise ValueError(
                f"untrained has an accuracy for each of {count} tasks; got shape "
                f"{before.shape}."
            )
        forward = jnp.mean(jnp.diagonal(table, 1) - before[1:])
    return Continual(
        average=jnp.mean(last),
        backward_transfer=jnp.mean((last - learned)[:-1]),
        forward_transfer=forward,
        forgetting=jnp.mean((jnp.max(table, 0) - last)[:-1]),
    )
