"""One batch ahead of the device: the next is read while one is taken in."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.accumulation import _loading as loading

PyTree = Any


class Saving(NamedTuple):
    """When a run stops for a moment, and what it does then.

    Attributes:
      due: `number of batches -> bool`, asked once each, after the batch was read.
      save: `(number of batches, state)`, once these are taken in and heard of.
    """

    due: Callable[[int], bool]
    save: Callable[[int, Any], None]


def drive(
    step: Callable[[Any, Batch], tuple[Any, Any]],
    state: Any,
    batches: Iterable[Batch],
    heard: Callable[[int, Batch, Any], None],
    *,
    start: int = 0,
    saving: Saving | None = None,
) -> Any:
    """The state after all batches, of a `step` that JAX dispatches and does not await.

    `heard(number, batch, report)` reads the report of a step, and so waits for it; it
    is called when the step after that is on its way. So one step is in flight whenever
    the loader is asked for a batch, and memory holds no queue of them.
    """
    before: tuple[int, Batch, Any] | None = None
    for number, batch in enumerate(batches, start):
        batch = _put(batch)
        state, report = step(state, batch)
        if before is not None:
            heard(*before)
        if not checks.is_traced(batch):  # a loader may write over what it gave
            jax.block_until_ready(batch)
        before = number, batch, report
        if saving is not None and saving.due(number + 1):
            heard(*before)
            before = None
            saving.save(number + 1, state)
    if before is not None:
        heard(*before)
    return state


def _put(batch: Batch) -> Batch:
    """The batch with the host's arrays copied to the device, which is not awaited."""
    if jax.process_count() > 1:  # a compiled step takes them for everybody's
        return batch
    return jax.device_put(jax.tree.map(unaliased, batch))


def unaliased(x: Any) -> Any:
    """An array that `jax.device_put` will copy, if it is told to.

    Of numpy's it takes the memory itself where the device is the host, told or not.
    """
    in_place = isinstance(x, np.ndarray) and jax.default_backend() == "cpu"
    return np.array(x) if in_place else x


class _Slices:
    """The batches of a stack, cut off as they are asked for."""

    def __init__(self, stacked: loading.Stacked) -> None:
        self.stack = loading.stack_of_batches(stacked, 1)

    def __iter__(self) -> Iterator[Batch]:
        return loading.each_of(self.stack)

    def __len__(self) -> int:
        return len(self.stack.weights)


class Source:
    """What a loader gives, item by item, and where it stands: to go on from there.

    A loader is told where to go on by what it says of itself: `get_state` and
    `set_state` of its iterator (grain), `state_dict` and `load_state_dict` of its own
    (torchdata). Any other is read from its beginning.

    Attributes:
      given: items given, those before a start among them.
      noted: places by the number of items given, of numbers that are `due`.
    """

    def __init__(self, loader: Any) -> None:
        if isinstance(loader, loading.Stacked):
            loader = _Slices(loader)
        loading.check_loader(loader)
        self.loader, self.given = loader, 0
        self.due: Callable[[int], bool] = lambda given: False
        self.noted: dict[int, Any] = {}
        self.items: Any = None

    def start(self, given: int, place: Any, ended: bool) -> None:
        """Goes to a place, or past as many items where there is none.

        `ended`: the place is the end, from where torchdata would begin anew.

        Raises:
          ValueError: for a loader that has fewer.
        """
        self.given = given
        has_own = hasattr(self.loader, "load_state_dict")
        if has_own:
            self.loader.load_state_dict(place)
        self.items = iter(() if has_own and ended else self.loader)
        if has_own:
            return
        if place is not None:
            self.items.set_state(place)
            return
        for index in range(given):
            if next(self.items, self) is self:
                raise ValueError(
                    f"the loader ended after {index} of the {given} batches that the "
                    "checkpoint has taken in. It is another one, or an iterator that "
                    "was read before: give what the run was begun with."
                )

    def place(self) -> Any:
        """Where the loader stands; None: it does not say."""
        if hasattr(self.loader, "load_state_dict"):
            return self.loader.state_dict()
        if hasattr(self.items, "set_state"):
            return self.items.get_state()
        return None

    def __iter__(self) -> Iterator:
        if self.items is None:
            self.items = iter(self.loader)
        for item in self.items:
            self.given += 1
            if self.due(self.given):
                self.noted[self.given] = self.place()
            yield item

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def missing(self) -> int:
        """Items that a loader's length promises, beyond those given."""
        try:
            return len(self) - self.given
        except TypeError:
            return 0
