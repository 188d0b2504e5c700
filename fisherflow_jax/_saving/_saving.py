"""`ff.save` and `ff.load`."""

import os
from pathlib import Path
from typing import Any

import jax

from fisherflow_jax._saving import _container as container
from fisherflow_jax._saving._container import Fault
from fisherflow_jax._saving._reading import Reader
from fisherflow_jax._saving._writing import Writer
from fisherflow_jax.flow import check_belongs, choices_of, differing

# Of this version. A later one reads all that went before.
FORMAT = 1
# Differences that an error names.
_MOST_TOLD = 5


def save(path: str | os.PathLike[str], state: Any, *, flow: Any = None) -> None:
    """Writes a state to one file, from which `ff.load` makes it again, to the bit.

    A state is that of any flow (also of a bank, a sparse flow), a posterior, what
    `ff.laplace`, `ff.calibrate`, `ff.accumulate` or `ff.smooth` returned, or a pytree
    of such. The file is a zip of `.npy` arrays, as `numpy.load` opens it, under a
    header in JSON that says what they are parts of. Nothing in it is pickled, and no
    function is written: of `apply_fn` and the choices it has the names alone.

    Args:
      path: of the file, as it is: no ending is added. A file that is there is replaced,
        at once and whole: whoever reads meanwhile has the old one or the new one.
      state: what to keep. Arrays that lie on several devices are written whole.
      flow: whose state it is, if it is a flow's: its choices are written too, in words,
        for `ff.load` to compare.

    Raises:
      ValueError: for a state of another flow, and for traced values.
      TypeError: for what holds anything but arrays, numbers and strings.

    Cost: one copy of the state on the host. Of several processes all call it, and the
    first one writes. For a stream's state and its loader's place together, again and
    again, take `ff.run(..., checkpoint=)`.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.bernoulli())
      >>> state = flow.init(jnp.zeros(2))
      >>> state, _ = flow.update(state, (jnp.eye(2), jnp.array([1.0, 0.0])))
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.npz"
      >>> ff.save(path, state, flow=flow)
      >>> again = ff.load(path, flow=flow)
      >>> print(ff.standard_error(again), bool(jnp.all(again.mean == state.mean)))
      [0.9 0.9] True
      >>> other = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.poisson())
      >>> ff.load(path, flow=other)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: ...its likelihood is bernoulli(...), and this one's is poisson(...)...
    """
    choices = None
    if flow is not None:
        check_belongs(flow, state)
        choices = choices_of(flow)
    writer = Writer()
    node = writer.node(state, "state")
    if jax.process_index() == 0:
        header = {
            "format": FORMAT,
            "flow": choices,
            "tables": writer.tables,
            "state": node,
        }
        container.write(Path(path), header, writer.arrays)


def load(path: str | os.PathLike[str], *, like: Any = None, flow: Any = None) -> Any:
    """What `ff.save` wrote, on the default device.

    Types are looked up among the package's own; nothing in the file is evaluated,
    imported or unpickled, so that a file of unknown origin can be wrong, and no more.

    Args:
      path: of the file.
      like: what the file cannot bring: a template with the functions, of a type of
        another library (a parameter tree of flax or equinox), or with the types, shapes
        and dtypes that are expected (also `jax.ShapeDtypeStruct`). Where it has `...`,
        what the file has is taken, and a function is left out, which says so when it is
        called: `like=ff.Laplace(..., apply_fn, ..., ...)`.
      flow: the flow that is to go on from the state. The choices that were written are
        compared with its own, and the state with those of its `init`.

    Returns:
      The state. Likelihoods of `ff.likelihoods` are made again from their numbers.

    Raises:
      ValueError: naming the file, for one that is no file of `ff.save`, or damaged, or
        of a later version; for another flow, type, shape or dtype than those given,
        with the difference; without `like` for what only that can bring; for float64
        without `jax_enable_x64`.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal({"w": jnp.ones(3)})
      >>> held = ff.posterior({"w": jnp.zeros(3)}, information, prior_precision=1.0)
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "held.npz"
      >>> ff.save(path, held)
      >>> ff.load(path)
      posterior(mean: 3 parameters, information: Diagonal, temperature 1.0)
    """
    path = Path(path)
    try:
        state = _loaded(path, like, flow)
    except Fault as fault:
        raise ValueError(f"{path} cannot be loaded: {fault}.") from fault
    except RecursionError:
        raise ValueError(f"{path} cannot be loaded: it is nested too deep.") from None
    if flow is not None:
        try:
            check_belongs(flow, state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is of another flow: {error}") from error
    return state


def _loaded(path: Path, like: Any, flow: Any) -> Any:
    header, arrays = container.read(path)
    number = header.get("format")
    if type(number) is not int or number < 1:
        raise Fault("it says no format number")
    if number > FORMAT:
        raise Fault(
            f"it is of format {number}, and this version reads up to {FORMAT}: a later "
            "fisherflow_jax wrote it"
        )
    if flow is not None:
        _compare(header.get("flow"), flow)
    reader = Reader(arrays, header.get("tables"), alone=like is None)
    state = reader.value(header.get("state"), ... if like is None else like, "state")
    if reader.differs:
        shown, more = reader.differs[:_MOST_TOLD], len(reader.differs) - _MOST_TOLD
        raise Fault("; ".join(shown) + (f"; and {more} more" if more > 0 else ""))
    if reader.missing:
        names = ", ".join(reader.missing[:_MOST_TOLD])
        raise Fault(
            f"it holds no functions and no types of other libraries: give {names} in "
            f"like=, with ... for what the file has{_example(header, reader.missing)}"
        )
    unused = set(range(len(arrays))) - reader.used
    if unused:
        raise Fault(f"array {min(unused)} is of no part of the state")
    return state


def _example(header: dict, missing: list[str]) -> str:
    """A template of a record with its own functions, which is enough to go on."""
    node = header["state"]
    parts = [n if f"state.{n}" in missing else "..." for n in node.get("fields", ())]
    if {*parts} <= {"..."}:
        return ""
    kind = node["type"].rpartition(".")[2]
    return f", as in like=ff.{kind}({', '.join(parts)})"


def _compare(known: Any, flow: Any) -> None:
    if known is None:  # saved without flow=
        return
    texts = isinstance(known, dict) and all(type(x) is str for x in known.values())
    if not texts:
        raise Fault("the choices of its flow are no texts")
    differs = differing(known, choices_of(flow))
    if differs:
        raise Fault(f"its state is another flow's: {'; '.join(differs)}")
