"""What a flow keeps between batches, and what it reports of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax.memories import Belief, Prior, Sum

PyTree = Any


class Events(NamedTuple):
    """What a state has been through, counted; each `()` int32."""

    rows_skipped: jax.Array
    """Rows of a batch that were left out for a value that is not finite."""
    solves_regularised: jax.Array
    """Solves that were helped to a positive definite information."""
    searches_unfinished: jax.Array
    """Updates whose steps ended before they were short."""


class FlowState(NamedTuple):
    """The posterior `N(mean, information^-1)` and what the flow needs to go on."""

    mean: PyTree
    """Like the parameters."""
    information: Any
    """Prior included."""
    count: jax.Array  # type: ignore[assignment]
    """`()`, effective observations: examples; where the dispersion is estimated, all
    their targets, each an observation of it."""
    log_evidence: jax.Array
    """`()`, of all batches."""
    meat: Any | None
    """The sum of squared scores, for `robust=True`; None: not kept."""
    residual: jax.Array | None
    """`()`, the penalised sum of squares; None: the dispersion is known."""
    prior: Prior
    """The Gaussian before any data."""
    memory: Any
    """The memory's storage."""
    step: jax.Array
    """`()` int32, updates taken in."""
    num_skipped: jax.Array
    """`()` int32, batches refused for a value that is not finite."""
    events: Events
    """What else the state has been through."""
    key: jax.Array | None
    """Key data; None: nothing is drawn."""

    @property
    def degrees_of_freedom(self) -> jax.Array | None:
        """Observations less effective parameters; None: the dispersion is known."""
        if self.residual is None:
            return None
        used = ops.effective(self.information, self.prior.precision, self.mean)
        return self.count - used

    @property
    def dispersion(self) -> jax.Array | None:
        """The estimated dispersion; None: known. NaN without spare observations."""
        spare = self.degrees_of_freedom
        if self.residual is None or spare is None:
            return None
        return jnp.where(spare > 0, self.residual / spare, jnp.nan)


class FlowInfo(NamedTuple):
    """What an update reports."""

    log_likelihood: jax.Array
    """`()`, of the batch at the predicted mean: prequential."""
    log_evidence: jax.Array
    """`()`, its increment."""
    step_size: jax.Array
    """`()`, of the last Newton step; 0: none decreased the objective."""
    decrement: jax.Array
    """`()`, its squared length before halving, in posterior standard deviations."""
    skipped: jax.Array
    """`()` bool: the batch had a value that is not finite, nothing moved."""
    missing: jax.Array
    """`()` bool: all weights were zero, only the memory moved on."""
    memory: Any
    """The memory's report."""


class FisherFlow(NamedTuple):
    """A flow's functions. Made by `ff.fisher_flow`."""

    init: Callable[..., FlowState]
    """`(params, prior_mean=params, key=None) -> state`. The first search sets out from
    params; should the first batch be missing, from the prior mean."""
    update: Callable[..., tuple[FlowState, FlowInfo]]
    """`(state, batch) -> (state, info)`, as `lax.scan` calls it."""
    evaluate: Callable[..., tuple[jax.Array, PyTree, Any]]
    """`(params, batch, key=None) -> (log-likelihood, score, information)`, sums."""
    project: Callable[[Any], Any]
    """A summed information of `evaluate` -> what the state keeps of it."""

    def __repr__(self) -> str:
        return repr(getattr(self.init, "args", ("FisherFlow(...)",))[0])


def belief_of(state: FlowState) -> Belief:
    """What a state believes.

    Before any update that is the prior, wherever the first search sets out from.
    """
    sums = Sum(
        curvature=state.information,
        weight=state.count,
        linear=state.residual,
        quadratic=() if state.meat is None else (state.meat,),
    )
    mean = optax.tree.where(state.step > 0, state.mean, state.prior.origin)
    return Belief(mean, sums, state.prior)
