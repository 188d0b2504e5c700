"""Tracing a model, and settling what its linear layers are."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, trees
from fisherflow_jax.layers import _compat
from fisherflow_jax.layers import _values as following
from fisherflow_jax.layers import _views as views
from fisherflow_jax.layers._compat import Path, Program
from fisherflow_jax.layers._examples import follow
from fisherflow_jax.layers._found import Broadcast, Use, Walk
from fisherflow_jax.layers._layer import Layer, Layers, shapes_of_one
from fisherflow_jax.layers._linear import Experts
from fisherflow_jax.layers._values import Examples
from fisherflow_jax.layers._walk import walk

PyTree = Any


class Traced(NamedTuple):
    """A model as a program, and the layers found in it."""

    program: _compat.Program
    arguments: list  # of the program: leaves of the parameters, then of the inputs
    output_tree: Any
    layers: Layers
    lost: str | None  # what the examples of a whole batch were not followed through
    uses: tuple[tuple[Use, ...], ...]  # of each layer
    # of a whole batch:
    examples: dict[Path, Examples]  # where its examples are
    broadcasts: tuple[Broadcast, ...]  # of leaves that are no layer's


def trace(
    apply_fn: Callable, params: PyTree, inputs: PyTree, *, count: int | None = None
) -> Traced:
    """Traces a model on its inputs, parts in `ff.Shared`, and finds its layers.

    Of one example, or of a whole batch of `count` examples, where layers are those
    whose inputs belong to single examples.
    """
    params = jax.tree.map(
        lambda x: trees.as_array(x) if isinstance(x, float) else x, params
    )
    named = trees.named_leaves(params)
    for name, leaf in named:
        trees.check_real(name, leaf, "params", params)
    received = params, batches.unshare(inputs)
    # what is no array (a flag among shared inputs) is part of the program
    arguments, rebuild = trees.arrays_of(received)

    def flat_apply(*arrays: Any) -> PyTree:
        return apply_fn(*rebuild(arrays))

    with calling.telling(apply_fn, params, inputs):
        jaxpr, outputs = _compat.trace(flat_apply, *arguments)
    program = _compat.read(jaxpr)
    shapes = tuple(tuple(leaf.shape) for _, leaf in named)
    found, together, lost = walk(program, list(shapes), _shared(inputs)), None, None
    rows: dict[Path, Examples] = {}
    if count is not None:
        entering = _entering(params, inputs, count)
        results, rows = follow(program, entering, count)
        together = next((value.together for value in results if value.together), None)
        unordered = (following.out_of_order(value, count) for value in results)
        lost = next((reason for reason in unordered if reason), None)
        found = _of_rows(found, rows, count)
    uses = _settle(found)
    fallback = _fallback(found, uses, len(named))
    broadcasts = _broadcasts(found, rows, fallback) if count is not None else ()
    by_row = {broadcast.leaf for broadcast in broadcasts}
    summed = tuple(i for i, _ in fallback if count is not None and i not in by_row)
    layers = Layers(
        layers=tuple(map(_layer, uses)),
        fallback=fallback,
        names=tuple(name for name, _ in named),
        shapes=shapes,
        tree=jax.tree.structure(params),
        batched=count is not None,
        together=together,
        summed=summed,
        entered=_entered(program, uses),
        input_shapes=shapes_of_one(inputs),
    )
    return Traced(
        program=program,
        arguments=arguments,
        output_tree=jax.tree.structure(outputs),
        layers=layers,
        lost=lost,
        uses=uses,
        examples=rows,
        broadcasts=broadcasts,
    )


def _shared(inputs: PyTree) -> list[bool]:
    """Of each array of the inputs, whether all examples share it."""
    alike = [
        (batches.is_shared(x), jax.tree.leaves(batches.unshare(x)))
        for x in jax.tree.leaves(inputs, is_leaf=batches.is_shared)
    ]
    return [shared for shared, held in alike for x in held if trees.is_array(x)]


def _entering(params: PyTree, inputs: PyTree, count: int) -> list[following.Value]:
    """The examples in the program's arguments."""
    sliced = batches.map_inputs(
        lambda _: following.every_example,
        inputs,
        lambda node: jax.tree.map(lambda _: following.no_example, node.tree),
    )
    shared = jax.tree.map(lambda _: following.no_example, params)
    enter = jax.tree.leaves((shared, sliced))
    leaves = jax.tree.leaves((params, batches.unshare(inputs)))
    pairs = zip(enter, leaves, strict=True)
    return [of(count, x.shape) for of, x in pairs if trees.is_array(x)]


