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
from fisherflow_jax._ground.batch import Batch, observed, weighted_total
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.accumulation import Stacked, as_stack, check_loader
from fisherflow_jax.calibration import log_score
from fisherflow_jax.flow import FisherFlow, FlowState, check_member
from fisherflow_jax.predictions import observation_interval, predict

PyTree = Any

# A flow is kept while it is within log(number of flows) and so many nats of the best.
_SLACK = 3.0


class Candidate(NamedTuple):
    """What was seen of one flow, as far as it was run.

    Attributes:
      log_score: the judge's, a row.
      below_best: nats by which it is below the best on the same rows, summed; negative
        where a flow that keeps less has scored higher, by no more than chance.
      standard_error: of `below_best`, from the differences of the batches.
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
    standard_error: float
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
            ["flow", "log score", "below best", "error", "covers 90", "evidence",
             "us/update", "bytes", "dropped at"]
        ]  # fmt: skip
        for name, one in self.table.items():
            dropped = one.num_batches < self.num_batches
            covers = "" if math.isnan(one.coverage) else f"{one.coverage:.3f}"
            rows.append([
                name, f"{one.log_score:.4f}", f"{one.below_best:.1f}",
                f"{one.standard_error:.1f}", covers, f"{one.log_evidence:.4f}",
                f"{1e6 * one.seconds:.0f}", f"{one.num_bytes}",
                f"{one.num_batches}" if dropped else "",
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
    After a quarter and a half of the stream (`num_rounds=3`) the worse half of the
    flows is dropped, but none within `log(number of flows) + 3` nats of the best. One
    that was dropped with a score a row above the best one's of all rows since then is
    taken up again: at its own pace it would have overtaken, so the stream has changed.

    The best is the flow of the highest score, or among those that only chance sets
    apart from it one that keeps more numbers of its information: an approximation is
    not taken for better than what it approximates without being so. Chance is
    two-sided, 95 %, of Student's t, from the differences between the scores of batches:
    less what the past says of it each has mean 0, so that their squares add up,
    whether or not the stream stands.

    The first batches, of which some flow predicts nothing yet since it has a dispersion
    to estimate, count for none. Bad rows are left out, with a `DataWarning` unless the
    flows drop them.

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
      TypeError: for what is no flow of `ff.fisher_flow`, as a sparse one.
      ValueError: without flows, for flows of several likelihoods, or where no score is
        finite or no row has a weight.

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
      Choe, Ramdas, "Comparing sequential forecasters", 2021.
      Dawid, "Present position and potential developments: the prequential approach",
      1984.
      Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter
      optimization", 2016.
    """
    flows = _checked(flows)
    checks.whole(num_rounds, "num_rounds")
    if not isinstance(batches, Stacked):
        check_loader(batches)
    stack = as_stack(batches, to_batch)
    count = len(stack.weights)
    ends = sorted({-(-count // 2**k) for k in range(num_rounds)})
    typed = None if key is None else typed_key(key)
    tracks = {name: _Track(flow, judge, params, typed) for name, flow in flows.items()}
    alive, start = list(tracks), 0
    for end in ends:
        for name in alive:
            tracks[name].run(stack, start, end)
        start = end
        first = max((tracks[name].first for name in alive), default=0)
        for name in tracks:
            leader = max((tracks[name] for name in alive), key=lambda t: t.score(first))
            if name not in alive and tracks[name].mean(first) > leader.mean(first):
                tracks[name].run(stack, tracks[name].num_batches, end)
                alive.append(name)
        if end < count:
            alive = _kept(alive, tracks, first)
    scores = {name: track.score(first) for name, track in tracks.items()}
    best = _best({name: tracks[name] for name in alive}, first)
    if not math.isfinite(scores[best]) or not tracks[best].weight(first):
        raise ValueError(
            "no flow has a finite score on these batches, of rows that have a weight: "
            f"{scores}."
        )
    ordered = sorted(
        tracks, key=lambda n: (n != best, -tracks[n].num_batches, -scores[n])
    )
    table = {name: tracks[name].told(tracks[best], first) for name in ordered}
    _warn(flows[best], tracks[best].state)
    return Ranking(best, tracks[best].state, table, count)


def _checked(flows: Any) -> dict[str, FisherFlow]:
    if not isinstance(flows, Mapping) or not flows:
        raise ValueError(
            "flows is a dict of at least one flow by its name, such as "
            f"{{'full': ff.fisher_flow(...)}}; got {checks.described(flows)}."
        )
    models: dict[Any, str] = {}
    for name, flow in flows.items():
        check_member(flow, f"flows[{name!r}]")
        models.setdefault(flow.recipe.likelihood, name)
    if len(models) > 1:
        (one, first), (other, second) = list(models.items())[:2]
        raise ValueError(
            f"flows[{first!r}] has the likelihood {one!r} and flows[{second!r}] "
            f"{other!r}: choose among flows of one."
        )
    return dict(flows)


def _warn(flow: FisherFlow, state: FlowState) -> None:
    rows = int(state.events.rows_skipped)
    if rows and flow.recipe.bad_rows == "raise":
        warn_once(
            state,
            f"of these batches {rows} rows were left out, for a value that is not "
            "finite or a target that cannot be.",
            "choose",
        )


def _kept(alive: list[str], tracks: dict[str, "_Track"], first: int) -> list[str]:
    """The better half, and whoever is near the best."""
    scores = {name: tracks[name].score(first) for name in alive}
    ordered = sorted(alive, key=lambda name: -scores[name])
    near = scores[ordered[0]] - _SLACK - math.log(len(tracks))
    half = set(ordered[: -(-len(ordered) // 2)])
    return [name for name in alive if name in half or scores[name] >= near]


def _best(tracks: dict[str, "_Track"], first: int) -> str:
    """Who keeps most of those that only chance sets apart from the highest."""
    from scipy.special import stdtrit  # a tenth of a second

    scores = {name: track.score(first) for name, track in tracks.items()}
    top = max(scores, key=lambda name: scores[name])

    def is_near(name: str) -> bool:
        below, error, count = tracks[name].below(tracks[top], first)
        chance = error * stdtrit(max(count - 1, 1), 0.975)
        return math.isfinite(below) and below <= chance

    near = [name for name in tracks if name == top or is_near(name)]
    return max(near, key=lambda name: (tracks[name].num_kept, scores[name]))


class _Track:
    """One flow on its way along the stream."""

    def __init__(
        self, flow: FisherFlow, judge: Callable, params: PyTree, key: Any
    ) -> None:
        self.state = flow.init(params, key=key)
        self.program = choices.compiled(choices.shared(_Judged(flow, judge)), _through)
        # of each batch: score, weight within the interval, evidence, weight
        self.seen = np.zeros((4, 0))
        self.seconds = 0.0

    def run(self, stack: Batch, start: int, end: int) -> None:
        given = self.state, stack, jnp.int32(start), jnp.int32(end)
        state, seen = jax.block_until_ready(self.program(*given))
        if not self.num_batches:
            begin = time.perf_counter()
            jax.block_until_ready(self.program(*given))
            self.seconds = (time.perf_counter() - begin) / (end - start)
        self.state = state
        part = np.asarray(seen, float)[:, start:end]
        self.seen = np.concatenate([self.seen, part], 1)

    @property
    def num_batches(self) -> int:
        return self.seen.shape[1]

    @property
    def first(self) -> int:
        """The first batch that it predicts; 0 where it predicts none."""
        return int(np.argmax(~np.isnan(self.seen[0])))

    @property
    def scores(self) -> np.ndarray:
        """Of each batch; what is no number says that anything may come."""
        return np.where(np.isnan(self.seen[0]), -np.inf, self.seen[0])

    def score(self, first: int, end: int | None = None) -> float:
        return float(self.scores[first:end].sum())

    def weight(self, first: int) -> float:
        return float(self.seen[3, first:].sum())

    def mean(self, first: int) -> float:
        """The score a row."""
        return self.score(first) / weight if (weight := self.weight(first)) else np.nan

    @property
    def num_kept(self) -> int:
        """Numbers of information."""
        return sum(x.size for x in jax.tree.leaves(self.state.information))

    def below(self, best: "_Track", first: int) -> tuple[float, float, int]:
        """Nats below another on the same rows, the standard error, and batches."""
        with np.errstate(invalid="ignore"):  # of infinities
            each = best.scores[first : self.num_batches] - self.scores[first:]
            each = each[self.seen[3, first:] > 0]
            if not each.any():
                return 0.0, 0.0, each.size
            spread = each.std(ddof=1) if each.size > 1 else np.inf
            return float(each.sum()), float(spread * each.size**0.5), each.size

    def told(self, best: "_Track", first: int) -> Candidate:
        _, within, evidence, weight = self.seen[:, first:].sum(1)
        leaves = jax.tree.leaves(self.state)
        below, error, _ = self.below(best, first)
        return Candidate(
            log_score=self.score(first) / weight,
            below_best=below,
            standard_error=error,
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


def _through(
    recipe: _Judged, state: FlowState, stack: Batch, start: jax.Array, end: jax.Array
) -> tuple[FlowState, jax.Array]:
    """The last state; of each batch score, hits, evidence and weight, `(4, count)`.

    Of the batches from `start` to `end`: one program for rounds of any length.
    """
    flow, judge = recipe.flow, recipe.judge
    model = flow.recipe.apply_fn, flow.recipe.likelihood
    together = model[1].observing is not None

    def step(index: jax.Array, carry: tuple) -> tuple[FlowState, jax.Array]:
        state, seen = carry
        batch = jax.tree.map(lambda x: x[index], stack)
        ahead = flow.advance(state, batch)
        judged, _ = flow.recipe.model.screen(state.mean, batch)(batch)
        # of examples that interact none is without a bad one: the batch is refused
        judged = judged._replace(weights=jnp.nan_to_num(judged.weights, nan=0.0))
        scores = judge(ahead, *model, judged)
        score = weighted_total(judged, scores, together=together)
        hits = _hits(ahead, model, judged)
        weight = weighted_total(judged, jnp.ones_like(scores), together=together)
        state, info = flow.update(state, batch)
        told = score, hits, info.log_evidence, weight
        column = jnp.stack([jnp.asarray(x, seen.dtype) for x in told])
        return state, seen.at[:, index].set(column)

    nothing = jnp.zeros((4, len(stack.weights)), state.log_evidence.dtype)
    return jax.lax.fori_loop(start, end, step, (state, nothing))


def _hits(state: FlowState, model: tuple[Callable, Any], batch: Batch) -> Any:
    """The weight of targets within their 90 % interval; NaN without normal errors."""
    if not model[1].normal_errors:
        return jnp.nan
    prediction = predict(state, model[0], model[1], batch.inputs)
    lower, upper = observation_interval(prediction, model[1], 0.9, state=state)
    within = ((batch.targets >= lower) & (batch.targets <= upper)).astype(lower.dtype)
    if model[1].observing is not None:  # the share of an example's targets
        there = observed(batch)[1]
        there = jnp.ones_like(within) if there is None else there.astype(within.dtype)
        axes = tuple(range(1, within.ndim))
        within = jnp.sum(within * there, axes) / jnp.maximum(jnp.sum(there, axes), 1)
        return weighted_total(batch, within, together=True)
    return weighted_total(batch, within)
