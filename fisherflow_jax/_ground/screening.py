"""Bad rows of a batch, found before a model sees them: left out, or told by name.

A row is an example. Bad is a value that is not finite among its inputs, a weight that
is no multiplicity, a target that cannot be. A bad target among several costs that
target. What has weight zero may hold anything.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, processes, sharding, trees
from fisherflow_jax._ground.batch import Batch

PyTree = Any


def check_option(bad_rows: Any) -> None:
    """Raises unless it is "raise" or "drop"."""
    if bad_rows not in ("raise", "drop"):
        raise ValueError(
            'bad_rows is "raise" (an error where values are at hand) or "drop" (such '
            f"rows are left out); got {bad_rows!r}."
        )


# Two labels as they are found in data sets, what they should be, and how.
_CODES = {
    (-1, 1): (np.array([0.0, 1.0]), "(targets + 1) / 2"),
    (1, 2): (np.array([0.0, 1.0]), "targets - 1"),
}


@dataclasses.dataclass(frozen=True)
class Screen:
    """What tells bad rows of batches of one shape.

    Attributes:
      name: of the likelihood.
      support: `targets -> bool`; None: without targets.
      num_classes: classes that a target may be, if it is one.
      shape: of the log-probabilities, one a target.
      together: whether examples interact: then no row can be left out, and a bad one
        makes all weights NaN, so that nothing is made of the batch.
    """

    name: str = ""
    support: Callable | None = None
    num_classes: int | None = None
    shape: tuple[int, ...] = ()
    together: bool = True

    def __call__(self, batch: Batch) -> tuple[Batch, jax.Array]:
        """The batch without what is bad, and how many rows had it, `()` int32."""
        mask = batch.mask
        if mask is None and batch.weights.ndim < len(self.shape):
            mask = jax.tree.leaves(batch.targets)[0]
        like = batch._replace(mask=mask), jnp.zeros((), jnp.int32)
        return sharding.in_auto_mode(self._screened, like, batch)

    def _screened(self, batch: Batch) -> tuple[Batch, jax.Array]:
        weights, mask = batch.weights, batch.mask
        *faults, (_, _, bad) = self.faults(batch)
        possible = None
        if faults and faults[-1][0] == "targets":
            # of its targets one may be bad and others good
            possible = ~faults.pop()[2]
        for _, _, wrong in faults:
            bad = bad | _beside(weights, _any(wrong))
        given, kept = weights != 0, ~bad
        if possible is not None and (weights.ndim > 1 or possible.ndim == 1):
            fits = possible.shape == weights.shape
            bad = bad | ~(possible if fits else _beside(weights, _all(possible)))
            kept = ~bad
        elif possible is not None:
            counted = possible if mask is None else possible | ~mask
            bad = bad | ~_all(counted)
            mask = possible if mask is None else possible & mask
            kept = kept & _any(mask)
        skipped = _any(bad & given)
        if self.together:
            poisoned = jnp.where(jnp.any(skipped), jnp.nan, weights)
            return batch._replace(weights=poisoned), jnp.zeros((), jnp.int32)
        weights = jax.lax.select(kept, weights, jnp.zeros_like(weights))
        clean = batches.blank(batch._replace(weights=weights, mask=mask))
        return clean, jnp.sum(skipped, dtype=jnp.int32)

    def possible(self, batch: Batch) -> jax.Array | None:
        """Whether each target can be, `(n, ...)`; None without targets."""
        if self.support is None or batch.targets is None:
            return None
        leaves = jax.tree.leaves(batch.targets)
        parts = [
            jnp.isfinite(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        if hasattr(batch.targets, "dtype"):
            parts.append(self.support(batch.targets))
            if self.num_classes is not None:
                parts.append(batch.targets < self.num_classes)
        parts = [self._of_targets(part) for part in parts]
        return functools.reduce(jnp.logical_and, parts or [jnp.ones(self.shape, bool)])

    def _of_targets(self, condition: jax.Array) -> jax.Array:
        """One a target, of parts that may have further axes, or fewer."""
        axes = len(self.shape)
        if condition.shape[:axes] != self.shape:
            axes = 1
        return jnp.broadcast_to(_beside(self.shape, _all(condition, axes)), self.shape)

    def faults(self, batch: Batch) -> list[tuple[str, Any, jax.Array]]:
        """The batch's parts by name, their values, and where these are bad."""
        found = [
            (trees.parameter_name(path), leaf, ~jnp.isfinite(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(
                {"inputs": batch.inputs}, is_leaf=batches.is_shared
            )
            if not batches.is_shared(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        possible, weights = self.possible(batch), batch.weights
        if possible is not None:
            found.append(("targets", batch.targets, ~possible))
        return [*found, ("weights", weights, ~((weights >= 0) & (weights < jnp.inf)))]

    def refuse(self, given: Any, where: str = "the batch") -> None:
        """Raises for the first bad row of a batch as it was given, if it has one.

        Of a batch of several processes all have what is in it for their message.
        """
        batch = batches.by_name(processes.fetched(given))
        arrays = batches.map_inputs(trees.as_array, batch.inputs)
        targets = jax.tree.map(trees.as_array, batch.targets)
        weights = batch.weights
        if weights is None:
            parts = jax.tree.leaves((batches.split(arrays)[0], targets))
            weights = np.ones(parts[0].shape[:1])
        weights = np.asarray(weights).astype(float)
        batch = batch._replace(inputs=arrays, targets=targets, weights=weights)
        bad, first = np.zeros(weights.shape[0], bool), None
        for name, values, wrong in self.faults(batch):
            used = _any(weights != 0) if name.startswith("inputs") else weights != 0
            used = used if used.shape == wrong.shape else _beside(wrong, _any(used))
            places = np.argwhere(np.asarray(wrong) & used)  # of jax, 20 programs
            if len(places) and (first is None or places[0][0] < first[2][0]):
                first = name, values, tuple(map(int, places[0]))
            bad[places[:, 0]] = True
        if first is None:
            return
        hint = self._of_labels(batch, first[0])
        others = [str(row) for row in np.flatnonzero(bad) if row != first[2][0]]
        rest = f" and {len(others) - 5} more" if len(others) > 5 else ""
        more = f", and bad are rows {', '.join(others[:5])}{rest}" if others else ""
        raise ValueError(
            f"row {first[2][0]} of {where} has {self._told(*first)}{more}. "
            f"{self._way_out}{hint}"
        )

    def refuse_made(self, batch: Batch, made: tuple, where: str) -> None:
        """Raises for the first row of which the model has made, as `(outputs,
        log-probabilities)`, what is not finite."""
        wrong = ~jnp.isfinite(made[1])
        for used in (batch.weights > 0, *jax.tree.leaves(batch.mask)):
            fits = used.shape == wrong.shape[: used.ndim]
            wrong = wrong & _beside(wrong, used if fits else _any(used))
        rows = np.flatnonzero(processes.on_host(_any(wrong)))
        if rows.size:
            own = checks.shown(processes.on_host(made[0])[rows[0]])
            raise ValueError(
                f"row {rows[0]} of {where} ({rows.size} in all) has finite inputs, and "
                f"by its outputs, {own}, a log-probability that is not finite: an "
                "exposure of 0, a masked class, an overflow. Mend it or give it weight "
                "0; under jit the batch is skipped and counted."
            )

    def _told(self, name: str, values: Any, place: tuple) -> str:
        entry = f"{name}[{', '.join(map(str, place))}]"
        value = np.asarray(values)[place] if hasattr(values, "shape") else "a value"
        if not name.startswith("targets") or not np.all(np.isfinite(value)):
            rule = "is no multiplicity" if name == "weights" else "is not finite"
        elif self.num_classes is None:
            rule = f"{self.name} cannot produce"
        else:
            rule = f"is none of the model's {self.num_classes} classes"
        return f"{entry} = {value}, which {rule}"

    def _of_labels(self, batch: Batch, name: str) -> str:
        """What labels look like that are none of the classes."""
        if not name.startswith("targets") or not hasattr(batch.targets, "dtype"):
            return ""
        labels = np.unique(np.asarray(batch.targets)[np.asarray(batch.weights) > 0])
        if not np.all(np.isfinite(labels)):
            return ""
        count, least, most = self.num_classes, labels[0], labels[-1]
        if count is None:
            code = _CODES.get(tuple(labels.tolist()))
            if code is None or self.support is None or not self.support(code[0]).all():
                return ""
            return f" The targets are {least} and {most}: give {code[1]}."
        if least == 1 and most == count:
            return (
                f" The labels run from 1 to {count}, and classes are counted from 0: "
                "give targets - 1."
            )
        wrong = labels[(labels < 0) | (labels >= count)]
        shown = ", ".join(map(str, wrong[:5])) + ", ..." * (len(wrong) > 5)
        return (
            f" Classes are 0 to {count - 1}; labels that are none of them: {shown}. "
            "Of a class more give the model an output more; what marks a target as "
            "missing (-1, -100) has weight 0 instead."
        )

    @property
    def _way_out(self) -> str:
        if self.together:
            return (
                "The model's examples interact, so that none can be left out: mend "
                "the row (under jit such a batch is refused and counted)."
            )
        return (
            "Mend the row or give it weight 0; under jit, and with "
            'bad_rows="drop", such rows are left out and counted.'
        )


# one program in place of one an operation
@functools.partial(jax.jit, static_argnums=0)
def at_hand(screen: Screen, batch: Batch) -> tuple[Batch, jax.Array, jax.Array]:
    """What a screen gives, and whether it found nothing."""
    clean, skipped = screen(batch)
    return clean, skipped, (skipped == 0) & jnp.isfinite(clean.weights).all()


count_at_hand = jax.jit(lambda screen, batch: screen(batch)[1], static_argnums=0)


def _any(values: jax.Array) -> jax.Array:
    """Of each row, `(n,)`."""
    return values.any(axis=tuple(range(1, values.ndim))) if values.ndim > 1 else values


def _all(values: jax.Array, axes: int = 1) -> jax.Array:
    """Of each row, or over all but the first axes."""
    rest = tuple(range(axes, values.ndim))
    return values.all(axis=rest) if rest else values


def _beside(values: Any, rows: jax.Array) -> jax.Array:
    """Rows with as many axes as the values, or as the shape."""
    ndim = len(values) if isinstance(values, tuple) else values.ndim
    return rows.reshape(rows.shape + (1,) * (ndim - rows.ndim))