def _of_rows(found: Walk, rows: dict[Path, Examples], count: int) -> Walk:
    """The uses by rows of a batch; reasons are noted for the leaves of others."""
    uses = []
    for use in found.uses:
        values = rows[use.path].inputs[use.linear.operand], rows[use.path].outputs[0]
        known = following.has_examples(values[0]) and _at_positions(use, rows)
        # examples have met or are lost, and as many rows have come of it
        met = any(x.view is None or x.together is not None for x in values)
        mixed = not known and met and use.num_positions % count == 0
        if not known and not mixed:
            reason = "the examples cannot be told apart in its inputs"
            found.reasons.setdefault(use.leaf, reason)
        positions = use.num_positions // count
        uses.append(use._replace(num_positions=positions, mixed=mixed))
    return found._replace(uses=uses)


def _at_positions(use: Use, rows: dict[Path, Examples]) -> bool:
    """Whether the examples lie along the positions of a layer's outputs."""
    outputs: Any = rows[use.path].outputs[0]
    if not following.has_examples(outputs):
        return False
    stacks, _, features = use.linear.outputs(outputs.view).axes
    return views.is_repeated(stacks) and views.is_repeated(features)


def _broadcasts(
    found: Walk,
    rows: dict[Path, Examples],
    fallback: tuple[tuple[int, str], ...],
) -> tuple[Broadcast, ...]:
    """The uses of the leaves that meet single examples entry by entry, and only so."""
    meet = [x.leaf for x in found.broadcasts if _is_repeated(x, rows)]
    kernels = {use.leaf for use in found.uses}
    by_row = {
        leaf
        for leaf, _ in fallback
        if leaf not in kernels and 0 < meet.count(leaf) == found.times[leaf]
    }
    return tuple(x for x in found.broadcasts if x.leaf in by_row)


def _is_repeated(broadcast: Broadcast, rows: dict[Path, Examples]) -> bool:
    """Whether a parameter is the same for all the single examples that it meets."""
    outputs: Any = rows[broadcast.path].outputs[0]
    axes = broadcast.view.axes[len(broadcast.scans) :]
    return following.has_examples(outputs) and all(
        views.is_repeated(own) or views.is_repeated(of_examples)
        for own, of_examples in zip(axes, outputs.view.axes, strict=True)
    )


def _settle(found: Walk) -> tuple[tuple[Use, ...], ...]:
    """The uses of each layer; reasons are noted for leaves that are not treated."""
    by_leaf: dict[int, list[Use]] = {}
    for use in found.uses:
        by_leaf.setdefault(use.leaf, []).append(use)
    biases = {use.bias.leaf for use in found.uses if use.bias is not None}
    for leaf, uses in by_leaf.items():
        if leaf in biases:
            found.reasons.setdefault(leaf, "used as a kernel and as a bias")
        by_leaf[leaf] = _side_by_side(found, _oriented(found, uses))
    kept = {leaf: uses for leaf, uses in by_leaf.items() if leaf not in found.reasons}
    for bias in biases:
        owners = {use.leaf for use in found.uses if use.bias and use.bias.leaf == bias}
        if len(owners) > 1:
            found.reasons.setdefault(bias, "added to the outputs of several layers")
        elif not owners <= kept.keys():
            found.reasons.setdefault(bias, "bias of a parameter that is no layer")
        elif kept[min(owners)][-1].turned:
            found.reasons.setdefault(bias, "bias of a kernel that is used both ways")
        elif len({use.bias for use in kept[min(owners)]}) > 1:
            found.reasons.setdefault(bias, "added at some uses of its layer only")
    refused = [bias for bias in biases if bias in found.reasons]
    return tuple(
        tuple(
            use._replace(bias=None) if use.bias and use.bias.leaf in refused else use
            for use in kept[leaf]
        )
        for leaf in sorted(kept)
    )


def _oriented(found: Walk, uses: list[Use]) -> list[Use]:
    """The uses of one leaf, of which some may use the transpose of its kernel."""

    def is_table(use: Use) -> bool:
        return use.linear.kind == "embedding"

    first = next(filter(is_table, uses), uses[0])
    as_it_is, transposed = first.kernel, first.kernel.transpose((0, 2, 1))
    oriented = []
    for use in uses:
        turned = use.kernel != as_it_is or is_table(use) != is_table(first)
        if turned and (use.kernel != transposed or is_table(use)):
            reason = "used in several orientations or kinds"
            found.reasons.setdefault(use.leaf, reason)
        oriented.append(use._replace(turned=turned))
    return sorted(oriented, key=lambda use: use.turned)


