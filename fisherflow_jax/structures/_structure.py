"""What a structure is: how pulled-back vectors become an information."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import capacity, trees
from fisherflow_jax.layers import Layers


class Structure(NamedTuple):
    """What is kept of the information. Made by the factories of `ff.structures`.

    One is made by `ff.structures.full`.

    Attributes:
      reduce: leaves `(k, *leaf.shape)`, k vectors `v_k` -> information `sum_k v_k
        v_k^T`.
      isotropic: `(params, value)` -> information `value * identity`, also on shapes
        alone.
      from_matvec: `(matvec, params)` -> what is kept of a symmetric operator; d
        products.
      from_full: `Full` -> its own part of that matrix (mean, diagonal, blocks).
      takes_outer_products: whether `reduce` also takes leaves kept as
        `OuterProducts`.
      takes_many_as_one: whether `reduce` also takes layers of its table that are alike
        in one: `OneOfMany`.
      held_by_outer_products: `reduce` takes them where this, of one example's, counts
        what it holds; None: a vector for each example.
      layers: the layers it was given: with `batched`, models are run on whole
        batches.
      correction: an information of zeros -> one with second moments in an eigenbasis
        that moves, and the bases: see `LayerBases`.
      packing: an information -> what adds as it does and takes fewer numbers: see
        `PackedKronecker`.
      apart: the same structure, where what can be renewed by turns is stacked in this.
      gathers: whether `reduce` loses what a sum would keep: devices that each have some
        of a batch's vectors then bring them together before, and reduce all of them.
      call: how it was made, for printing.
    """

    name: str
    reduce: Callable[[Any], Any]
    isotropic: Callable[[Any, Any], Any]
    supports: frozenset[str] = frozenset()
    from_matvec: Callable[[Callable, Any], Any] | None = None
    from_full: Callable[[Any], Any] | None = None
    takes_outer_products: bool = False
    takes_many_as_one: bool = False
    held_by_outer_products: Callable[[Any], int | None] | None = None
    layers: Layers | None = None
    correction: Callable[[Any], tuple[Any, Any]] | None = None
    packing: Callable[[Any], Any] | None = None
    apart: Callable[[], "Structure"] | None = None
    gathers: bool = False
    call: str = ""

    def __repr__(self) -> str:
        return self.call or self.name

    def require(self, capability: str, why: str) -> None:
        """Raises if the structure cannot do what is asked, saying why."""
        if capability not in self.supports:
            raise ValueError(
                f"structure {self.name} does not go with {capability}: {why}"
            )

    def empty(self, params: Any) -> Any:
        """`isotropic(params, 0)`: an information before any data.

        Raises:
          ValueError: where two of it, as an update holds, would not fit in memory.
        """
        self.check_fits(params)
        return self.isotropic(params, 0.0)

    def num_bytes(self, params: Any) -> int:
        """What an information takes, from shapes alone."""
        held = jax.eval_shape(lambda params: self.isotropic(params, 0.0), params)
        leaves = jax.tree.leaves(held)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)

    def check_fits(self, params: Any) -> None:
        """Raises where two informations would not fit in memory, from shapes alone."""
        limit, size = capacity.num_bytes(), trees.size(params)
        # no structure keeps more than a matrix and a few numbers more
        if limit is None or 32 * size * (size + 1) < limit:
            return
        wanted = self.num_bytes(params)
        if 2 * wanted > limit:
            raise ValueError(
                f"structure {self.name} of {size:,} parameters takes {wanted:,} bytes, "
                f"and an update holds two of it; there are {limit:,} bytes. Take "
                "structures.diagonal() (a number a parameter), "
                "kronecker(ff.layers.find_layers(...)) (two factors a layer), or fewer "
                "parameters, by ff.only(apply_fn, params, chosen)."
            )

    def restrict(self, information: Any, shown: Any, like: Any = None) -> Any:
        """`ff.information.restrict`, kept in this structure.

        Where the information's type has no restriction of its own, what the structure
        keeps of the dense matrix: `from_full`, or else `reduce` of a root's rows.
        """
        part = ops.restrict(information, shown, like)
        return self._brought_back(part, type(information))

    def embed(self, information: Any, entries: Any, like: Any = None) -> Any:
        """`ff.information.embed`, kept in this structure.

        Brought back into it as by `restrict`. Of another structure it is added to an
        empty one.

        Raises:
          ValueError: where this structure cannot hold it.
        """
        self.check_fits(entries)
        template = jax.eval_shape(lambda: self.isotropic(entries, 0.0))
        part, kind = ops.embed(information, entries, like, template), type(template)
        own = type(information) is kind and not ops.facts(part).elementwise
        if own:
            return self._brought_back(part, kind)
        total = ops.add(self.empty(entries), part)
        if type(total) is not kind:
            raise ValueError(
                f"structure {self.name} cannot hold what is known beside a prior of "
                f"what is new: that takes a {type(total).__name__}."
            )
        return total

    def _brought_back(self, part: Any, kind: type) -> Any:
        """Of an information in the default's type, what this structure keeps."""
        if type(part) is kind:
            return part
        if self.from_full is not None:
            return self.from_full(part)
        root, like = ops.spectral(part).map(jnp.sqrt), ops.diagonal(part)
        units = jnp.eye(trees.size(like), dtype=trees.float_dtype(like))
        return self.reduce(jax.vmap(root.times)(trees.unravel(units, like)))
