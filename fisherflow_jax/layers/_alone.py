"""Whether a model gives an example alone what it gives it in a batch, by values."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, processes, trees
from fisherflow_jax.layers._compat import as_function

PyTree = Any


class Undecided(ValueError):
    """Neither the program nor values say whether a model's examples interact.

    Example:
      >>> import fisherflow_jax as ff
      >>> issubclass(ff.layers.Undecided, ValueError)
      True
    """

    def __init__(self, lost: str, why: str) -> None:
        self.lost = lost
        super().__init__(
            "whether examples of the model interact cannot be told: they cannot be "
            f"followed through {lost}, and {why}. Say which, to find_layers and to "
            "estimators: batched=True runs whole batches, batched=False each example "
            "for itself; or let ff.testing.check_examples(apply_fn, params, inputs) "
            "find it out, once, on arrays at hand."
        )


class Compared(NamedTuple):
    """The rows of a batch against the same rows, each of them alone."""

    rows: tuple[int, ...]  # that differ
    largest: float  # difference
    failure: str | None = None  # why no row could be given alone
    alike: bool = False  # all rows have the same inputs, which tells nothing

    @property
    def reason(self) -> str | None:
        """What shows that examples interact, if anything does."""
        if self.failure:
            return f"it {self.failure}"
        return f"row {self.rows[0]} alone has another output" if self.rows else None


# What values said of a function, for shapes of one example: a reason, or None.
_SAID: weakref.WeakKeyDictionary[Any, dict[Any, str | None]] = (
    weakref.WeakKeyDictionary()
)


def said(apply_fn: Callable, params: PyTree, inputs: PyTree) -> str | None:
    """What values have shown of a model's examples, None: that they do not interact.

    Raises:
      KeyError: if they have not been asked.
    """
    try:
        return _SAID[apply_fn][_shapes(params, inputs)]
    except TypeError:  # no function that can be held weakly
        raise KeyError from None


def decide(apply_fn: Callable, params: PyTree, inputs: PyTree, lost: str) -> str | None:
    """As `said`, from the values that are at hand; noted for later.

    Raises:
      Undecided: where they are not, or tell nothing.
    """
    if checks.is_traced((params, inputs)) or _are_shapes((params, inputs)):
        raise Undecided(lost, "values, which would tell, are not at hand")
    with jax.ensure_compile_time_eval():
        found = compared(apply_fn, *processes.fetched((params, inputs)))
    if found.reason is None and found.alike:
        raise Undecided(lost, "all rows of the inputs are alike")
    reason = found.reason and f"not followed through {lost}; {found.reason}"
    note(apply_fn, params, inputs, reason)
    return reason


def note(
    apply_fn: Callable, params: PyTree, inputs: PyTree, reason: str | None
) -> None:
    """Keeps what values have shown, as long as the function lives.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     return x @ params
      >>> ff.layers.note(
      ...     apply_fn, jnp.ones(2), jnp.eye(2), None
      ... )  # its examples do not interact
    """
    try:
        known = _SAID.setdefault(apply_fn, {})
    except TypeError:
        return
    known[_shapes(params, inputs)] = reason


def compared(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Compared:
    """`f(x)[i]` against `f(x[i:i+1])[0]`, at these values and at others near them.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> found = ff.layers.compared(
      ...     lambda p, x: x - x.mean(0), jnp.ones(1), jnp.array([[1.0], [2.0]])
      ... )
      >>> found.rows
      (0, 1)
    """
    run = _both(apply_fn, params, inputs)
    try:
        jax.eval_shape(run, params, inputs)
    except OneAlone as error:
        return Compared((), 0.0, failure=error.what)
    generator = np.random.default_rng(0)
    # zeros, and rows that are alike, hide what depends on them
    near = (
        _moved(params, generator),
        batches.map_inputs(lambda x: _moved(x, generator), inputs),
    )
    rows: set[int] = set()
    largest = 0.0
    with jax.default_matmul_precision("highest"):
        for at in ((params, inputs), near):
            whole, each = map(jax.tree.leaves, run(*at))
            for pair in zip(whole, each, strict=True):
                differing, most = _differing(*map(np.asarray, pair))
                rows |= differing
                largest = max(largest, most)
    return Compared(tuple(sorted(rows)), largest, alike=_alike(near[1]))


class OneAlone(ValueError):
    """An example alone is not what the model takes, or gives it no row of outputs.

    Example:
      >>> import fisherflow_jax as ff
      >>> issubclass(ff.layers.OneAlone, ValueError)
      True
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"apply_fn {what}. An example is given to the model alone, as a batch of "
            "one. Where it needs the others, or the size of the batch is written into "
            "the model, batched=True (of find_layers and of estimators) runs whole "
            "batches."
        )


