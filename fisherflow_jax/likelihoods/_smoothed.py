"""A likelihood averaged over outputs that are normal, with a spread of their own."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground import arrays, linalg
from fisherflow_jax.likelihoods._likelihood import Likelihood, Shape


class Layout(NamedTuple):
    """How the outputs of an example lie: `(n, *targets, *own)`, own those of one.

    Attributes:
      targets: the axes of the examples' targets.
      own: those of a target's outputs.
    """

    targets: Shape
    own: Shape

    @property
    def size(self) -> int:
        """The outputs of one target."""
        return math.prod(self.own)

    @classmethod
    def of(cls, likelihood: Likelihood, outputs: Any, targets: Any) -> "Layout":
        """From the shapes of a batch."""
        found = jax.eval_shape(likelihood.log_prob, outputs, targets).shape
        shape = tuple(outputs.shape)
        if shape[: len(found)] != found:  # one value for all of an example's outputs
            found = shape[:1]
        return cls(shape[1 : len(found)], shape[len(found) :])

    def joined(self, outputs: jax.Array, roots: jax.Array) -> jax.Array:
        """With the roots `(n, *targets, K, K)` of their covariance behind them."""
        lead = (*outputs.shape[:1], *self.targets)
        parts = (x.reshape((*lead, -1)) for x in (outputs, roots.astype(outputs.dtype)))
        return jnp.concatenate(list(parts), -1)

    def parted(self, joined: Any) -> tuple[jax.Array, jax.Array]:
        lead, size = joined.shape[:-1], self.size
        outputs, roots = joined[..., :size], joined[..., size:]
        return outputs.reshape((*lead, *self.own)), roots.reshape((*lead, size, size))


def smoothed(
    likelihood: Likelihood, layout: Layout, nodes: tuple[Any, Any]
) -> Likelihood:
    r"""The average of a likelihood over normal outputs.

    .. math:: \mathrm E \log p(y | z + S u), \qquad
       L L^\top = \mathrm E\, I(z + S u), \qquad u \sim N(0, 1)

    Its outputs are those of the likelihood, a target's in one axis, with S behind them,
    `layout.joined`. It is for searches and informations by its root, in which outputs
    behind the mean are known; a target's probability it does not give.
    """

    def over(function: Callable, joined: jax.Array) -> jax.Array:
        """`sum_k weights_k function(outputs at node k)`, a node at a time."""
        outputs, roots = layout.parted(joined)
        points, weights = (jnp.asarray(x, outputs.dtype) for x in nodes)

        def at(point: jax.Array) -> jax.Array:
            shift = linalg.product("...ij,j->...i", roots, point)
            return function(outputs + shift.reshape(outputs.shape))

        values = jax.lax.map(at, points, batch_size=min(len(points), 64))
        return jnp.tensordot(weights.astype(values.dtype), values, 1)

    def log_prob(joined: ArrayLike, targets: Any) -> jax.Array:
        wide = arrays.widen(joined)
        return over(lambda outputs: likelihood.log_prob(outputs, targets), wide)

    def information(joined: jax.Array, key: Any) -> jax.Array:
        """`(n, *targets, K, K)`."""
        shape = jax.eval_shape(layout.parted, joined)[0].shape
        probes = likelihood.probe_shape(shape)
        number = 1 + len(layout.targets)
        rest = probes[number:]
        units = jnp.eye(math.prod(rest), dtype=joined.dtype)
        units = units.reshape((-1, *(1,) * number, *rest))

        def squares(outputs: jax.Array) -> jax.Array:
            def column(unit: jax.Array) -> jax.Array:
                # targets have probes of their own, and each may have its first at once
                each = jnp.broadcast_to(unit, probes)
                found = likelihood.root(outputs, each, key)
                return found.reshape((*found.shape[:number], layout.size))

            columns = jax.vmap(column)(units)
            return linalg.product("r...i,r...j->...ij", columns, columns)

        return over(squares, joined)

    def root(joined: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        wide = arrays.widen(joined)
        matrices = information(wide, key)
        if layout.size == 1:
            roots = arrays.safe_sqrt(matrices)
        else:
            roots = linalg.semidefinite_root(matrices)
        probes = arrays.like(probes, wide)
        columns = linalg.product("...ij,...j->...i", roots, probes)
        none = jnp.zeros(wide.shape[:-1] + (layout.size**2,), wide.dtype)
        whole = jnp.concatenate([columns, none], -1)
        return whole.astype(jnp.asarray(joined).dtype)

    def of_outputs(function: Callable) -> Callable:
        return lambda joined: function(layout.parted(joined)[0])

    def check(joined: Any, targets: Any) -> None:
        likelihood.check(jax.eval_shape(layout.parted, joined)[0], targets)

    observing = likelihood.observing
    return likelihood._replace(
        log_prob=log_prob,
        mean=of_outputs(likelihood.mean),
        variance=of_outputs(likelihood.variance),
        line=of_outputs(likelihood.line),
        sample=lambda key, joined: likelihood.sample(key, layout.parted(joined)[0]),
        root=root,
        probe_shape=lambda shape: (*shape[:-1], layout.size),
        check=check,
        diagonal=False,
        cholesky=None,
        diagonal_bound=None,
        low_rank=None,
        expected_log_prob=None,
        known=None,
        with_dispersion=None,
        with_noise=None,
        observing=observing and functools.partial(_observing, observing, layout, nodes),
    )


def _observing(
    observing: Callable, layout: Layout, nodes: tuple, there: Any
) -> Likelihood:
    return smoothed(observing(there), layout, nodes)
