"""Flows side by side on one stream, judged by how they predict it."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, choices, tables
from fisherflow_jax._ground.batch import Batch, weighted_total
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.accumulation import as_stack
from fisherflow_jax.calibration import log_score
from fisherflow_jax.flow import FisherFlow, FlowState
from fisherflow_jax.predictions import observation_interval, predict

PyTree = Any

# A flow is kept while it is within log(number of flows) and so many nats of the best.
_SLACK = 3.0


class Candidate(NamedTuple):
    """What was seen of one flow, as far as it was run.

    Attributes:
      log_score: the judge's, a row.
      below_best: nats by which it is below the best on the same rows, summed.
      coverage: share of the targets within the 90 % interval of a new observation; NaN
        where the likelihood has no normal errors.
      log_evidence: a row; only of full structures a density, and never compared.
      seconds: an update and its forecast, compiled; machine and load are in it.
      num_bytes: of the state.
      num_batches: it was run on; fewer than there are where it was dropped.
      num_skipped: updates that were refused.
    """

    log_score: float
    below_best: float
    coverage: float
    log_evidence: float
    seconds: float
    num_bytes: int
    num_batches: int
    num_skipped: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The flows by their scores; `print` shows the table.

    Attributes:
      best: its name.
      state: the best flow's, after all batches.
      table: a `Candidate` of each name, the best first.
      num_batches: of the stream.
    """

    best: str
    state: FlowState
    table: dict[str, Candidate]
    num_batches: int

    def __str__(self) -> str:
        rows = [
            ["flow", "log score", "below best", "covers 90", "evidence", "us/update",
             "bytes", "dropped at"]
        ]  # fmt: skip
        for name, one in self.table.items():
            dropped = one.num_batches < self.num_batches
            covers = "" if math.isnan(one.coverage) else f"{one.coverage:.3f}"
            rows.append([
                name, f"{one.log_score:.4f}", f"{one.below_best:.1f}", covers,
                f"{one.log_evidence:.4f}", f"{1e6 * one.seconds:.0f}",
                f"{one.num_bytes}", f"{one.num_batches}" if dropped else "",
            ])  # fmt: skip
        lines = [tables.aligned(rows, rule=True)]
        lines += [
            f"{name}: {one.num_skipped} updates refused"
            for name, one in self.table.items()
            if one.num_skipped
        ]
        return "\n".join(lines)

    __repr__ = __str__


