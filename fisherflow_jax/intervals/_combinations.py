"""What an interval is of: linear combinations of the parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, trees

PyTree = Any


class Combinations(NamedTuple):
    """`rows @ theta + offsets`; arrays."""

    rows: jax.Array  # (k, d)
    offsets: jax.Array  # (k,)

    def of(self, vector: jax.Array) -> jax.Array:
        return self.rows @ vector + self.offsets


def combinations(
    contrast: PyTree | str | Callable | None, params: PyTree
) -> tuple[Combinations, PyTree]:
    """What is asked for, and the shapes of the result.

    Raises:
      ValueError: for an unknown name, shapes that do not fit, a function that is not
        linear, or a combination that no parameter is in.
    """
    like = jax.eval_shape(lambda: trees.widen(params))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    flat = trees.ravel(zeros)
    if contrast is None or isinstance(contrast, str):
        names = trees.entry_names(params)
        places, shape = _places(contrast, names, like)
        rows = jnp.asarray(np.eye(len(names))[places], flat.dtype)
        return Combinations(rows, jnp.zeros(len(rows), flat.dtype)), shape
    if callable(contrast):
        found = _linear(contrast, zeros)
        shape = jax.eval_shape(contrast, like)
    else:
        rule = (
            "a contrast is a parameter's name, a tree like the parameters, or a linear "
            "function of them"
        )
        trees.check_shapes(contrast, like, rule)
        weights = jax.tree.map(lambda x: jnp.asarray(x, flat.dtype), contrast)
        rows = trees.ravel(weights)[None]
        found, shape = Combinations(rows, jnp.zeros(1, flat.dtype)), flat[0]
    if not checks.holds(jnp.all(jnp.any(found.rows != 0, 1))):
        raise ValueError("a contrast of zeros is of no parameter.")
    return found, shape


def _places(name: str | None, names: list[str], like: PyTree) -> tuple[list, PyTree]:
    if name is None:
        return [*range(len(names))], like
    for leaf_name, leaf in trees.named_leaves(like):
        if name == leaf_name:
            own = [*_under(leaf_name, names)]
            return own, leaf
    if name not in names:
        raise ValueError(f"no parameter has the name {name!r}; they are {names}.")
    return [names.index(name)], jax.ShapeDtypeStruct((), trees.float_dtype(like))


def _under(leaf_name: str, names: list[str]):
    for place, name in enumerate(names):
        if name == leaf_name or name.startswith(f"{leaf_name}["):
            yield place


def _linear(function: Callable, zeros: PyTree) -> Combinations:
    def values(vector: jax.Array) -> jax.Array:
        return trees.ravel(function(trees.unravel(vector, zeros)))

    flat = trees.ravel(zeros)
    slopes = jax.jit(jax.jacrev(values))
    # of any function that is linear, the same wherever they are taken
    steps = jnp.asarray(np.sqrt(np.arange(2, 2 + flat.size)), flat.dtype)
    rows, others = slopes(0.3 * steps), slopes(-0.7 * steps[::-1])
    if not checks.holds(jnp.allclose(rows, others, rtol=1e-5, atol=1e-6)):
        raise ValueError(
            "the contrast is a function that is not linear in the parameters; of those "
            "ff.delta_method has intervals."
        )
    return Combinations(rows, values(flat))
