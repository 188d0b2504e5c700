"""Checks that the examples of a model do not interact: by values, row by row."""

from collections.abc import Callable
from typing import Any

from fisherflow_jax import layers
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, processes, trees

PyTree = Any


def check_examples(apply_fn: Callable, params: PyTree, inputs: PyTree) -> None:
    r"""Checks that a model gives an example in a batch what it gives it alone.

    .. math:: f(\theta, x)_i = f(\theta, x_{i:i+1})_0

    at these values, and at others near them, since zeros (a last layer that starts at
    zero) and rows that are alike hide what depends on them. Estimators, predictions and
    scores run such a model row by row, and one whose examples interact (batch
    statistics, in-batch negatives, graphs whose nodes are examples) on whole batches,
    or not at all. What is found here is kept for `apply_fn` and inputs of these shapes:
    where a program does not show whether its examples interact, they ask no more.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      params: pytree of arrays.
      inputs: leading axis = two or more examples; parts in `ff.Shared` are whole.

    Returns:
      Nothing. Cost: two passes of the batch and of each of its rows, compiled once.

    Raises:
      AssertionError: which rows differ, and by how much; or what is wrong with one
        example alone.
      ValueError: for fewer than two examples, or rows that are all alike; under `jit`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0], [0.0, 1.0]])
      >>> ff.testing.check_examples(lambda p, x: x @ p, jnp.ones(2), x)
      >>> def less_the_first(params, x):
      ...     return (x - x[:1]) @ params
      >>> ff.testing.check_examples(less_the_first, jnp.ones(2), x)
      Traceback (most recent call last):
      AssertionError: examples interact: 2 of 3 rows differ from the same rows alone, by
      up to 5 (rows 1, 2).
    """
    if checks.is_traced((params, inputs)):
        raise ValueError("check_examples compares values, which are not known in jit.")
    params, inputs = processes.fetched((params, inputs))
    params = trees.real_arrays(params, "params")
    inputs = batches.map_inputs(trees.as_array, inputs)
    count = batches.num_examples(batches.as_batch((inputs, None)))
    if count < 2:
        raise ValueError("two or more examples tell whether they interact; got one.")
    found = layers.compared(apply_fn, params, inputs)
    if found.reason is None and found.alike:
        raise ValueError(
            "the rows of the inputs are all alike, so that none could be mistaken for "
            "another: give rows that differ."
        )
    layers.note(apply_fn, params, inputs, found.reason)
    if found.failure is not None:
        raise AssertionError(f"examples interact: apply_fn {found.failure}.")
    if found.rows:
        shown = ", ".join(map(str, found.rows[:5]))
        more = ", ..." if len(found.rows) > 5 else ""
        raise AssertionError(
            f"examples interact: {len(found.rows)} of {count} rows differ from the "
            f"same rows alone, by up to {found.largest:.3g} (rows {shown}{more})."
        )
