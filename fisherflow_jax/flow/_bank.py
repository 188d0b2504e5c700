"""A bank of flows over one stream, weighted by how well each predicted it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.flow._state import FisherFlow, FlowInfo, FlowState

PyTree = Any


class BankState(NamedTuple):
    """The members' states and the logarithms of their weights."""

    members: tuple[FlowState, ...]
    log_weights: jax.Array  # (number of flows,), normalised

    @property
    def weights(self) -> jax.Array:
        """The members' weights, summing to one."""
        return jnp.exp(self.log_weights)

    @property
    def mean(self) -> PyTree:
        """The mean of the mixture, a pytree like the parameters."""
        means = [member.mean for member in self.members]

        def mix(*parts: jax.Array) -> jax.Array:
            return jnp.tensordot(self.weights, jnp.stack(parts), 1)

        return jax.tree.map(mix, *means)


class BankInfo(NamedTuple):
    """What an update of a bank reports."""

    members: tuple[FlowInfo, ...]
    log_evidence: jax.Array  # () of the batch under the mixture
    skipped: jax.Array  # () bool: nothing moved
    missing: jax.Array  # () bool: all weights were zero, only memories moved on


class Bank(NamedTuple):
    """A bank's functions. Made by `ff.bank`.

    Attributes:
      init: `(params, prior_mean=params, key=None) -> state`.
      update: `(state, batch) -> (state, info)`, as `lax.scan` calls it.
    """

    init: Any
    update: Any

    @property
    def flows(self) -> tuple[FisherFlow, ...]:
        """Its members."""
        return self.update.args[0]

    def __repr__(self) -> str:
        return f"bank([{', '.join(map(repr, self.flows))}])"


def bank(flows: Sequence[FisherFlow], *, forgetting: float = 0.97) -> Bank:
    r"""Runs several flows side by side and weights them by their evidence.

    .. math:: w_k \propto w_k^{\alpha} \, p(y_t \,|\, \text{flow } k), \quad
       \alpha = \text{forgetting}

    The flows may differ in whatever matters: decays, structures, priors. With a grid of
    decays the bank follows continuous drift at a rate that nobody had to set. With
    `forgetting=1` the weights are posterior probabilities of the flows.

    Args:
      flows: at least one flow, all over the same parameters. Evidence with a known and
        with an unknown dispersion is not comparable: do not mix the two.
      forgetting: exponent of the old weights at each update, in (0, 1]; below one the
        bank can come back to a member that did badly long ago.

    Returns:
      A `Bank(init, update)`. Its state works with `standard_error`,
      `warm_start`, `confidence_interval`, `sample` and `predict`, which are those of
      the mixture; one batch that any member cannot take in moves none. Cost: the sum of
      the members'.

    Raises:
      ValueError: without flows, or for a forgetting outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flows = [
      ...     ff.fisher_flow(
      ...         lambda params, x: x * params,
      ...         ff.likelihoods.gaussian(),
      ...         structure=ff.structures.full(),
      ...         memory=ff.memories.exponential(decay),
      ...     )
      ...     for decay in (0.5, 0.99)
      ... ]
      >>> bank = ff.bank(flows)
      >>> state = bank.init(jnp.array(0.0))
      >>> for level in (0.0, 5.0, 10.0):  # the mean moves: short memory predicts better
      ...     state, info = bank.update(state, (jnp.ones(8), jnp.full(8, level)))
      >>> bool(state.weights[0] > 0.9)
      True

    References:
      Raftery, Karny, Ettler, "Online prediction under model uncertainty via dynamic
      model averaging", 2010.
    """
    flows = tuple(flows)
    if not flows:
        raise ValueError("a bank needs at least one flow; got none.")
    if not 0 < forgetting <= 1:
        raise ValueError(f"forgetting must be in (0, 1]; got {forgetting}.")

    def init(params: PyTree, prior_mean: PyTree = None, key: Any = None) -> BankState:
        typed = None if key is None else typed_key(key)
        members = []
        for index, flow in enumerate(flows):
            own = None if typed is None else jax.random.fold_in(typed, index)
            members.append(flow.init(params, prior_mean, own))
        dtype = members[0].log_evidence.dtype
        uniform = jnp.full((len(flows),), -jnp.log(len(flows)), dtype)
        return BankState(tuple(members), uniform)

    return Bank(init, functools.partial(_update, flows, forgetting))


def _update(
    flows: tuple[FisherFlow, ...],
    forgetting: float,
    state: BankState,
    batch: Any,
    **options: Any,
) -> tuple[BankState, BankInfo]:
    if not isinstance(state, BankState):
        raise TypeError(
            "a bank's update is (state, batch), with a state of its own init; got "
            f"a {type(state).__name__}."
        )
    results = [
        flow.update(member, batch, **options)
        for flow, member in zip(flows, state.members, strict=True)
    ]
    infos = tuple(info for _, info in results)
    gains = jnp.stack([info.log_evidence for info in infos])
    before = jax.nn.log_softmax(forgetting * state.log_weights)
    joint = before + gains
    # a batch refused by one member tells nothing of the others: it moves none
    skipped = jnp.any(jnp.stack([info.skipped for info in infos]))
    counted = tuple(
        member._replace(num_skipped=member.num_skipped + 1) for member in state.members
    )
    after = BankState(tuple(member for member, _ in results), jax.nn.log_softmax(joint))
    refused = BankState(counted, state.log_weights)
    after = optax.tree.where(skipped, refused, after)
    evidence = jax.nn.logsumexp(joint)
    evidence = jnp.where(skipped, jnp.zeros_like(evidence), evidence)
    return after, BankInfo(
        members=infos,
        log_evidence=evidence,
        skipped=skipped,
        missing=infos[0].missing,
    )
