"""What an estimator is: a call that turns params and a batch into an information."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import sharding as meshes
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.checks import is_traced
from fisherflow_jax._ground.choices import compiled, hashable, shared
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax._ground.screening import Screen, count_at_hand
from fisherflow_jax.layers import deciding, expecting
from fisherflow_jax.model import Model, plain
from fisherflow_jax.structures import Structure

PyTree = Any


class ByKey:
    """Equal by type and `_key`; where that has no hash (a traced option), by itself."""

    _key: Any

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, type(self)):
            return self is other
        return hash(self) == hash(other) and self._key == other._key

    def __hash__(self) -> int:
        try:
            return hash(self._key)
        except TypeError:
            return id(self)


# not a NamedTuple: jax.jit(estimator) needs an object that takes a weak reference
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Estimator(ByKey):
    """`estimator(params, batch, key=None)` -> information, a sum over the batch.

    One is made by `ff.estimators.exact`.

    Attributes:
      name: of the estimator's function.
      compute: what a call does, of checked arguments.
      structure: what is kept.
      random: whether a key is needed.
      not_a_curvature: why it cannot serve as a flow's curvature; None: it can.
      from_gradient: a mean gradient -> the information, where no pass of the model is
        needed.
      check: raises where a batch does not fit; `compute` does it too.
      describe_paths: the table of `paths`.
      vectors_a_batch: the rank that one batch adds, where it does not grow with the
        examples.
      by_root: whether its mean is the information of the likelihood's root.
      rebuild: the same estimator in another structure.
      of: the model that it was made for, if any.
      bound: `(choice, apply_fn, likelihood, structure)`: what equal estimators share.
        Not kept by `dataclasses.replace`: another `compute` is another estimator.
    """

    name: str
    compute: Callable[[PyTree, batches.Batch, jax.Array | None], Any]
    structure: Structure
    random: bool = False
    not_a_curvature: str | None = None
    from_gradient: Callable[[PyTree], Any] | None = None
    check: Callable[[PyTree, batches.Batch], None] | None = None
    describe_paths: Callable[[PyTree, batches.Batch], str] | None = None
    vectors_a_batch: int | None = None
    by_root: bool = False
    rebuild: Callable[[Structure], "Estimator"] | None = None
    of: Model | None = None
    bound: tuple[Any, ...] | None = dataclasses.field(default=None, init=False)

    @property
    def model(self) -> Model | None:
        """The model that it runs, where that is known."""
        return self.of if self.bound else None

    def deciding(self, run: Callable[[], Any], given: Callable[[], tuple]) -> Any:
        """`run()`, for which values may have to tell whether examples interact.

        `given()` are parameters and inputs.
        """
        if self.model is None:
            return run()
        return deciding(run, plain(self.model.apply_fn), given)

    def screen(self, params: PyTree, batch: batches.Batch) -> Screen:
        """What tells bad rows; without a model they cost the batch."""
        if self.model is None:
            return Screen()
        with expecting(self.structure.layers, batch.inputs):
            return self.model.screen(params, batch)

    @functools.cached_property  # written past the frozen fields
    def _key(self) -> Any:
        if self.bound is None:
            return self.name, id(self)
        choice, apply_fn, likelihood, structure = self.bound
        return choice, apply_fn and hashable(apply_fn), likelihood, structure

    def __repr__(self) -> str:
        if self.bound is None:
            return f"estimators.{self.name}"
        return f"{self.bound[0]!r} in {self.structure.name}"

    def __call__(self, params: PyTree, batch: Any, key: Any = None) -> Any:
        if self.random and key is None:
            raise ValueError(
                f"estimators.{self.name} draws at random: give it a key, "
                "estimator(params, batch, key)."
            )
        typed = None if key is None else typed_key(key)
        params = trees.real_arrays(params, "params")
        batch = batches.as_batch(batch)
        given = params, batch, typed
        # one that was built by hand may do in Python what no program does
        if not self.bound or meshes.has_explicit_axes() or is_traced(given):
            run = functools.partial(meshes.replicated, self.compute, *given)
            return self.deciding(run, lambda: (params, batch.inputs))
        own = shared(self)
        run = functools.partial(compiled(own, _compute), params, batch, typed)
        information = own.deciding(run, lambda: (params, batch.inputs))
        if own.check is not None:  # values, which were not at hand in the program
            own.check(params, batch)
        if own.model is not None:
            screen = own.model.screen(params, batch, left_out=False)
            count = count_at_hand(screen, batch)
            if not is_traced(count) and count:  # traced of what a function closes over
                screen.refuse(batch)
        return information

    def with_structure(self, structure: Structure) -> "Estimator":
        """The same estimator in another structure: the same draws for the same key.

        Args:
          structure: from `ff.structures`.

        Returns:
          An `Estimator`. Cost: none; nothing is computed yet.

        Raises:
          ValueError: for an estimator of one's own, built without `rebuild`.

        Example:
          >>> import jax.numpy as jnp
          >>> import fisherflow_jax as ff
          >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
          >>> full = ff.estimators.exact(*model, ff.structures.full())
          >>> diagonal = full.with_structure(ff.structures.diagonal())
          >>> diagonal(jnp.zeros(2), (jnp.array([[1.0, 2.0]]), None))
          Diagonal(entries=Array([1., 4.], dtype=float32))
        """
        if self.rebuild is None:
            raise ValueError(
                f"estimators.{self.name} was built for {self.structure.name} alone: "
                "give its Estimator a rebuild, a function of the structure."
            )
        return self.rebuild(structure)

    def paths(self, params: PyTree, batch: Any) -> str:
        """A table of how each parameter's squares are made, from shapes alone.

        Per-example squares of a linear layer cost one product of squares; a layer that
        is shared over positions, and any other parameter, costs a gradient for each
        example.

        Example:
          >>> import jax.numpy as jnp
          >>> import fisherflow_jax as ff
          >>> estimator = ff.estimators.empirical(
          ...     lambda params, x: params["gain"] * (x @ params["w"]),
          ...     ff.likelihoods.gaussian(),
          ...     ff.structures.diagonal(),
          ... )
          >>> params = {"gain": jnp.ones(()), "w": jnp.ones((3, 2))}
          >>> print(estimator.paths(params, (jnp.ones((5, 3)), jnp.ones((5, 2)))))
          parameter  shape   path
          gain       ()      a gradient for each example (used in mul)
          w          (3, 2)  squares of inputs times squares of gradients
        """
        describe = shared(self).describe_paths  # an equal one may know these shapes
        if describe is None:
            raise ValueError(
                f"estimators.{self.name} does not square gradients of examples, so "
                "its parameters have no paths to tell."
            )
        params = trees.real_arrays(params, "params")
        return describe(params, batches.as_batch(batch))


def _compute(estimator: Estimator, params: PyTree, batch: Any, key: Any) -> Any:
    return estimator.compute(params, batch, key)
