r"""Rows of many examples, kept small, and rectangles of their products.

With V = L^T J the rows of an example, R cotangents pulled back, and a covariance C,
:math:`I^{-1}` or :math:`I^{-1} M I^{-1}`, the products are :math:`V_x C V_y^\top`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.products._layers import LayerCovariances, layer_covariances

PyTree = Any
Columns = Callable[[jax.Array], jax.Array]  # outputs (1, ...) -> cotangents (R, 1, ...)
Middle = Callable[[PyTree], PyTree]  # v -> M v


class Rows(NamedTuple):
    """How rows are kept and multiplied; each function traces, `left` and others map.

    Attributes:
      left: `(example, columns)` -> what is kept of the example's rows V. Examples have
        leading axes of 1; mapped by `jax.vmap`, what is kept has a leading axis n.
      right: `(example, columns)` -> what is kept of `C V^T`, for `pairs`.
      own: `(example, columns)` -> `V C V^T`, `(R, R)`, symmetric.
      pairs: `(left of n, right of m)` -> `V_x C V_y^T`, `(n, R, m, S)`: a rectangle.
      along: `(left of n, vectors)` -> `V_x v`, `(n, R, S)`, of leaves `(S, ...)`.
    """

    left: Callable[[PyTree, Columns], PyTree]
    right: Callable[[PyTree, Columns], PyTree]
    own: Callable[[PyTree, Columns], jax.Array]
    pairs: Callable[[PyTree, PyTree], jax.Array]
    along: Callable[[PyTree, PyTree], jax.Array]

    def column(self, left: PyTree, right: PyTree) -> jax.Array:
        """`V_x C V_y^T`, `(n, R, S)`, with what `right` made of one example."""
        one = jax.tree.map(lambda x: x[None], right)
        return self.pairs(left, one)[:, :, 0]


def factors_of(belief: Gaussian) -> Any:
    """What `rows_of` factorises, arrays for programs that are run again and again.

    None where there is nothing to factorise.
    """
    information = belief.information
    if ops.facts(information).elementwise:
        return None
    return ops.factorise(information, jnp.zeros((), trees.float_dtype(belief.mean)))


def rows_of(
    belief: Gaussian,
    apply_fn: Callable,
    inputs: PyTree,
    middle: Middle | None = None,
    factors: Any = None,
) -> Rows:
    r"""The rows of a model's outputs in the covariance of a belief.

    Scalar, diagonal and Kronecker informations keep what enters and returns to each
    layer, I + R O numbers where a kernel is used once an example and R I O where
    several positions share it, and solve for nothing. All others keep gradients, R d,
    and solve once for each row of `right`; so do models with tied layers.

    Args:
      belief: of which the information is factorised once, where it is called, unless
        `factors` are given.
      apply_fn: `(params, inputs) -> outputs (n, ...)`; the examples do not interact.
      inputs: their shapes are read, of which layers are found.
      middle: `v -> M v` of trees; None: :math:`C = I^{-1}`.
      factors: `factors_of(belief)`.

    The dispersion of the belief is left to the caller.
    """
    found = layer_covariances(belief, apply_fn, inputs, False, factors)
    if found is None:
        return _by_gradients(belief, apply_fn, middle, factors)
    lean = _by_layers(belief, apply_fn, found)
    if middle is None:
        return lean
    # M is no diagonal there: gradients of one example at a time, along all others
    dense = _by_gradients(belief, apply_fn, middle, factors)
    like = jax.eval_shape(lambda: trees.widen(belief.mean))

    def right(example: PyTree, columns: Columns) -> PyTree:
        flat = dense.right(example, columns)
        return jax.vmap(lambda row: trees.unravel(row, like))(flat)

    def pairs(many: PyTree, several: PyTree) -> jax.Array:
        found = jax.lax.map(lambda one: lean.along(many, one), several)
        return jnp.moveaxis(found, 0, 2)

    return lean._replace(right=right, own=dense.own, pairs=pairs)


def _by_layers(belief: Gaussian, apply_fn: Callable, found: LayerCovariances) -> Rows:
    def left(example: PyTree, columns: Columns) -> PyTree:
        outputs, keep = found.tap(apply_fn, belief.mean, example)
        return keep(columns(outputs))

    def own(example: PyTree, columns: Columns) -> jax.Array:
        kept = jax.tree.map(lambda x: x[None], left(example, columns))
        return _symmetric(found.between(kept, kept)[0, :, 0])

    return Rows(left, left, own, found.between, found.along)


def _by_gradients(
    belief: Gaussian, apply_fn: Callable, middle: Middle | None, factors: Any
) -> Rows:
    inverse = ops.solver(belief.information) if factors is None else factors.divide

    def solve(vector: PyTree) -> PyTree:
        solved = inverse(vector)
        return solved if middle is None else inverse(middle(solved))

    def both(example: PyTree, columns: Columns) -> tuple[jax.Array, jax.Array]:
        pulled = gradients(belief.mean, apply_fn, example, columns)
        return trees.ravel(pulled, 1), trees.ravel(jax.vmap(solve)(pulled), 1)

    def own(example: PyTree, columns: Columns) -> jax.Array:
        return _symmetric(linalg.product("rq,sq->rs", *both(example, columns)))

    def left(example: PyTree, columns: Columns) -> jax.Array:
        return both(example, columns)[0]

    def right(example: PyTree, columns: Columns) -> jax.Array:
        return both(example, columns)[1]

    def pairs(many: jax.Array, several: jax.Array) -> jax.Array:
        return linalg.product("nrq,msq->nrms", many, several)

    def along(many: jax.Array, vectors: PyTree) -> jax.Array:
        return linalg.product("nrq,sq->nrs", many, trees.ravel(vectors, 1))

    return Rows(left, right, own, pairs, along)


def gradients(
    mean: PyTree, apply_fn: Callable, example: PyTree, columns: Columns
) -> PyTree:
    """The rows of one example as they are, leaves `(R, *leaf.shape)`."""
    outputs, vjp = jax.vjp(lambda params: apply_fn(params, example), mean)
    return trees.widen(jax.vmap(lambda one: vjp(one)[0])(columns(outputs)))


def _symmetric(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2
