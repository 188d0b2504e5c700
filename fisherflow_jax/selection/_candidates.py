r"""Rows of a pool and their kernels, :math:`V_x I^{-1} V_y^\top` and with a target."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax import products
from fisherflow_jax._ground import capacity, checks, linalg, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import (
    Likelihood,
    cholesky_root,
    rank_root,
    root_columns,
)
from fisherflow_jax.model import check_choices, once
from fisherflow_jax.posteriors import Gaussian, check_like

PyTree = Any

# Numbers of rows held at once when no chunk_size is given: 16 MiB in float32.
_ENTRIES = 2**22
# Bytes of a whole pool's rows up to which they are kept, and not made anew: 1 GiB.
_KEPT = 2**30
# Of the memory that there is, what the kernels of a pool may take.
_SHARE = 4


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows of a pool."""

    parts: list[jax.Array]  # leading axis n
    of: Callable[[list], PyTree]  # slices of the parts -> an example
    columns: products.Columns
    rows: products.Rows
    spread: products.Rows | None  # the same rows in I^-1 M I^-1

    @property
    def count(self) -> int:
        return self.parts[0].shape[0]

    def left(self, one: list) -> PyTree:
        """What is kept of one row."""
        return self.rows.left(self.of(one), self.columns)

    @property
    def kinds(self) -> list[products.Rows]:
        return [self.rows] + ([] if self.spread is None else [self.spread])

    def own(self, one: list) -> tuple[jax.Array, Any]:
        """One row with itself: K and Q `(r, r)`."""
        example = self.of(one)
        return _pair([kind.own(example, self.columns) for kind in self.kinds])

    def all_with(self, one: list, lefts: PyTree, size: int) -> tuple[jax.Array, Any]:
        """All rows with one: K and Q `(n, r, r)`; `lefts` None: made anew."""
        example = self.of(one)
        rights = [kind.right(example, self.columns) for kind in self.kinds]

        def some(given: PyTree) -> tuple[jax.Array, Any]:
            left = jax.vmap(self.left)(given) if lefts is None else given
            pairs = zip(self.kinds, rights, strict=True)
            return _pair([kind.column(left, right) for kind, right in pairs])

        return map_slices(some, self.parts if lefts is None else lefts, size)

    def sizes(self, chunk_size: int | None) -> tuple[int, int, int]:
        """Rows at a time, r, and the bytes of what is kept of one row."""
        one = [jax.eval_shape(lambda x: x[0], x) for x in self.parts]

        def shapes(one: list) -> tuple:
            rights = [x.right(self.of(one), self.columns) for x in self.kinds]
            return self.left(one), rights, self.own(one)[0]

        left, rights, kernel = jax.eval_shape(shapes, one)
        largest = max(trees.size(left), trees.size(rights), kernel.size, 1)
        bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(left))
        size = chunk_size or min(max(_ENTRIES // largest, 1), self.count)
        return size, kernel.shape[0], bytes_

    def keeps(self, bytes_of_one: int) -> bool:
        return self.count * bytes_of_one <= _KEPT


def _pair(found: list[jax.Array]) -> tuple[jax.Array, Any]:
    return found[0], found[1] if len(found) > 1 else None


def candidates(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    rank: int | None,
    target: Any,
) -> Candidates:
    """The rows of a pool; `target` is a tuple of one, or empty."""
    model = once(apply_fn)
    products.check_model(belief, model, pool, likelihood)
    parts, of = products.one_by_one(pool)
    columns = functools.partial(root_columns, _rooted(likelihood, belief, rank))
    rows, spread = products.rows_of(belief, model, pool), None
    if target:
        spread = _spread(belief, model, pool, rows, *target)
    return Candidates(parts, of, columns, rows, spread)


def _rooted(likelihood: Likelihood, belief: Gaussian, rank: int | None) -> Likelihood:
    if likelihood.nuisance is not None:
        likelihood = products.known(likelihood, belief)
    if rank is None:
        return cholesky_root(likelihood)
    return rank_root(likelihood, rank)


def _spread(
    belief: Gaussian, model: Callable, pool: PyTree, rows: products.Rows, target: Any
) -> products.Rows:
    mean = belief.mean
    if target is None:
        return products.rows_of(belief, model, pool, lambda vector: vector)
    if ops.is_information(target):
        check_like(jax.eval_shape(ops.diagonal, target, mean), mean)
        middle = functools.partial(ops.matvec, target)
        return products.rows_of(belief, model, pool, middle)
    trees.check_shapes(target, mean, "a target is an information, or like the mean")
    contrast = jax.tree.map(lambda c: jnp.asarray(c, trees.float_dtype(mean)), target)
    solved = ops.solver(belief.information)(contrast)
    one = jax.tree.map(lambda x: x[None], solved)

    def along(example: PyTree, columns: products.Columns) -> jax.Array:
        left = jax.tree.map(lambda x: x[None], rows.left(example, columns))
        return rows.along(left, one)[0, :, 0]

    def own(example: PyTree, columns: products.Columns) -> jax.Array:
        found = along(example, columns)
        return found[:, None] * found[None]

    def pairs(many: PyTree, several: jax.Array) -> jax.Array:
        return linalg.product("nr,ms->nrms", rows.along(many, one)[..., 0], several)

    return rows._replace(right=along, own=own, pairs=pairs)


def check_pool(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    *,
    chunk_size: int | None = None,
    excluded: Any = None,
) -> tuple[Gaussian, np.ndarray | jax.Array]:
    """The Gaussian of the state, and which rows may be chosen, `(n,)`; else raises."""
    check_choices(apply_fn, likelihood)
    products.check_inputs(state, pool, chunk_size)
    refusal = "a bank is several Gaussians, and one is asked what it would learn"
    belief = products.one_belief(state, refusal)
    if likelihood.random_root:
        raise ValueError(
            f"the root of {likelihood} is drawn at random, and a pool is compared by "
            "one that is not: with a key of yours, likelihood._replace("
            "root=lambda z, probes, _: likelihood.root(z, probes, key), "
            "random_root=False)."
        )
    parts = products.one_by_one(pool)[0]
    count = parts[0].shape[0]
    free: Any = np.ones(count, bool)
    if excluded is not None:
        shape, dtype = jnp.shape(excluded), jnp.asarray(excluded).dtype
        if shape != (count,) or dtype.kind != "b":
            raise ValueError(
                f"excluded is one boolean a row of the pool, ({count},); got {dtype} "
                f"of shape {shape}."
            )
        free = ~excluded if not checks.is_concrete(excluded) else ~np.asarray(excluded)
    if checks.is_concrete((parts, free)):
        _check_finite(parts, np.asarray(free))
    return belief, free


def _check_finite(parts: list, free: np.ndarray) -> None:
    bad = np.zeros_like(free)
    for part in map(np.asarray, parts):
        if np.issubdtype(part.dtype, np.inexact):
            bad |= ~np.isfinite(part).reshape((len(part), -1)).all(1)
    bad &= free
    if bad.any():
        raise ValueError(
            f"{bad.sum()} rows of the pool are not finite, the first ones "
            f"{np.flatnonzero(bad)[:5].tolist()}: leave them out, or "
            "excluded=~np.isfinite(pool).all(1)."
        )


def check_fits(wanted: int, what: str, way_out: str) -> None:
    """Raises where arrays would take more than a quarter of what memory there is."""
    limit = capacity.num_bytes()
    if limit is not None and _SHARE * wanted > limit:
        raise ValueError(
            f"{what} would take {wanted:,} bytes, more than a quarter of the "
            f"{limit:,} that there are: {way_out}."
        )


def num_bytes(dtype: Any, *shape: int) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize
