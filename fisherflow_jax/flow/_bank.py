"""A bank of flows over one stream, weighted by how well each predicted it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.batch import as_batch, by_name, weighted_total
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow._state import FisherFlow, FlowInfo, FlowState

PyTree = Any


class BankState(NamedTuple):
    """The members' states and the logarithms of their weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda params, x: x @ params, ff.likelihoods.gaussian())
      >>> state = ff.bank([flow, flow]).init(jnp.zeros(1))
      >>> print(len(state.members), state.weights)
      2 [0.5 0.5]
    """

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


def bank(
    flows: Sequence[FisherFlow],
    *,
    forgetting: float | None = None,
    switching: float | None = None,
    weigh_by: Callable[..., jax.Array] | None = None,
) -> Bank:
    r"""Runs several flows side by side and weights them by how well they predict.

    .. math:: w_k \propto w_k^{\alpha} \, p(y_t \,|\, \text{flow } k), \quad
       \alpha = \text{forgetting}; \qquad \text{or} \qquad
       w_k \propto \big((1 - a) w_k + a / K\big) \, p(y_t \,|\, \text{flow } k),
       \quad a = \text{switching}

    The flows may differ in decays, priors, memories; with `weigh_by` also in structure.
    With a grid of decays the bank follows continuous drift at a rate that nobody had to
    set. With `forgetting=1` the weights are posterior probabilities of the flows, and
    the bank's loss is at most `log K` above that of the best. With `switching` it is at
    most :math:`(S + 1) \log K + S \log \tfrac 1 a + (T - S - 1) \log \tfrac 1 {1 - a}`
    above the best sequence of members that changes S times in T updates, whatever the
    data: the rule with a guarantee, at a cost of about `a T` where nothing switches.

    Args:
      flows: at least one flow, all over the same parameters. Evidence with a known and
        with an unknown dispersion is not comparable: do not mix the two.
      forgetting: exponent of the old weights at each update, in (0, 1]; below one the
        bank can come back to a member that did badly long ago. None: .97, or 1 with
        `switching`.
      switching: the share of all weight that is handed out evenly before each batch,
        in (0, 1): the probability that the best member changes. None: `forgetting`.
      weigh_by: `(state, apply_fn, likelihood, batch) -> (n, ...)`, log scores of a
        batch's targets by what a member believes before it, such as
        `ff.calibration.log_score`. None: the evidence, which is comparable within one
        structure.

    Returns:
      A `Bank(init, update)`. Its state works with `standard_error`,
      `warm_start`, `confidence_interval`, `sample` and `predict`, which are those of
      the mixture; one batch that any member cannot take in moves none. Cost: the sum of
      the members'.

    Raises:
      TypeError: for what is no flow of `ff.fisher_flow`, as a sparse one.
      ValueError: without flows, for a forgetting outside (0, 1] or beside switching,
        and for flows of several structures without `weigh_by`: their evidences are no
        densities of the same kind.

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
      Herbster, Warmuth, "Tracking the best expert", 1998.
    """
    flows = tuple(flows)
    if not flows:
        raise ValueError("a bank needs at least one flow; got none.")
    for index, flow in enumerate(flows):
        belonging.check_member(flow, f"flows[{index}]")
    rule = _Weighing.of(forgetting, switching, weigh_by)
    if weigh_by is None:
        _check_comparable(flows)

    def init(params: PyTree, prior_mean: PyTree = None, key: Any = None) -> BankState:
        typed = None if key is None else typed_key(key)
        members = []
        for index, flow in enumerate(flows):
            own = None if typed is None else jax.random.fold_in(typed, index)
            members.append(flow.init(params, prior_mean, own))
        dtype = members[0].log_evidence.dtype
        uniform = jnp.full((len(flows),), -jnp.log(len(flows)), dtype)
        return BankState(tuple(members), uniform)

    return Bank(init, functools.partial(_update, flows, rule))


def _update(
    flows: tuple[FisherFlow, ...],
    rule: "_Weighing",
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
    joint = rule.before(state.log_weights) + rule.gains(flows, state, batch, infos)
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


@dataclasses.dataclass(frozen=True)
class _Weighing:
    """How weights pass from batch to batch, and what a batch adds to them."""

    forgetting: Any
    switching: Any
    weigh_by: Callable | None

    @classmethod
    def of(cls, forgetting: Any, switching: Any, weigh_by: Any) -> "_Weighing":
        if switching is None:
            forgetting = 0.97 if forgetting is None else forgetting
            if not checks.holds((forgetting > 0) & (forgetting <= 1)):
                raise ValueError(f"forgetting must be in (0, 1]; got {forgetting}.")
        elif forgetting is not None and not checks.holds(forgetting == 1):
            raise ValueError(
                f"a bank has one rule: forgetting={forgetting} or "
                f"switching={switching}."
            )
        elif not checks.holds((switching > 0) & (switching < 1)):
            raise ValueError(f"switching must be in (0, 1); got {switching}.")
        return cls(forgetting, switching, weigh_by)

    def before(self, logs: jax.Array) -> jax.Array:
        """The logarithms of the weights before a batch, of those after the last."""
        if self.switching is None:
            return jax.nn.log_softmax(self.forgetting * logs)
        share = jnp.asarray(self.switching, logs.dtype)
        return jnp.logaddexp(logs + jnp.log1p(-share), jnp.log(share / len(logs)))

    def gains(
        self, flows: tuple, state: BankState, batch: Any, infos: tuple
    ) -> jax.Array:
        """How well each member predicted the batch, `(number of flows,)`."""
        if self.weigh_by is None:
            return jnp.stack([info.log_evidence for info in infos])
        pairs = zip(flows, state.members, strict=True)
        gains = jnp.stack([_score(self.weigh_by, *pair, batch) for pair in pairs])
        gains = gains.astype(state.log_weights.dtype)
        # of beliefs that predict nothing yet, nothing is said of any
        return jnp.where(jnp.all(jnp.isfinite(gains)), gains, 0)


def _check_comparable(flows: tuple[FisherFlow, ...]) -> None:
    kinds = {flow.recipe.structure.name: flow for flow in flows}
    if len(kinds) > 1:
        raise ValueError(
            f"the flows differ in structure ({', '.join(kinds)}), and evidence is a "
            "density of the data for the full one alone: give weigh_by="
            "ff.calibration.log_score, which scores what each predicts."
        )


def _score(
    weigh_by: Callable, flow: FisherFlow, state: FlowState, batch: Any
) -> jax.Array:
    """The sum over a batch of its weighted scores before it is learnt from."""
    batch = as_batch(by_name(batch), values=False)
    recipe = flow.recipe
    batch, _ = recipe.model.screen(state.mean, batch)(batch)
    ahead = flow.advance(state, batch)
    scores = weigh_by(ahead, recipe.apply_fn, recipe.likelihood, batch)
    together = recipe.likelihood.observing is not None
    return weighted_total(batch, scores, together=together)
