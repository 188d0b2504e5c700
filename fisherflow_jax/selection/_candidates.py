r"""Rows of a pool and their kernels, :math:`V_x I^{-1} V_y^\top` and with a target."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import products
from fisherflow_jax._ground import capacity, checks, processes, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import (
    Likelihood,
    cholesky_root,
    rank_root,
    root_columns,
)
from fisherflow_jax.model import check_choices, once
from fisherflow_jax.posteriors import Gaussian
from fisherflow_jax.selection._acquisitions import Gain

PyTree = Any

# Numbers of rows held at once when no chunk_size is given: 16 MiB in float32.
_ENTRIES = 2**22
# Of the memory that there is, what the kernels of a pool may take.
_SHARE = 4


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The rows of a pool."""

    parts: list[jax.Array]  # leading axis n
    of: Callable[[list], PyTree]  # slices of the parts -> an example
    columns: products.Columns
    kinds: list[products.Rows]  # in I^-1, and in I^-1 M I^-1 where there is a target

    def left(self, one: list) -> PyTree:
        """What is kept of one row."""
        return self.kinds[0].left(self.of(one), self.columns)

    def own(self, one: list) -> list[jax.Array]:
        """One row with itself, `(r, r)` of each kind."""
        example = self.of(one)
        return [kind.own(example, self.columns) for kind in self.kinds]

    def all_with(self, one: list, lefts: PyTree, size: int) -> list[jax.Array]:
        """All rows with one, `(n, r, r)` of each kind; `lefts` None: made anew."""
        example = self.of(one)
        rights = [kind.right(example, self.columns) for kind in self.kinds]

        def some(given: PyTree) -> list[jax.Array]:
            left = jax.vmap(self.left)(given) if lefts is None else given
            pairs = zip(self.kinds, rights, strict=True)
            return [kind.column(left, right) for kind, right in pairs]

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
        size = chunk_size or min(max(_ENTRIES // largest, 1), len(self.parts[0]))
        return size, kernel.shape[0], bytes_


def candidates(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    acquisition: Gain,
    rank: int | None,
) -> Candidates:
    model, middle = once(apply_fn), acquisition.middle(belief.mean)
    products.check_model(belief, model, pool, likelihood)
    if likelihood.nuisance is not None:
        likelihood = products.known(likelihood, belief)
    own = cholesky_root(likelihood) if rank is None else rank_root(likelihood, rank)
    kinds = [products.rows_of(belief, model, pool)]
    if middle is not None:
        kinds.append(products.rows_of(belief, model, pool, middle))
    columns = functools.partial(root_columns, own)
    return Candidates(*products.one_by_one(pool), columns, kinds)


def check_pool(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    *,
    chunk_size: int | None = None,
    excluded: Any = None,
) -> tuple[Gaussian, PyTree, np.ndarray | jax.Array]:
    """The Gaussian of the state, the pool as arrays, and which of its rows may be
    chosen, `(n,)`; else raises."""
    check_choices(apply_fn, likelihood)
    pool = products.check_inputs(state, pool, chunk_size)
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
        free = ~checks.readable(excluded)
    if not checks.is_traced((parts, free)):
        _check_finite(parts, free)
    return belief, pool, free


def _check_finite(parts: list, free: Any) -> None:
    bad = np.zeros(free.shape, bool)
    for part in map(checks.readable, parts):
        if jnp.issubdtype(part.dtype, jnp.inexact):
            finite = abs(part) < np.inf
            bad = bad | ~finite.reshape((len(part), -1)).all(1)
    bad = bad & free
    if not checks.holds(~bad):
        bad = processes.on_host(bad)
        raise ValueError(
            f"{bad.sum()} rows of the pool are not finite, the first ones "
            f"{np.flatnonzero(bad)[:5].tolist()}: leave them out, or "
            "excluded=~np.isfinite(pool).all(1)."
        )


def check_fits(dtype: Any, shape: tuple, what: str, way_out: str) -> None:
    """Raises where an array would take more than a quarter of what memory there is."""
    limit, wanted = capacity.num_bytes(), math.prod(shape) * jnp.dtype(dtype).itemsize
    if limit is not None and _SHARE * wanted > limit:
        raise ValueError(
            f"{what} would take {wanted:,} bytes, more than a quarter of the "
            f"{limit:,} that there are: {way_out}."
        )