def choose(
    flows: Mapping[str, FisherFlow],
    params: PyTree,
    batches: Any,
    *,
    judge: Callable[..., jax.Array] = log_score,
    num_rounds: int = 3,
    key: Any = None,
    to_batch: Callable[[Any], Any] | None = None,
) -> Ranking:
    r"""Which flow predicts a stream best: structures, memories, priors side by side.

    .. math:: \sum_t \sum_i w_{ti} \log p(y_{ti} \mid x_{ti}, \text{batches before } t)

    Each batch is predicted from what a flow believes of it beforehand
    (`flow.advance`), row by row, and then learnt from. Never by the evidence: of
    structures other than full that is no density of the data, and would choose wrongly.
    After a half and a quarter of the stream (`num_rounds=3`) the worse half of the
    flows is dropped, but none within `log(number of flows) + 3` nats of the best.

    Args:
      flows: by name; of one likelihood, over the same parameters.
      params: where every flow begins.
      batches: a list or loader of batches, or `ff.Stacked`; held in memory, and padded
        to one length.
      judge: `(state, apply_fn, likelihood, batch) -> (n, ...)`, larger is better;
        `ff.calibration.log_score`, or a function of one's own.
      num_rounds: 1: every flow sees the whole stream.
      key: where an estimator draws.
      to_batch: makes a batch of what a loader gives, if it is none.

    Returns:
      A `Ranking(best, state, table)`, which prints as a table. Cost: at most a pass of
      each flow, with a prediction of each batch; the first round once more, timed.

    Raises:
      ValueError: without flows, for flows of several likelihoods, or where no score is
        finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flows = {
      ...     f"decay {decay}": ff.fisher_flow(
      ...         lambda level, x: x * level,
      ...         ff.likelihoods.gaussian(),
      ...         memory=ff.memories.exponential(decay),
      ...     )
      ...     for decay in (0.5, 0.99)
      ... }
      >>> jumps = jnp.repeat(jnp.arange(6.0), 8)[:, None]
      >>> ranking = ff.choose(
      ...     flows, jnp.array(0.0), ff.Stacked(jnp.ones((48, 1)), jumps)
      ... )
      >>> ranking.best
      'decay 0.5'

    References:
      Dawid, "Present position and potential developments: the prequential approach",
      1984.
      Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter
      optimization", 2016.
    """
    flows = _checked(flows)
    checks.whole(num_rounds, "num_rounds")
    stack = as_stack(batches, to_batch)
    count = len(stack.weights)
    ends = sorted({-(-count // 2**k) for k in range(num_rounds)})
    typed = None if key is None else typed_key(key)
    tracks = {name: _Track(flow, judge, params, typed) for name, flow in flows.items()}
    alive, start = list(tracks), 0
    for end in ends:
        part = jax.tree.map(lambda x, of=slice(start, end): x[of], stack)
        for name in alive:
            tracks[name].run(part)
        start = end
        if end < count:
            alive = _kept(alive, tracks)
    best = max(alive, key=lambda name: tracks[name].score)
    if not math.isfinite(tracks[best].score):
        raise ValueError(
            "no flow has a finite score on these batches: "
            f"{ {name: track.score for name, track in tracks.items()} }."
        )
    ordered = sorted(tracks, key=lambda n: (-tracks[n].num_batches, -tracks[n].score))
    table = {name: tracks[name].told(tracks[best]) for name in ordered}
    return Ranking(best, tracks[best].state, table, count)


def _checked(flows: Any) -> dict[str, FisherFlow]:
    if not isinstance(flows, Mapping) or not flows:
        raise ValueError(
            "flows is a dict of at least one flow by its name, such as "
            f"{{'full': ff.fisher_flow(...)}}; got {checks.described(flows)}."
        )
    models: dict[Any, str] = {}
    for name, flow in flows.items():
        checks.made(flow, FisherFlow, f"flows[{name!r}]", "ff.fisher_flow(...)")
        models.setdefault(flow.recipe.likelihood, name)
    if len(models) > 1:
        (one, first), (other, second) = list(models.items())[:2]
        raise ValueError(
            f"flows[{first!r}] has the likelihood {one!r} and flows[{second!r}] "
            f"{other!r}: choose among flows of one."
        )
    return dict(flows)


def _kept(alive: list[str], tracks: dict[str, "_Track"]) -> list[str]:
    """The better half, and whoever is near the best."""
    ordered = sorted(alive, key=lambda name: -tracks[name].score)
    near = tracks[ordered[0]].score - _SLACK - math.log(len(tracks))
    half = set(ordered[: -(-len(ordered) // 2)])
    return [name for name in alive if name in half or tracks[name].score >= near]


class _Track:
    """One flow on its way along the stream."""

    def __init__(
        self, flow: FisherFlow, judge: Callable, params: PyTree, key: Any
    ) -> None:
        self.state = flow.init(params, key=key)
        self.program = choices.compiled(choices.shared(_Judged(flow, judge)), _through)
        self.scores: list[float] = []  # of each batch, from the first
        self.sums = np.zeros(3)  # within the interval, evidence, weights
        self.seconds = 0.0

    def run(self, part: Batch) -> None:
        state, seen = jax.block_until_ready(self.program(self.state, part))
        if not self.scores:
            begin = time.perf_counter()
            jax.block_until_ready(self.program(self.state, part))
            self.seconds = (time.perf_counter() - begin) / len(part.weights)
        self.state = state
        score, *sums = (np.asarray(x, float) for x in seen)
        # what is not finite says that anything may come
        self.scores += np.nan_to_num(score, nan=-np.inf).tolist()
        self.sums = self.sums + [x.sum() for x in sums]

    @property
    def score(self) -> float:
        return sum(self.scores)

    @property
    def num_batches(self) -> int:
        return len(self.scores)

    def told(self, best: "_Track") -> Candidate:
        within, evidence, weight = self.sums
        leaves = jax.tree.leaves(self.state)
        return Candidate(
            log_score=self.score / weight,
            below_best=sum(best.scores[: self.num_batches]) - self.score,
            coverage=within / weight,
            log_evidence=evidence / weight,
            seconds=self.seconds,
            num_bytes=sum(x.size * x.dtype.itemsize for x in leaves),
            num_batches=self.num_batches,
            num_skipped=int(self.state.num_skipped),
        )


@dataclasses.dataclass(frozen=True)
class _Judged:
    flow: FisherFlow
    judge: Callable


def _through(recipe: _Judged, state: FlowState, part: Batch) -> tuple:
    """The last state; of each batch score, hits, evidence and weight."""
    flow, judge = recipe.flow, recipe.judge
    model = flow.recipe.apply_fn, flow.recipe.likelihood

    def step(state: FlowState, batch: Batch) -> tuple[FlowState, tuple]:
        ahead = flow.advance(state, batch)
        scores = judge(ahead, *model, batch)
        score = weighted_total(batch, scores)
        hits = _hits(ahead, model, batch)
        weight = weighted_total(batch, jnp.ones_like(scores))
        state, info = flow.update(state, batch)
        return state, (score, hits, info.log_evidence, weight)

    return jax.lax.scan(step, state, part)


def _hits(state: FlowState, model: tuple[Callable, Any], batch: Batch) -> Any:
    """The weight of targets within their 90 % interval; NaN without normal errors."""
    if not model[1].normal_errors:
        return jnp.nan
    prediction = predict(state, model[0], model[1], batch.inputs)
    lower, upper = observation_interval(prediction, model[1], 0.9, state=state)
    within = (batch.targets >= lower) & (batch.targets <= upper)
    return weighted_total(batch, within.astype(lower.dtype))
