"""Programs of JAX, read into plain descriptions: the only contact with its internals.

`jax.extend.core`, the fields of equations, and the names and parameters of primitives
carry no promise of stability. All that the package knows of them is in this file; what
it does not know, a new primitive or a new name, becomes an equation without a known
operation, which can still be evaluated. Programs are read and evaluated, never edited.

Written for JAX 0.10 to 0.12. From 0.11 on `Jaxpr` and `ClosedJaxpr` are one class and
the parameters of `scan` are structured.
"""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fisherflow_jax.layers._views import View

Path = tuple[int, ...]  # of equations, from the outermost body inwards


class Atom(NamedTuple):
    """An operand: a variable, known by its identity, or a literal value."""

    variable: Any  # None for a literal
    value: Any
    shape: tuple[int, ...]
    dtype: Any


class Dot(NamedTuple):
    """`lax.dot_general`: dimensions of the left and of the right operand."""

    contracting: tuple[tuple[int, ...], ...]
    batch: tuple[tuple[int, ...], ...]


class Convolution(NamedTuple):
    """`lax.conv_general_dilated`."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    input_spec: tuple[int, ...]  # axes of batch, features, space
    kernel_spec: tuple[int, ...]  # axes of output features, input features, space
    output_spec: tuple[int, ...]  # axes of batch, features, space
    feature_groups: int
    batch_groups: int


class Gather(NamedTuple):
    """`lax.gather`, index vectors on the last axis of the indices."""

    offset_dims: tuple[int, ...]
    collapsed_dims: tuple[int, ...]
    index_map: tuple[int, ...]
    batch_dims: tuple[int, ...]
    index_batch_dims: tuple[int, ...]
    slice_sizes: tuple[int, ...]
    clips: bool  # indices out of bounds are moved to the border


class Ragged(NamedTuple):
    """`lax.ragged_dot`: rows, matrices, and how many rows each takes in turn."""


class Reorder(NamedTuple):
    """Each output shows the entries of the operand at its place."""

    apply: Callable[[View], View]


class Add(NamedTuple):
    """The sum of two operands of one shape."""


class Elementwise(NamedTuple):
    """A function of two operands, entry by entry; axes of length 1 are repeated."""


class Along(NamedTuple):
    """Entries along some axes are taken together."""

    axes: tuple[int, ...]
    keeps: bool  # the axes, as a cumulative sum does


class Stack(NamedTuple):
    """Operands of one shape side by side, along a new axis."""

    axis: int


class Same(NamedTuple):
    """Axes of one length at one place are one axis, save those that are mixed."""

    mixed: tuple[int, ...] = ()  # negative: from the end of each operand


class Cut(NamedTuple):
    """Slices of an operand, one for each output."""

    ends: tuple[dict[int, tuple[int, int, int]], ...]  # by axis: start, stop, step
    mixed: tuple[int, ...] = ()  # as in `Same`


class Join(NamedTuple):
    """Operands one after the other along an axis."""

    axis: int

    @property
    def mixed(self) -> tuple[int, ...]:
        return (self.axis,)


class Update(NamedTuple):
    """An operand with a part written over by another, at offsets that follow them."""


class Scatter(NamedTuple):
    """Scatters into the first operand: indices, and what is written, are the others."""

    window_dims: tuple[int, ...]  # of what is written
    inserted_dims: tuple[int, ...]  # of the first operand, as are the next two
    scattered_dims: tuple[int, ...]
    batch_dims: tuple[int, ...]
    index_batch_dims: tuple[int, ...]


class Iota(NamedTuple):
    """Numbers that count along an axis."""

    axis: int


class Random(NamedTuple):
    """Random numbers of a key."""


class Opaque(NamedTuple):
    """A body with a derivative of its own: it is evaluated as it is."""

    body: Any


class Solve(NamedTuple):
    """A linear system: these of the operands, in this order, go to its solver."""

    body: Any
    operands: tuple[int, ...]


class StopGradient(NamedTuple):
    """What comes out has no derivative."""


class Call(NamedTuple):
    """A body that is evaluated as it is; `wrap` keeps what surrounds it."""

    body: Any
    wrap: Callable[[Callable], Callable]


class Cond(NamedTuple):
    """`lax.cond` and `lax.switch`: operands are an index, then those of each branch."""

    branches: tuple[Any, ...]


class While(NamedTuple):
    """`lax.while_loop`: operands are constants of both bodies, then carries."""

    condition: Any
    body: Any
    num_constants: tuple[int, int]  # of the condition, of the body


class Scan(NamedTuple):
    """`lax.scan`: operands are constants, then carries, then slices."""

    body: Any
    num_constants: int
    num_carries: int
    length: int
    reverse: bool
    unroll: Any


class Equation(NamedTuple):
    """One step of a program."""

    name: str
    operation: Any  # one of the operations above, or None
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    evaluate: Callable[[Sequence[Any]], list]


class Program(NamedTuple):
    """Steps from inputs to outputs."""

    constants: dict[Any, Any]  # values by variable
    inputs: tuple[Any, ...]  # variables
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]


def trace(function: Callable, *arguments: Any) -> tuple[Any, Any]:
    """The jaxpr of `function`, and its outputs as shapes."""
    return jax.make_jaxpr(function, return_shape=True)(*arguments)


def read(jaxpr: Any) -> Program:
    """A jaxpr, open or closed, as a `Program`."""
    values = tuple(getattr(jaxpr, "consts", ()) or ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return Program(
        dict(zip(jaxpr.constvars, values, strict=True)),
        tuple(jaxpr.invars),
        tuple(map(_atom, jaxpr.outvars)),
        tuple(map(_equation, jaxpr.eqns)),
    )


def as_function(jaxpr: Any, constants: Sequence[Any] | None = None) -> Callable:
    """A program as a function of its arguments, closing over these constants."""
    from jax.extend import core  # loads much of JAX that an import does not need

    if constants is not None:
        jaxpr = core.ClosedJaxpr(jaxpr.jaxpr, constants)
    return core.jaxpr_as_fun(jaxpr)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def has_tangents(jaxpr: Any) -> bool:
    """Whether a program can be differentiated forwards: no `custom_vjp` is in it.

    Derivatives of other rules (`custom_jvp`) are taken by their own.
    """
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name.startswith("custom_vjp"):
            return False
        if name.startswith("custom_jvp"):
            continue
        held = jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_program)
        bodies = filter(_is_program, held)
        if not all(map(has_tangents, bodies)):
            return False
    return True


def _atom(atom: Any) -> Atom:
    shape = tuple(getattr(atom.aval, "shape", ()))
    dtype = getattr(atom.aval, "dtype", None)
    if hasattr(atom, "val"):  # a literal
        return Atom(None, atom.val, shape, dtype)
    return Atom(atom, None, shape, dtype)


def _equation(eqn: Any) -> Equation:
    def evaluate(values: Sequence[Any]) -> list:
        params = eqn.primitive.get_bind_params(eqn.params)
        functions, params = params if isinstance(params, tuple) else ((), params)
        context = getattr(getattr(eqn, "ctx", None), "manager", None)
        with context or contextlib.nullcontext():
            results = eqn.primitive.bind(*functions, *values, **params)
        return list(results) if eqn.primitive.multiple_results else [results]

    inputs, outputs = tuple(map(_atom, eqn.invars)), tuple(map(_atom, eqn.outvars))
    name = eqn.primitive.name
    return Equation(name, _operation(name, eqn.params), inputs, outputs, evaluate)


# Primitives, some under the names of several versions, by what is done with them.
_CALLS = [
    "jit",
    "pjit",
    "call",
    "closed_call",
    "core_call",
    "core_closed_call",
    "eval_jaxpr",
]
_CHECKPOINTS = ("remat2", "remat", "checkpoint")
# entries along these axes meet; what comes out lacks the axes, or has them still
_REDUCTIONS = {
    # collectives over an axis of `vmap`, which is then a number
    "axes": ("reduce_", "arg", "psum", "pmax", "pmin"),
    "axis": ("cum",),
    "dimension": ("sort",),
}


def _operation(name: str, params: dict) -> Any:
    if name in _OPERATIONS:
        return _OPERATIONS[name](params)
    if name.startswith("reduce_window"):
        return _windows(params)
    bodies = (params.get("jaxpr"), params.get("call_jaxpr"))
    body = next(filter(_is_program, bodies), None)
    if body is not None and name in (*_CALLS, "eval_jaxpr"):
        return Call(body, lambda function: function)
    if body is not None and name in _CHECKPOINTS:
        return Call(body, lambda function: _checkpoint(function, params))
    if body is not None and name.startswith("custom_"):
        return Opaque(body)
    for field, beginnings in _REDUCTIONS.items():
        if field in params and name.startswith(beginnings):
            axes = params[field]
            axes = (axes,) if isinstance(axes, int) else axes
            if all(hasattr(axis, "__index__") for axis in axes):  # not by name
                return Along(_ints(axes), keeps=field != "axes")
    return None


def _windows(params: dict) -> Same:
    each = zip(
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        strict=True,
    )
    still = (1, 1, (0, 0))
    return Same(
        tuple(i for i, (n, by, pad) in enumerate(each) if (n, by, pad) != still)
    )


def _padding(params: dict) -> Same:
    each = enumerate(params["padding_config"])
    return Same(tuple(i for i, added in each if any(added)))


def _scatter(params: dict) -> Scatter:
    dimensions = params["dimension_numbers"]
    return Scatter(
        _ints(dimensions.update_window_dims),
        _ints(dimensions.inserted_window_dims),
        _ints(dimensions.scatter_dims_to_operand_dims),
        _ints(dimensions.operand_batching_dims),
        _ints(dimensions.scatter_indices_batching_dims),
    )


def _solve(params: dict) -> Solve:
    lengths, body = params["const_lengths"], params["jaxprs"].solve
    start = lengths.matvec + lengths.vecmat
    right = range(sum(lengths), sum(lengths) + len(body.in_avals) - lengths.solve)
    return Solve(body, (*range(start, start + lengths.solve), *right))


def _while(params: dict) -> While:
    counts = params["cond_nconsts"], params["body_nconsts"]
    return While(params["cond_jaxpr"], params["body_jaxpr"], counts)


def _checkpoint(function: Callable, params: dict) -> Callable:
    each = params.get("prevent_cse", True)
    # or one for each operand, whose number changes
    prevent_cse = each if isinstance(each, bool) else any(each)
    policy = params.get("policy")
    return jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)


def _dot(params: dict) -> Dot:
    contracting, batch = params["dimension_numbers"]
    return Dot(tuple(map(_ints, contracting)), tuple(map(_ints, batch)))


def _convolution(params: dict) -> Convolution:
    dimensions = params["dimension_numbers"]
    return Convolution(
        tuple(params["window_strides"]),
        tuple((int(low), int(high)) for low, high in params["padding"]),
        tuple(params["lhs_dilation"]),
        tuple(params["rhs_dilation"]),
        tuple(dimensions.lhs_spec),
        tuple(dimensions.rhs_spec),
        tuple(dimensions.out_spec),
        params["feature_group_count"],
        params["batch_group_count"],
    )


def _gather(params: dict) -> Gather:
    dimensions = params["dimension_numbers"]
    mode = jax.lax.GatherScatterMode.from_any(params["mode"])
    return Gather(
        _ints(dimensions.offset_dims),
        _ints(dimensions.collapsed_slice_dims),
        _ints(dimensions.start_index_map),
        _ints(dimensions.operand_batching_dims),
        _ints(dimensions.start_indices_batching_dims),
        _ints(params["slice_sizes"]),
        mode == jax.lax.GatherScatterMode.CLIP,
    )


def _ragged(params: dict) -> Ragged | None:
    numbers = params["ragged_dot_dimension_numbers"]
    kinds = (
        _dot({"dimension_numbers": numbers.dot_dimension_numbers}),
        *map(_ints, (numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions)),
    )
    plain = Dot(((1,), (1,)), ((), ())), (0,), (0,)
    return Ragged() if kinds == plain and params["group_offset"] is None else None


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _slice(params: dict) -> Cut:
    starts, stops = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    return Cut((dict(enumerate(zip(starts, stops, steps, strict=True))),))


def _split(params: dict) -> Cut:
    axis, stops = params["axis"], list(itertools.accumulate(map(int, params["sizes"])))
    ends = zip([0, *stops], stops, strict=False)
    return Cut(tuple({axis: (*each, 1)} for each in ends), (axis,))


def _scan(params: dict) -> Scan:
    if "ft_in" in params:
        constants, carries, _ = map(len, params["ft_in"].unpack())
    else:
        constants, carries = params["num_consts"], params["num_carry"]
    options = params["length"], params["reverse"], params["unroll"]
    return Scan(params["jaxpr"], constants, carries, *options)


_TYPES = ("convert_element_type", "reduce_precision", "copy", "copy_p", "device_put")
_SAME = (*_TYPES, "name", "sharding_constraint", "optimization_barrier")
_ELEMENTWISE = ("mul", "sub", "div", "max", "min", "pow")
# Functions of entries at one place, and of the keys there.
_POINTWISE = """
abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type cbrt ceil clamp clz complex conj cos cosh digamma eq eq_to
erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag
integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to mulhi ne
neg nextafter not one_minus_square or polygamma polynomial population_count
random_clone random_fold_in random_gamma_grad random_seed random_split
random_unwrap random_wrap real regularized_incomplete_beta rem round rsqrt
select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh
sqrt square tan tanh threefry2x32 xor zeta
"""
# Of the last axes as matrices, one for each place of the others.
_MATRICES = """
cholesky eig eigh geqrf hessenberg householder_product lu qr schur svd
triangular_solve tridiagonal
"""
_SCATTERS = (
    "scatter",
    "scatter-add",
    "scatter-sub",
    "scatter-mul",
    "scatter-min",
    "scatter-max",
)
_OPERATIONS: dict[str, Callable[[dict], Any]] = {
    "transpose": lambda p: Reorder(lambda view: view.transpose(p["permutation"])),
    "reshape": lambda p: Reorder(lambda view: view.reshape(p["new_sizes"])),
    "squeeze": lambda p: Reorder(lambda view: view.squeeze(p["dimensions"])),
    "expand_dims": lambda p: Reorder(lambda view: view.expand_dims(p["dimensions"])),
    "tile": lambda p: Reorder(lambda view: view.tile(p["reps"])),
    "rev": lambda p: Reorder(lambda view: view.flip(p["dimensions"])),
    "broadcast_in_dim": lambda p: Reorder(
        lambda view: view.broadcast(p["shape"], p["broadcast_dimensions"])
    ),
    **dict.fromkeys(_SAME, lambda p: Reorder(lambda view: view)),
    **dict.fromkeys(("add", "add_any"), lambda p: Add()),
    **dict.fromkeys(_ELEMENTWISE, lambda p: Elementwise()),
    "stack": lambda p: Stack(p["axis"]),
    **dict.fromkeys(("random_bits", "random_gamma"), lambda p: Random()),
    **dict.fromkeys(_POINTWISE.split(), lambda p: Same()),
    **dict.fromkeys(_MATRICES.split(), lambda p: Same((-2, -1))),
    "slice": _slice,
    "dynamic_slice": lambda p: Same(),
    "lu_pivots_to_permutation": lambda p: Same((-1,)),
    "fft": lambda p: Same(tuple(range(-len(p["fft_lengths"]), 0))),
    "top_k": lambda p: Same((p.get("axis", -1),)),
    "approx_top_k": lambda p: Same((p["reduction_dimension"],)),
    "concatenate": lambda p: Join(p["dimension"]),
    "split": _split,
    "pad": _padding,
    "dynamic_update_slice": lambda p: Update(),
    "iota": lambda p: Iota(p["dimension"]),
    **dict.fromkeys(_SCATTERS, _scatter),
    "cond": lambda p: Cond(tuple(p["branches"])),
    "while": _while,
    "custom_linear_solve": _solve,
    "stop_gradient": lambda p: StopGradient(),
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "scan": _scan,
}
