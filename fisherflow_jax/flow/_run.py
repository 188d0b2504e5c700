"""A flow over a stream of batches, one ahead of the device, that can be resumed."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax._ground import checks, processes, sharding
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.accumulation import (
    Saving,
    Source,
    converted,
    drive,
    laid_out,
    unaliased,
    with_bar,
)
from fisherflow_jax.flow import _belonging as belonging
from fisherflow_jax.flow import _step as step
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import FisherFlow

PyTree = Any


@checks.called_as(
    "run(flow, state, batches), and batches are a list of (inputs, targets): [(X, y)]"
)
def run(
    flow: Any,
    state: Any,
    batches: Iterable,
    *,
    progress: bool | None = None,
    checkpoint: Any = None,
    to_batch: Callable[[Any], Any] | None = None,
    mesh: Mesh | None = None,
    report: Callable[[Any], None] | None = None,
) -> Any:
    r"""A stream from disk, a loader or a list: `flow.update` over all its batches.

    .. math:: \text{state}_t, \text{info}_t = \text{update}(\text{state}_{t - 1},
       \text{batch}_t), \quad t = 1, \dots, T

    The update is one compiled program, which works in the memory of the state before.
    While it runs on the device, the loader is asked for the next batch: whichever takes
    longer sets the pace. What fits in memory may as well be one `jax.lax.scan` of
    `flow.update`.

    Args:
      flow: from `ff.fisher_flow` or `ff.bank`.
      state: where the stream begins: `flow.init(params)`, or of an earlier stream.
      batches: a list, a generator or a data loader of batches, `(inputs, targets)` or
        as `ff.Batch` takes them; or `ff.Stacked` of arrays `(num_batches, n, ...)`,
        which may lie in a file (`numpy.load(name, mmap_mode="r")`). One that is shorter
        than the longest so far is padded with rows of weight zero, and compiles nothing
        anew.
      progress: whether to show a bar (tqdm). None: on a terminal, once the run has
        taken two seconds. True draws it in a file, too, once a minute.
      checkpoint: an `orbax.checkpoint.CheckpointManager`, which says when to save and
        which steps to keep; a step is named by the batches that it has taken in. State
        and loader are saved together. If there is a step already, the run goes on from
        there, to the bit as if it had not been interrupted; `state` then says what a
        state looks like. The loader's place is what its iterator says (`get_state` and
        `set_state`, as grain's) or it says itself (`state_dict` and `load_state_dict`,
        as torchdata's); any other loader is read from its beginning, where it must give
        the same batches again, and those are passed over that were taken in.
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["image"], item["label"])`.
      mesh: None, or a `jax.sharding.Mesh` over all of whose devices the rows of each
        batch are spread; a state that does not lie on them is then whole on each. Of
        several processes each gives the rows that it has read, as to
        `ff.global_batches`; without a mesh each runs by itself.
      report: None, or a function that is told each batch's `info` in numpy, once it is
        known: `list.append`, or what looks for alarms.

    Returns:
      The state after the last batch. The state given stays as it is. Cost: that of the
      updates, and of reading two numbers of each; memory: the state given, the one that
      is worked in, and two batches.

    Warns:
      DataWarning: at the end, for rows that were left out and batches that moved
        nothing (`bad_rows="drop"`), and for a loader that ended before its length.

    Raises:
      ValueError: for bad rows, unless the flow drops them, and a result that is not
        finite, one batch later: nothing of them is in any checkpoint. For no batches
        at all; a checkpoint of another flow, of another stream, or that is not of
        `ff.run`.
      TypeError: for a checkpoint that is no manager, or what is no flow.
      ImportError: for `progress=True` without tqdm.

    Example:
      >>> import numpy as np
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda params, x: x @ params, ff.likelihoods.gaussian())
      >>> x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
      >>> y = x @ np.array([1.0, -1.0], np.float32)
      >>> loader = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1000, 64)]
      >>> state = ff.run(flow, flow.init(np.zeros(2, np.float32)), loader)
      >>> print(state.mean.round(2), state.count)
      [ 1. -1.] 1000.0
    """
    belonging.check_flow(flow)
    if isinstance(flow, FisherFlow):
        belonging.check_state(flow.recipe, state)
    if report is not None and not callable(report):
        raise TypeError(
            "report is a function that is told each batch's info, such as list.append; "
            f"got {checks.described(report)}."
        )
    on = sharding.automatic(mesh)
    source, keeper, taken = Source(batches), None, 0
    state = _own(state, on)
    if checkpoint is not None:
        from fisherflow_jax.flow._keeping import Keeper

        keeper = Keeper(checkpoint, flow, state, source)
        state, taken = keeper.restored()
    listener = _Listener(flow, report, keeper, state)
    items = with_bar(source, progress, "running", taken)
    longest = 0 if keeper is None else keeper.rows
    given = laid_out(converted(items, to_batch), on, longest)
    saving = None if keeper is None else Saving(keeper.due, keeper.save)
    try:
        state = drive(
            listener.step, state, given, listener.heard, start=taken, saving=saving
        )
    finally:
        if keeper is not None:
            keeper.wait()
    if source.given == 0:
        raise ValueError(
            "batches is empty, so there is nothing to learn from (a generator can be "
            "read only once)."
        )
    if keeper is not None:
        keeper.end(source.given, state)
    listener.tell(state, source)
    return state


def _own(state: Any, mesh: Mesh | None) -> Any:
    """A copy to work in, on the mesh if there is one."""

    def place(leaf: Any) -> Any:
        where = getattr(leaf, "sharding", None)
        if mesh is not None and len(getattr(where, "device_set", ())) != mesh.size:
            where = NamedSharding(mesh, PartitionSpec())
        return jax.device_put(unaliased(leaf), where, may_alias=False)

    return jax.tree.map(place, state)


def _program(flow: Any, state: Any) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The update, compiled, in the memory of the state before."""
    if checks.is_traced(state):  # derivatives are of every state
        return flow.update
    if isinstance(flow, FisherFlow):
        return functools.partial(step.take_over, flow.recipe)
    return jax.jit(flow.update, donate_argnums=0)


def _members(flow: Any, info: Any) -> list[tuple[Recipe | None, Any]]:
    """The recipes of a flow, or of a bank's, and what each reports."""
    infos = getattr(info, "members", (info,))
    flows = getattr(flow, "flows", (flow,))
    return [
        (getattr(one, "recipe", None), told)
        for one, told in zip(flows, infos, strict=True)
    ]


@dataclasses.dataclass
class _Listener:
    """Takes batches in, and hears what became of them a batch later."""

    flow: Any
    report: Callable[[Any], None] | None
    keeper: Any
    state: Any
    rows: int = 0
    rows_in: list[int] = dataclasses.field(default_factory=list)
    skipped: list[int] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.program = _program(self.flow, self.state)

    def step(self, state: Any, batch: Batch) -> tuple[Any, Any]:
        if self.keeper is not None:
            self.keeper.rows = batch.weights.shape[0]
        self.state, info = self.program(state, batch)
        return self.state, info

    def heard(self, number: int, batch: Batch, info: Any) -> None:
        if checks.is_traced(info):
            return
        members = _members(self.flow, info)
        rows = max(int(told.rows_skipped) for _, told in members)
        skipped = bool(info.skipped)
        if rows or skipped:
            self._refuse(number, batch, members)
        self.rows += rows
        self.rows_in += [number] * (rows > 0)
        self.skipped += [number] * skipped
        if self.report is not None:
            self.report(processes.on_host(info))

    def _refuse(self, number: int, batch: Batch, members: list) -> None:
        """Raises for what the batch has lost, unless flows drop it."""
        states = getattr(self.state, "members", (self.state,))
        for (recipe, info), state in zip(members, states, strict=True):
            if recipe is None or recipe.bad_rows == "drop":
                continue
            step.check_taken_in(recipe, state, batch, info, f"batch {number}")

    def tell(self, state: Any, source: Source) -> None:
        """Warns of what was lost."""
        lost = []
        if self.rows:
            lost.append(
                f"{self.rows} rows of {len(self.rows_in)} batches were left out, for a "
                "value that is not finite or a target that cannot be (the first in "
                f"batch {self.rows_in[0]})"
            )
        if self.skipped:
            lost.append(
                f"{len(self.skipped)} batches moved nothing, for a result that is not "
                f"finite (the first was batch {self.skipped[0]})"
            )
        if source.missing > 0:
            lost.append(
                f"the loader ended after {source.given} of the "
                f"{source.given + source.missing} batches that its length says"
            )
        if lost:
            warn_once(state, f"of this run {'; '.join(lost)}.", "run")
