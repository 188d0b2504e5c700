"""Parameters rounded to a few bits, and errors pushed onto what is still free."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, linalg, processes, trees
from fisherflow_jax.compression._grid import best, laid_over
from fisherflow_jax.compression._state import (
    Quadratic,
    check_finite,
    compressible,
    earlier,
    kernels_of,
    quadratic,
)
from fisherflow_jax.layers import Layers

PyTree = Any

LEAST_BITS, MOST_BITS = 2, 16


class Rounded(NamedTuple):
    """A model on a grid. Made by `ff.compression.round_to_grid`.

    Attributes:
      values: like the parameters, int8 (int16 above 8 bits) where they are rounded,
        None elsewhere.
      scales: of each, one an output channel, that broadcast: a parameter is
        `values * scales`; None elsewhere.
      params: like the state's mean, on the grid where they are rounded. What is not
        rounded but goes with it, as a layer's bias, is moved.
      predicted_rise: `()`, of the summed objective, in nats.
      nearest_rise: `()`, the same of rounding to nearest, with scales that reach the
        largest entry of each channel.
    """

    values: PyTree
    scales: PyTree
    params: PyTree
    predicted_rise: jax.Array
    nearest_rise: jax.Array


def round_to_grid(
    state: Any,
    bits: int | Mapping[str, int],
    *,
    compensate: bool = True,
    chosen: Any = None,
    mask: PyTree | None = None,
    dead_inputs: str = "raise",
) -> Rounded:
    r"""Rounds kernels to symmetric grids of integers, with the least rise of the loss.

    .. math:: w_j \leftarrow w_j - \frac{U_{ij}}{U_{ii}} (w_i - q_i), \quad j > i,
       \qquad (A + \lambda 1)^{-1} = U^\top U

    Inputs are rounded one by one, by falling :math:`A_{ii}`, and the error of each is
    pushed onto those that are still free, the bias last (GPTQ). A is a layer's input
    factor, and the damping the prior's share beside its output factor's mean; of a full
    or a block information the matrix itself. A scalar, a diagonal, and factors that are
    kept as diagonals have nothing to push: they round to nearest.

    Scales are one an output channel. Two are tried: that which reaches the largest
    entry, and the clipped one of least :math:`E^\top I E` at nearest rounding; with and
    without compensation. Of each layer the least predicted rise is taken.

    A is that of the unrounded model's inputs. A layer after rounded ones sees others:
    for the last digits round layer by layer (`chosen`), with a new information each.

    Args:
      state: anything with `.mean`, a converged fit, and `.information`, with the prior
        in it.
      bits: 2 to 16, for all that is chosen, or by the name of a parameter, as
        `allocate_bits` gives them: others are then not rounded.
      compensate: False: to nearest.
      chosen: where `bits` is one number, a predicate of a parameter's name, a list of
        names, booleans like the parameters, or a prefix of them. None: kernels, which
        are those of the information's layers or, without these, all arrays of two axes
        or more.
      mask: of an earlier pruning, True where a parameter is kept. Zeros stay zeros.
      dead_inputs: "raise", or "nearest": of inputs of a layer that were zero in all
        data (units that never fire, pixels that are always black) nothing is known, and
        their weights have no effect: they are rounded to nearest. An information that
        was gathered from no data looks the same.

    Returns:
      A `Rounded(values, scales, params, predicted_rise, nearest_rise)`. Cost of a
      layer: a Cholesky factor, I^3, and I^2 O; of a full matrix d^3; memory a few times
      that of the matrix.

    Raises:
      TypeError: for a mixture.
      ValueError: for bits outside 2 to 16 or of a parameter that there is not; a state
        or a mask of other parameters; by name, inputs of a layer that were zero in all
        data.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> matrix = 8.0 + jnp.eye(3)
      >>> state = ff.posterior(
      ...     jnp.array([[1.0], [0.4], [0.4]]),
      ...     ff.structures.Full(matrix[:, :, None]),
      ...     prior_precision=0.1,
      ... )
      >>> found = ff.compression.round_to_grid(state, 2)
      >>> print(found.values[:, 0], found.scales[0])  # the sum is what matters
      [1 1 1] [0.6]

    References:
      Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: accurate post-training quantization
      for generative pre-trained transformers", 2022.
      Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or down? Adaptive rounding
      for post-training quantization", 2020.
    """
    around = quadratic(state)
    layers = ops.facts(around.information).layers
    named = named_bits(bits, around.mean, chosen, layers)
    kept = earlier(mask, around.mean)
    check_inputs(around, kept, named, dead_inputs)
    return rounded(around, kept, named, compensate)


def named_bits(
    bits: Any, like: PyTree, chosen: Any, layers: Layers | None
) -> dict[str, int]:
    """The bits of each parameter that is rounded, by name."""
    names = [name for name, _ in trees.named_leaves(like)]
    if not isinstance(bits, Mapping):
        bits = dict.fromkeys(compressible(like, chosen, layers), bits)
    elif chosen is not None:
        raise ValueError("bits name the parameters themselves: leave chosen out.")
    if not bits or bits.keys() - set(names):
        raise ValueError(f"bits name {list(bits)}; the parameters are {names}.")
    for name, number in bits.items():
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if not whole or not LEAST_BITS <= number <= MOST_BITS:
            raise ValueError(
                f"bits are whole numbers from {LEAST_BITS} (values -1, 0 and 1) to "
                f"{MOST_BITS}, beyond which there is nothing to make up for; those of "
                f"{name} are {number!r}."
            )
    return {name: int(number) for name, number in bits.items()}


def rounded(
    around: Quadratic,
    kept: PyTree,
    bits: Mapping[str, int],
    compensate: bool = True,
) -> Rounded:
    """The best of what is tried."""
    mean, information, _ = around
    layers, named = ops.facts(information).layers, dict(trees.named_leaves(mean))
    axes = tuple((n, _input_axes(n, named[n].shape, layers)) for n in bits)
    dtype = trees.float_dtype(mean)
    levels = {n: np.asarray(2 ** (b - 1) - 1, dtype) for n, b in bits.items()}
    rise, params, chosen, nearest = best(around, kept, levels, axes, compensate)
    values = {}
    for name, scale in chosen.items():
        kind = jnp.int8 if bits[name] <= 8 else jnp.int16
        values[name] = jnp.round(params[name] / scale).astype(kind)
    final = {name: params[name].astype(leaf.dtype) for name, leaf in named.items()}

    def tree(leaves: dict[str, jax.Array]) -> PyTree:
        treedef = jax.tree.structure(mean)
        return jax.tree.unflatten(treedef, [leaves.get(name) for name in named])

    check_finite({"all": rise}, "the predicted rise", ": give a larger prior precision")
    return Rounded(tree(values), tree(chosen), tree(final), rise, nearest)


def _input_axes(
    name: str, shape: tuple[int, ...], layers: Layers | None
) -> tuple[int, ...]:
    """Along which axes of an array a channel lies: those of its inputs."""
    layer = kernels_of(layers).get(name)
    if layer is None:
        return tuple(range(max(len(shape) - 1, min(len(shape), 1))))
    with jax.ensure_compile_time_eval():
        stacked, size, width = layer.kernel_layout.shape
        channels = np.arange(stacked * width).reshape((stacked, 1, width))
        whole = jnp.asarray(np.broadcast_to(channels, (stacked, size, width)))
        leaf = np.asarray(layer.kernel_layout.to_leaf(whole))
    return tuple(a for a in range(leaf.ndim) if not np.ptp(leaf, axis=a).any())


def check_inputs(
    around: Quadratic, kept: PyTree, names: Iterable[str], dead_inputs: str
) -> None:
    """Raises for inputs of a layer that were zero in all data, and are rounded."""
    if dead_inputs not in ("raise", "nearest"):
        raise ValueError(
            f'dead_inputs must be "raise" or "nearest"; got {dead_inputs!r}.'
        )
    if dead_inputs == "nearest":
        return
    found = _unseen(around, kept, tuple(names))
    if checks.is_traced(found):
        return
    for name, leaf in trees.named_leaves(found):
        if not checks.holds(leaf <= 0):
            places = np.argwhere(processes.on_host(leaf) > 0)
            entry = f"{name}[{','.join(map(str, places[0]))}]"
            raise ValueError(
                f"inputs of {name} were zero in all data, {len(places)} of its entries "
                f"from {entry} on: their weights have no effect, or there were no data."
                ' If the first, give dead_inputs="nearest", or mask= with False there.'
            )


@functools.partial(jax.jit, static_argnames="names")
def _unseen(around: Quadratic, kept: PyTree, names: tuple[str, ...]) -> PyTree:
    """One where an entry is to be rounded and its input was zero in all data."""
    columns = ops.by_columns(around.information, around.mean)
    flags = laid_over(trees.widen(around.mean), dict.fromkeys(names, 1.0), 0.0)
    flags, found = jax.tree.map(lambda x, k: jnp.where(k, x, 0), flags, kept), []
    for group, part in zip(columns.groups, columns.split(flags), strict=True):
        if group.matrix.ndim == 3:
            dead = linalg.diagonal(group.matrix) <= 0
        else:  # of a table some ids may be in no data
            dead = jnp.all(group.matrix <= 0, axis=1, keepdims=True)
        found.append(jnp.where(dead[:, :, None], part, 0))
    return columns.join(found)
