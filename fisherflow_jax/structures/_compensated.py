"""An information as an unevaluated sum of two, so that float32 loses nothing.

Adding a small increment to a large sum in float32 rounds it to 24 bits; after 2^24 unit
increments nothing is added at all. The pair keeps what was rounded away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg


class Compensated(NamedTuple):
    """The information `high + low`, both of the same structure.

    Kept by `ff.fisher_flow`.
    """

    high: Any
    low: Any  # what rounding took from high

    @property
    def value(self) -> Any:
        """The information, rounded to one of its structure."""
        return jax.tree.map(jnp.add, self.high, self.low)


def compensate(information: Any) -> Compensated:
    """Starts a compensated sum at `information`."""
    return Compensated(information, jax.tree.map(jnp.zeros_like, information))


@ops.add_to.register
def _(left: Compensated, right: Any) -> Compensated:
    if not isinstance(right, Compensated):
        right = Compensated(right, None)  # it has lost nothing
    if type(right.high) is not type(left.high):
        zeros = jax.tree.map(jnp.zeros_like, left.high)
        right = Compensated(*(x and ops.add_to(zeros, x) for x in right))
        if right.high is NotImplemented:
            return NotImplemented

    def leaf(high: jax.Array, low: jax.Array, other: jax.Array, *lost: jax.Array):
        total, error = linalg.two_sum(high, other)
        return linalg.two_sum(total, sum(lost, low) + error)

    pairs = jax.tree.map(leaf, *left, *(x for x in right if x is not None))
    return Compensated(
        *jax.tree.transpose(
            jax.tree.structure(left.high), jax.tree.structure((0, 0)), pairs
        )
    )


@ops.conform.register
def _(template: Compensated, information: Any) -> Compensated:
    if isinstance(information, Compensated):
        return information
    return compensate(information)


@ops.propagate.register
def _(information: Compensated, noise: Any, transition: Any | None = None):
    return compensate(ops.propagate(information.value, noise, transition))


def on_value(kind: type, but: tuple = ()) -> None:
    """What is asked of this kind is asked of its `value`, but for some operations."""

    def of_value(operation: Callable) -> Callable:
        def asked(information: Any, *args: Any, **kwargs: Any) -> Any:
            return operation(information.value, *args, **kwargs)

        return asked

    _KINDS.append(kind)
    ops.plain.register(kind, lambda information: information.value)
    ops.sandwich.register(
        kind, lambda bread, meat: ops.sandwich(bread.value, ops.plain(meat))
    )
    for operation in _OF_VALUES:
        if operation not in but:
            operation.register(kind, of_value(operation))


def is_of_value(information: Any) -> bool:
    """Whether it is of such a kind, which knows itself how it is added to."""
    return isinstance(information, tuple(_KINDS))


_KINDS: list[type] = []
_OF_VALUES: tuple[Any, ...] = (
    ops.facts,
    ops.check_prior,
    ops.matvec,
    ops.solver,
    ops.sample,
    ops.spectral,
    ops.eigenvalues,
    ops.whitener,
    ops.by_columns,
    ops.factorise,
    ops.logdet,
    ops.regularised,
    ops.resolved,
    ops.embed,
    ops.trace,
    ops.diagonal,
    ops.inverse_diagonal,
    ops.to_dense,
    ops.inverse,
    ops.squares,
)
on_value(Compensated)
ops.rounded.register(Compensated, lambda information: information.value)


def _on_parts(operation: Any) -> None:
    @operation.register
    def _(information: Compensated, *args: Any, **kwargs: Any) -> Compensated:
        return Compensated(*(operation(part, *args, **kwargs) for part in information))


for _operation in (ops.scale, ops.total, ops.restrict):
    _on_parts(_operation)