def _side_by_side(found: Walk, uses: list[Use]) -> list[Use]:
    """Slices that may stand at the same positions, one after the other."""
    groups: list[list[Use]] = []
    for use in uses:
        fitting = (group for group in groups if all(_fits(use, x) for x in group))
        group = next(fitting, None)
        if group is None:
            groups.append([use])
        else:
            group.append(use._replace(beside=True))
    of_stacks = {
        frozenset(use.part.start if use.part else -1 for use in group)
        for group in groups
        if any(use.part and use.part.axis == 0 for use in uses)
    }
    if len(of_stacks) > 1:  # no number of positions would be that of all
        reason = "its stacked kernels are not used equally often"
        found.reasons.setdefault(uses[0].leaf, reason)
    # one factor of gradients would be that of several layers
    several = [use.part for use in uses if use.part and use.part.axis == 1]
    if any(one.is_beside(other) for one, other in itertools.combinations(several, 2)):
        reason = "its slices are kernels of several products"
        found.reasons.setdefault(uses[0].leaf, reason)
    return [use for group in groups for use in group]


def _fits(one: Use, other: Use) -> bool:
    """Whether two slices are of one product: of several kernels, or of one input."""
    if not (one.part and other.part and one.part.is_beside(other.part)):
        return False
    alike = (
        (x.turned, x.mixed, x.num_positions, x.output.dtype, x.scale, x.sliced)
        for x in (one, other)
    )
    same_input = (
        one.entering is other.entering
        and one.path[:-1] == other.path[:-1]
        and one.linear.input_axes == other.linear.input_axes
        and not isinstance(one.linear, Experts)  # which may count rows in other ways
    )
    return len(set(alike)) == 1 and (
        one.part.axis == 0 or (one.part.axis == 2 and same_input)
    )


def _entered(
    program: Program, layers: tuple[tuple[Use, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """The kernels that one array enters, in the same way at every use."""
    origin_of = _origins(program)
    kernels: dict[Any, list[int]] = {}
    for uses in layers:
        plain = all(x.before is x.part is None and not x.turned for x in uses)
        if not plain or any(use.linear.kind != "dense" for use in uses):
            continue
        ways = (
            (
                origin_of(use.path[:-1], use.entering),
                *(use.linear.input_axes, use.scale, use.sliced, use.num_positions),
                *(use.kernel.shape[:2], use.bias is None, use.mixed),
            )
            for use in uses
        )
        kernels.setdefault(tuple(ways), []).append(uses[0].leaf)
    return tuple(tuple(leaves) for leaves in kernels.values() if len(leaves) > 1)


def _origins(program: Program) -> Callable[[Path, Any], tuple[Path, Any]]:
    """`(scope, variable) -> (scope, variable)` where it was before any call."""

    @functools.cache
    def scope(path: Path) -> tuple[Program, dict[Any, tuple[Path, Any]]]:
        if not path:
            return program, {}
        equation = scope(path[:-1])[0].equations[path[-1]]
        body = _compat.read(equation.operation.body)
        if not isinstance(equation.operation, _compat.Call):
            return body, {}
        given = (origin_of(path[:-1], atom.variable) for atom in equation.inputs)
        return body, dict(zip(body.inputs, given, strict=True))

    def origin_of(path: Path, variable: Any) -> tuple[Path, Any]:
        return scope(path)[1].get(variable, (path, variable))

    return origin_of


def _fallback(
    found: Walk, layers: tuple[tuple[Use, ...], ...], count: int
) -> tuple[tuple[int, str], ...]:
    treated = {uses[0].leaf for uses in layers}
    treated |= {uses[0].bias.leaf for uses in layers if uses[0].bias}
    unnoted = dict.fromkeys(range(count), "unused")
    unnoted |= dict.fromkeys(found.stopped, "no gradient passes")
    reasons = unnoted | found.reasons
    return tuple((i, reasons[i]) for i in range(count) if i not in treated)


def _layer(uses: tuple[Use, ...]) -> Layer:
    first = uses[0]
    stacked, inputs, outputs = first.kernel.shape
    own = [use for use in uses if not use.beside]
    return Layer(
        kernel=first.leaf,
        bias=first.bias and first.bias.leaf,
        kind=first.linear.kind,
        num_stacked=stacked,
        num_positions=sum(use.num_positions for use in own if not use.turned),
        num_turned=sum(use.num_positions for use in own if use.turned),
        mixed=any(use.mixed for use in uses),
        num_inputs=inputs,
        num_outputs=outputs,
        kernel_layout=first.kernel,
        bias_layout=first.bias and first.bias.view,
        uses=tuple(use.path for use in uses),
    )