def one_row(outputs_of: Callable[[], PyTree], one: PyTree) -> PyTree:
    """The outputs of one example, or their shapes: a row.

    Raises:
      OneAlone: where the model fails on one example, or gives it other than one row.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> row = jnp.ones((1, 2))
      >>> ff.layers.one_row(lambda: row @ jnp.ones(2), row)
      Array([2.], dtype=float32)
    """
    try:
        outputs = outputs_of()
    except Exception as error:
        if "batched=True" in str(error):  # it says so itself
            raise
        shapes = [tuple(x.shape) for x in batches.split(one)[0]]
        what = f"fails on one example alone, of shapes {shapes}"
        raise OneAlone(f"{what}: {error.__cause__ or error}") from error
    check_rows(outputs)
    return outputs


def check_rows(outputs: PyTree) -> None:
    """Raises where outputs of one example are not one row."""
    for shape in (tuple(leaf.shape) for leaf in jax.tree.leaves(outputs)):
        if shape[:1] != (1,):
            raise OneAlone(
                f"gives one example alone outputs of shape {shape}, not one row"
            )


def _both(apply_fn: Callable, params: PyTree, inputs: PyTree) -> Callable:
    """`(params, inputs)` -> outputs of the batch, and of each of its rows alone."""
    rebuild_all = trees.arrays_of((params, inputs))[1]

    @jax.jit
    def run(arrays: list) -> tuple[PyTree, PyTree]:
        params, inputs = rebuild_all(arrays)
        parts, rebuild = batches.split(inputs)

        def alone(parts: list) -> PyTree:
            row = rebuild([x[None] for x in parts])
            outputs = one_row(lambda: apply_fn(params, batches.unshare(row)), row)
            return jax.tree.map(lambda x: x[0], outputs)

        whole = apply_fn(params, batches.unshare(inputs))
        return whole, jax.lax.map(alone, parts)

    return lambda *at: run(trees.arrays_of(at)[0])


def moves(function: Callable, params: PyTree, inputs: PyTree) -> bool:
    """Whether parameters move any entry, at made-up values of these shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> print(ff.layers.moves(lambda p, x: x @ p, jnp.ones(2), jnp.ones((3, 2))))
      True
      >>> print(ff.layers.moves(lambda p, x: x, jnp.ones(2), jnp.ones((3, 2))))
      False
    """
    generator = np.random.default_rng(0)

    def made_up(x: Any) -> Any:
        if not trees.is_array(x) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return np.zeros(x.shape, x.dtype)
        return generator.uniform(0.5, 1.5, x.shape).astype(x.dtype)

    def weighed(params: PyTree, inputs: PyTree) -> jax.Array:
        entries = function(params, inputs)
        weights = generator.normal(size=entries.shape)
        return jnp.vdot(entries, jnp.asarray(weights, entries.dtype))

    arrays, rebuild = trees.arrays_of(jax.tree.map(made_up, (params, inputs)))
    slopes = jax.make_jaxpr(lambda *x: jax.grad(weighed)(*rebuild(x)))(*arrays)
    if checks.is_traced((slopes.consts, arrays)):  # what a trace closes over
        return False
    with jax.ensure_compile_time_eval():
        found = processes.on_host(jax.jit(as_function(slopes))(*arrays))
    return any(np.any(np.isfinite(x) & (x != 0)) for x in found)


def _moved(tree: PyTree, generator: np.random.Generator) -> PyTree:
    """Floating-point arrays at other values near theirs."""

    def moved(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = np.asarray(x).astype(float)
        noise = generator.normal(size=values.shape)
        return jnp.asarray(values + 0.1 * (1 + np.abs(values)) * noise, x.dtype)

    return jax.tree.map(
        lambda x: x if batches.is_shared(x) else moved(x),
        tree,
        is_leaf=batches.is_shared,
    )


def _differing(whole: np.ndarray, each: np.ndarray) -> tuple[set[int], float]:
    """The rows that are not the same up to rounding, and their largest difference."""
    step = float(jnp.finfo(whole.dtype).eps) if _is_real(whole) else 0.0
    wide = complex if whole.dtype.kind == "c" else float
    whole, each = whole.astype(wide), each.astype(wide)
    same = (whole == each) | (np.isnan(whole) & np.isnan(each))
    gap = np.abs(np.subtract(whole, each, where=~same, out=np.zeros_like(whole)))
    sizes = np.where(np.isfinite(whole), np.abs(whole), 0)
    allowed = np.sqrt(step) * sizes.max(0, initial=0) + 10 * step * sizes.max(initial=0)
    wrong = ~(gap <= allowed)  # NaN against a number too
    rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
    most = float(np.nan_to_num(gap, nan=np.inf).max(initial=0, where=wrong))
    return set(map(int, rows)), most


def _is_real(values: np.ndarray) -> bool:
    return jnp.issubdtype(values.dtype, jnp.inexact)


def _alike(inputs: PyTree) -> bool:
    """Whether all rows hold the same numbers, as far as these can be compared."""
    parts = batches.split(inputs)[0]
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in parts):
        return False
    return all((np.asarray(x) == np.asarray(x[:1])).all() for x in parts)


def _shapes(params: PyTree, inputs: PyTree) -> Any:
    """Of the parameters and of one example."""
    one = batches.map_inputs(lambda x: np.shape(x)[1:], inputs, lambda node: None)
    return str(jax.tree.map(np.shape, params)), str(one)


def _are_shapes(tree: PyTree) -> bool:
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
