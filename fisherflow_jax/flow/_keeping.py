"""Checkpoints of a run: the state and the loader's place, in one step of Orbax."""

import base64
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fisherflow_jax._ground import checks, trees
from fisherflow_jax.accumulation import Source
from fisherflow_jax.flow._identity import choices_of, differing

PyTree = Any


class Keeper:
    """What restores a run from a manager's last step, and saves it there.

    Args:
      manager: an Orbax `CheckpointManager`, which says when to save and what to keep.
      flow: whose run it is.
      state: where the run begins: its form is that of the checkpoints.
      source: the batches.

    Attributes:
      rows: of the longest batch so far, to which shorter ones are padded.
    """

    def __init__(self, manager: Any, flow: Any, state: Any, source: Source) -> None:
        if not isinstance(manager, ocp.CheckpointManager):
            raise TypeError(
                "checkpoint is an orbax.checkpoint.CheckpointManager, which knows the "
                "folder, when to save and what to keep: ocp.CheckpointManager(folder, "
                "options=ocp.CheckpointManagerOptions(save_interval_steps=100)); got "
                f"{checks.described(manager)}."
            )
        if checks.is_traced(state):
            raise ValueError(
                "checkpoint= keeps values: call ff.run outside of jax.jit."
            )
        self.manager, self.source, self.state, self.rows = manager, source, state, 0
        first = getattr(state, "members", (state,))[0]
        self.known: dict[str, Any] = {
            "flow": choices_of(flow),
            "began": int(getattr(first, "step", 0)),
            "form": {
                name: f"{leaf.dtype}{list(leaf.shape)}"
                for name, leaf in trees.named_leaves(state)
            },
        }
        source.due = manager.should_save

    def restored(self) -> tuple[Any, int]:
        """The state to go on from, and how many batches it has taken in."""
        step = self.manager.latest_step()
        if step is None:
            return self.state, 0
        known = self._read(step, run=ocp.args.JsonRestore())["run"]
        self._check(known, f"the checkpoint of step {step} in {self.manager.directory}")
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.state)
        state, loader = ocp.args.StandardRestore(like), _Restore()
        found = self._read(step, state=state, loader=loader)
        self.rows = known["rows"]
        self.source.start(step, _read(found["loader"]), known["ended"])
        return found["state"], step

    def due(self, taken: int) -> bool:
        return taken in self.source.noted

    def save(self, taken: int, state: Any, *, ended: bool = False) -> None:
        """Writes a step, in the background where the manager does."""
        place = self.source.place() if ended else self.source.noted.pop(taken)
        more = {"rows": self.rows, "ended": ended}
        items = {
            "state": ocp.args.StandardSave(state),
            "loader": _Save(_written(place)),
            "run": ocp.args.JsonSave({**self.known, **more}),
        }
        # the manager was asked when the batch was read
        self.manager.save(taken, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Until what was saved is on disk; of several processes one may be lost."""
        if jax.process_count() == 1:
            self.manager.wait_until_finished()

    def end(self, taken: int, state: Any) -> None:
        """The last step, on disk when this returns."""
        if self.manager.latest_step() != taken:
            self.save(taken, state, ended=True)
        self.manager.wait_until_finished()

    def _read(self, step: int, **items: Any) -> Any:
        where = self.manager.directory / str(step)
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except (KeyError, FileNotFoundError, json.JSONDecodeError) as error:
            raise ValueError(
                f"step {step} in {self.manager.directory} is no checkpoint of ff.run, "
                f"or one of which something is lost ({', '.join(items)}): give the run "
                f"a folder of its own, or delete {where} to go on from the step before."
            ) from error

    def _check(self, known: dict[str, Any], where: str) -> None:
        way_out = "Go on with what it was begun with, or give the run another folder."
        form: dict[str, str] = self.known["form"]
        for name in known["form"] | form:
            one, other = (x.get(name, "nothing") for x in (known["form"], form))
            if one != other:
                raise ValueError(
                    f"{where} is another flow's: its {name} is {one}, and that of this "
                    f"run's state {other}. {way_out}"
                )
        told = known["flow"]  # of an earlier version, a line
        told = told if isinstance(told, dict) else {"flow": told}
        differs = differing(told, self.known["flow"])
        if differs:
            raise ValueError(
                f"{where} is another flow's: {'; '.join(differs)}. {way_out}"
            )
        if known["began"] != self.known["began"]:
            raise ValueError(
                f"{where} is of a run that began from a state with {known['began']} "
                f"updates; this one begins from one with {self.known['began']}. "
                f"{way_out}"
            )


class _Places(ocp.JsonCheckpointHandler):
    """A loader's place, as JSON: each process has its own part of the data.

    The file has the name that grain gives it. Not a handler of its own, which would be
    waited for among others that work in the background.
    """

    def __init__(self) -> None:
        everywhere = ocp.options.MultiprocessingOptions(primary_host=None)
        own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        super().__init__(own, multiprocessing_options=everywhere)

    def restore(self, directory: Any, *args: Any, **options: Any) -> Any:
        files = sorted(Path(directory).glob("process_*"))  # beside Orbax's own
        if self._filename in [file.name for file in files]:
            return super().restore(directory)
        if all(file.read_text() == "null" for file in files):
            return None  # loaders that are read from their beginning
        raise ValueError(
            f"the checkpoint has no place in the stream for process "
            f"{jax.process_index()} of {jax.process_count()}, but "
            f"{', '.join(file.name for file in files)}: loaders that say where they "
            "stand go on in as many processes as they had."
        )


def _written(place: Any) -> Any:
    """A place as JSON keeps it."""
    if _is_plain(place) and not _is_pickled(place):
        return place
    return {"pickle": base64.b64encode(pickle.dumps(place)).decode()}


def _read(kept: Any) -> Any:
    if _is_pickled(kept):
        return pickle.loads(base64.b64decode(kept["pickle"]))
    return kept


def _is_pickled(kept: Any) -> bool:
    return isinstance(kept, dict) and list(kept) == ["pickle"]


def _is_plain(place: Any) -> bool:
    """Whether JSON gives it back as it is: no tuples, bytes or numbers as keys."""
    try:
        return json.loads(json.dumps(place)) == place
    except TypeError:
        return False


@ocp.args.register_with_handler(_Places, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    item: Any


@ocp.args.register_with_handler(_Places, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.CheckpointArgs):
    pass
