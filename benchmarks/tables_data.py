"""The data of the tables: what ships with packages, or a file; splits and shifts."""

import csv
import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import classifiers
import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

BATCH = 32
TEST, VALIDATION = 0.3, 0.2
TURN, PIXEL_NOISE, FEATURE_NOISE = 15.0, 4.0, 0.5
apply_fn = functools.partial(classifiers.apply_dense, jnp.tanh)


class Table(NamedTuple):
    """Rows of features and their classes, and how its inputs are shifted."""

    name: str
    inputs: np.ndarray
    labels: np.ndarray  # 0, 1, ...
    width: int  # of the network's hidden layer
    shifts: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]
    alike: bool = False  # all columns in one unit, as pixels are

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.inputs.shape[1], self.width, int(self.labels.max()) + 1


class Split(NamedTuple):
    """What one seed draws; of several seeds, each leaf is stacked."""

    train: tuple  # inputs, labels: a whole number of batches
    validation: tuple
    tests: dict[str, jax.Array]  # inputs by shift, "test" as they are
    labels: jax.Array  # of all tests
    params: Any
    key: jax.Array


# ---- tables


def digits(width: int) -> Table:
    images, labels = load_digits(return_X_y=True)
    shifts = {"rotated": _turned, "noised": functools.partial(_noised, PIXEL_NOISE)}
    return Table("digits", images, labels, width, shifts, alike=True)


def cancer(width: int) -> Table:
    inputs, labels = load_breast_cancer(return_X_y=True)
    return _of_columns("breast cancer", inputs, labels, width)


def segments(width: int) -> Table:
    """From river's wheel, read as the file that it is: river is not imported.

    Installed by `pip install --no-deps river` or with what it needs.
    """
    from importlib.metadata import files

    (path,) = (p for p in files("river") or () if p.name == "segment.csv.zip")
    with zipfile.ZipFile(path.locate()) as held:
        lines = held.read("segment.csv.zip").decode().splitlines()
    return _of_lines("image segments", lines, width)


def from_file(path: Path, width: int) -> Table:
    """A CSV file with a header, its last column the class; or an npz of `x` and `y`.

    Images of an npz, `(n, ...)`, are flattened, and their pixels standardised alike.
    """
    if path.suffix == ".npz":
        with np.load(path) as held:
            inputs, labels = held["x"], held["y"]
        rows = inputs.reshape(len(inputs), -1).astype(np.float64)
        made = _of_columns(path.stem, rows, _numbered(labels), width)
        return made._replace(alike=inputs.ndim > 2)
    return _of_lines(path.stem, path.read_text().splitlines(), width)


def thinned(table: Table, num_rows: int | None) -> Table:
    """At most so many of its rows, drawn at random; None: all."""
    if num_rows is None or num_rows >= len(table.labels):
        return table
    kept = np.random.default_rng(0).permutation(len(table.labels))[:num_rows]
    return table._replace(inputs=table.inputs[kept], labels=table.labels[kept])


def _of_lines(name: str, lines: list[str], width: int) -> Table:
    rows = list(csv.reader(lines))[1:]
    inputs = np.array([row[:-1] for row in rows], np.float64)
    labels = _numbered(np.array([row[-1] for row in rows]))
    return _of_columns(name, inputs, labels, width)


def _numbered(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _of_columns(name: str, inputs: Any, labels: Any, width: int) -> Table:
    """Noise is in standard deviations of each column."""
    spread = inputs.std(0)

    def noised(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return _noised(FEATURE_NOISE * spread, rows, rng)

    return Table(name, inputs, labels, width, {"noised": noised})


def _noised(scale: Any, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rows + scale * rng.standard_normal(rows.shape)


def _turned(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images by some degrees, each to a side of its own."""
    images, sides = rows.reshape(-1, 8, 8), rng.choice([-1, 1], len(rows))
    turned = [
        scipy.ndimage.rotate(image, side * TURN, reshape=False, order=1)
        for image, side in zip(images, sides, strict=True)
    ]
    return np.stack(turned).reshape(rows.shape)


# ---- splits


def split(table: Table, seed: int) -> Split:
    """70 / 30, stratified; of the 70 the first batches train, the rest validate.

    A fifth validates, and up to 31 rows more, so that batches are whole. Features are
    standardised on the rows that train; of images all pixels alike.
    """
    rng = np.random.default_rng(seed)
    kept, test, labels, test_labels = train_test_split(
        table.inputs,
        table.labels,
        test_size=TEST,
        random_state=seed,
        stratify=table.labels,
    )
    count = int((1 - VALIDATION) * len(labels)) // BATCH * BATCH
    train, validation, train_labels, validation_labels = train_test_split(
        kept, labels, train_size=count, random_state=seed, stratify=labels
    )
    axis = None if table.alike else 0
    center, spread = train.mean(axis), train.std(axis)
    spread = np.where(spread > 0, spread, 1.0)  # a column that is always the same

    def ready(rows: np.ndarray) -> np.ndarray:
        return ((rows - center) / spread).astype(np.float32)

    tests = {"test": ready(test)}
    tests |= {name: ready(shift(test, rng)) for name, shift in table.shifts.items()}
    key = jax.random.key(seed)
    return Split(
        (ready(train), train_labels.astype(np.int32)),
        (ready(validation), validation_labels.astype(np.int32)),
        tests,
        test_labels.astype(np.int32),
        classifiers.dense_layers(jax.random.fold_in(key, 0), table.sizes),
        jax.random.fold_in(key, 1),
    )


def splits(table: Table, num_seeds: int) -> Split:
    """Of the seeds 0, 1, ..., stacked."""
    each = [split(table, seed) for seed in range(num_seeds)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def of_seed(splits: Split, seed: int) -> Split:
    return jax.tree.map(lambda x: x[seed], splits)


def batches(split: Split, key: jax.Array, num_passes: int) -> tuple:
    """`(steps, BATCH, ...)`: each pass in an order of its own."""
    count = len(split.train[1])
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(
        jax.random.split(key, num_passes)
    )
    rows = orders.reshape(-1, BATCH)
    return jax.tree.map(lambda x: x[rows], split.train)
