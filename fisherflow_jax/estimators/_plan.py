"""The rule of a pull-back and its plan: which way parameters take, how much is held.

The plan is decided once from shapes, for what is computed and what a table tells.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import tables, trees
from fisherflow_jax._ground.batch import Batch, num_examples
from fisherflow_jax._ground.checks import whole
from fisherflow_jax.layers import Layer, Layers, layers_of
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model
from fisherflow_jax.structures import OuterProducts, Structure

PyTree = Any
Cotangents = Callable[[Likelihood, jax.Array, Any, jax.Array | None], jax.Array]

# Pulled-back vectors held at once when no chunk_size is given: 64 MiB in float32.
CHUNK_ENTRIES = 2**24
# Of groups, whose passes are large enough to run one after the other: 4 MiB, a cache.
GROUP_ENTRIES = 2**20


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
    """What an estimator of pulled-back vectors does, whatever the model.

    Attributes:
      cotangents: `(likelihood, outputs (1, ...), targets, key)` -> `(R, 1, ...)`.
      random: whether `cotangents` draws from its key; None: where the likelihood's root
        does.
      needs_targets: whether a batch without targets is refused.
      num_columns: R, where it is told at all: of estimators that square sums over
        groups.
      name: for errors and tables.
      root: gives the likelihood another root; None: it keeps its own.
      groups: micro-batches whose sums are squared; None: every example for itself.
      chunk_size: examples held at once; None: as many as fit.
      fast_squares: whether layers are squared from what enters and leaves them.
      batched: whether the model is run on whole batches; None: if its examples are
        seen to interact.
      by_root: whether its mean is that of the likelihood's root.
    """

    cotangents: Cotangents
    random: bool | None = False
    needs_targets: bool = False
    num_columns: int = 1
    name: str = ""
    root: Callable[[Likelihood], Likelihood] | None = None
    groups: int | None = None
    chunk_size: int | None = None
    fast_squares: bool = True
    batched: bool | None = None
    by_root: bool = False

    def __repr__(self) -> str:
        return self.name

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            whole(self.chunk_size, "chunk_size", of="examples")
        if self.groups is not None:
            whole(self.groups, "groups", of="micro-batches (None: one an example)")


class Plan(NamedTuple):
    """Which way a batch of these shapes takes."""

    together: bool  # whether examples' vectors come from a pass of the whole batch
    taps: bool  # whether layers are tapped; else gradients are whole
    group_length: int  # examples whose vectors are summed before they are squared
    at_once: int  # units (examples, or groups of them) held at once
    words: tuple[str, ...]  # of each parameter, how its squares are made


@dataclasses.dataclass(frozen=True, eq=False)
class Pull:
    """A rule for a model, reduced by a structure."""

    rule: Rule
    model: Model
    structure: Structure

    def __post_init__(self) -> None:
        layers, asked = self.structure.layers, self.rule.batched
        batched = layers is not None and layers.batched
        if layers is not None and asked not in (None, batched):
            mode = "whole batches" if batched else "single examples"
            raise ValueError(
                f"{self.structure.name} was given layers of a model that is run on "
                f"{mode}, and estimators.{self.rule.name} batched={asked}: find the "
                f"layers with batched={asked} too."
            )
        if batched or asked:
            self.check_whole(layers.together if layers is not None else None)

    def check_whole(self, together: str | None) -> None:
        """Raises for options that cut batches of a model that is run on whole ones."""
        layers, rule = self.structure.layers, self.rule
        why = together or "batched=True"
        if layers is not None and not layers.batched:
            raise ValueError(
                f"{self.structure.name} was given layers of single examples, and the "
                f"model's examples interact ({why}): find the layers with "
                "batched=True, from inputs of two or more examples."
            )
        allowed: dict[str, tuple] = {"groups": (None, 1)}
        apart = ""
        if layers is not None:
            allowed |= {"chunk_size": (None,), "fast_squares": (True,)}
            apart = ", and single examples have no vectors"
        elif rule.groups is not None:
            allowed["chunk_size"] = (None,)
        of = f"estimators.{rule.name} of"
        if layers is not None:
            of = f"{self.structure.name} was given layers of"
        for name, values in allowed.items():
            value = getattr(rule, name)
            if value not in values:
                raise ValueError(
                    f"{of} a model that is run on whole batches ({why}), where a part "
                    f"of a batch would be a batch of its own{apart}: {name} must be "
                    f"{' or '.join(map(repr, values))}; got {value!r}."
                )

    @property
    def rows_of(self) -> Layers | None:
        """The layers by which whole batches are pulled back, if they are."""
        layers, each = self.structure.layers, self.rule.groups is None
        return layers if layers and layers.batched and each else None

    def traced_once(self) -> "Pull":
        """For one computation, in which the model is traced once a shape."""
        return dataclasses.replace(self, model=self.model.traced_once())

    def cotangents(
        self, outputs: jax.Array, targets: Any, each: jax.Array | None, key: Any
    ) -> jax.Array:
        """Of one example, `(R, 1, ...)`: of its outputs `(1, ...)` and its targets.

        Times `each`, the root of the weight of each target, where there is one; where
        targets go together, those of the targets that are there.
        """
        targets = jax.tree.map(lambda y: y[None], targets)
        own = self.model.likelihood
        if each is not None and own.observing is not None:
            own, each = own.observing(each[None]), None
        vectors = self.rule.cotangents(own, outputs, targets, key)
        if each is None:
            return vectors
        rest = vectors.ndim - 2 - each.ndim
        each = each.reshape((1, 1, *each.shape, *(1,) * rest))
        return (trees.widen(vectors) * each).astype(vectors.dtype)


def check(pull: Pull, params: PyTree, batch: Batch) -> None:
    """Raises where the batch is not what the rule and the model take."""
    if pull.rule.needs_targets and batch.targets is None:
        raise ValueError(
            f"estimators.{pull.rule.name} needs targets; the batch's are None."
        )
    pull.model.check(params, batch, pull.structure.layers)


def table(pull: Pull, params: PyTree, batch: Batch) -> str:
    """How each parameter's squares are made."""
    pull = pull.traced_once()
    pull.model.check(params, batch._replace(targets=None), pull.structure.layers)
    words = plan_of(pull, params, batch).words
    named = trees.named_leaves(params)
    rows = [
        (name, leaf.shape, way) for (name, leaf), way in zip(named, words, strict=True)
    ]
    return tables.aligned([("parameter", "shape", "path"), *rows], text=True)


def plan_of(pull: Pull, params: PyTree, batch: Batch) -> Plan:
    """The plan for these shapes, of which each is decided once."""
    return pull.model.told("plan", (params, batch), functools.partial(_plan, pull))


def _plan(pull: Pull, params: PyTree, batch: Batch) -> Plan:
    rule, structure, count = pull.rule, pull.structure, num_examples(batch)
    if pull.rows_of is not None:
        return Plan(True, True, count, 1, _words(pull.rows_of))
    if count % (rule.groups or 1):
        raise ValueError(
            f"groups = {rule.groups} must divide the number of examples n = {count}: "
            "the batch is cut into equal micro-batches (pad it with rows of weight "
            "zero)."
        )
    length = 1 if rule.groups is None else count // rule.groups
    is_whole = length == count and (rule.chunk_size or count) >= count
    together = None if is_whole else pull.model.interaction(params, batch.inputs)
    if together is not None:
        pull.check_whole(together)
        return _whole_plan(pull, params, batch)
    one = batches.map_examples(lambda x: jax.eval_shape(lambda x: x[:1], x), batch)
    if length == 1:
        pull.model.outputs_alone(params, batch.inputs)
    columns = _num_columns(pull, params, one)
    entries, bound, words = columns * trees.size(params), CHUNK_ENTRIES, None
    path, taps, one_by_one = "a gradient for each example", False, False
    if length > 1:
        path, bound = f"one gradient for each group of {length} examples", GROUP_ENTRIES
    elif rule.fast_squares and (
        structure.takes_outer_products or structure.held_by_outer_products
    ):
        layers = layers_of(pull.model.apply_fn, params, one.inputs, batched=False)
        stack = _shapes_of_vectors(params, layers, columns)
        if structure.takes_outer_products:
            taps, words, one_by_one = True, _words(layers), layers.one_by_one
            entries = sum(
                leaf.entries if isinstance(leaf, OuterProducts) else leaf.size
                for leaf in stack
            )
        held_by = structure.held_by_outer_products
        held = held_by and held_by(stack)
        if held is not None:
            taps, entries = True, held
            path = "products of inputs times products of gradients"
    if length == 1 and not taps and not structure.takes_outer_products:
        path = f"{path} ({structure.name} reduces whole vectors)"
    if rule.chunk_size is None:
        at_once = 1 if one_by_one else fitting(entries, bound)
    else:
        at_once = max(rule.chunk_size // length, 1)
    words = words or (path,) * len(jax.tree.leaves(params))
    return Plan(False, taps, length, at_once, words)


def _whole_plan(pull: Pull, params: PyTree, batch: Batch) -> Plan:
    """For vectors of single examples, each from a pass back through the whole batch."""
    columns = _num_columns(pull, params, batch)
    outputs = pull.model.outputs(params, batch.inputs)
    passing = trees.size((batches.split(batch.inputs)[0], outputs))
    entries = columns * max(trees.size(params), passing)
    at_once = pull.rule.chunk_size or fitting(entries, CHUNK_ENTRIES)
    path = "a gradient of the whole batch for each example"
    words = (path,) * len(jax.tree.leaves(params))
    return Plan(True, False, 1, at_once, words)


def fitting(entries: int, bound: int) -> int:
    """How many units of so many entries each are held at once."""
    return max(bound // max(entries, 1), 1)


def _num_columns(pull: Pull, params: PyTree, batch: Batch) -> int:
    """The cotangents of one example."""
    if pull.rule.needs_targets and batch.targets is None:  # of which a table is made
        return pull.rule.num_columns
    rule = functools.partial(pull.rule.cotangents, pull.model.likelihood)
    outputs = pull.model.outputs(params, batch.inputs)
    one = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype),
        (outputs, batch.targets),
    )
    key = jax.eval_shape(jax.random.key, 0) if pull.rule.random else None
    return jax.eval_shape(rule, *one, key).shape[0]


def products(layer: Layer, inputs: Any, gradients: Any, weights: Any) -> OuterProducts:
    """The vectors of a layer's kernel; of pairs where it is tied."""
    if weights.ndim > 1:
        weights = weights.reshape((weights.shape[0], -1))
    turned = None
    if layer.num_turned:
        (inputs, entering), (gradients, returning) = inputs, gradients
        layout = layer.kernel_layout.transpose((0, 2, 1))
        turned = OuterProducts(
            entering, returning, weights, layer.num_outputs, False, layout
        )
    return OuterProducts(
        inputs,
        gradients,
        weights,
        layer.num_inputs,
        layer.bias is not None,
        layer.kernel_layout,
        turned,
    )


def _shapes_of_vectors(params: PyTree, layers: Layers, columns: int) -> list:
    """Of one example: for each parameter outer products, or a stack, as shapes."""
    dtype = trees.float_dtype(params)

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    stack = [shape(columns, *leaf.shape) for leaf in jax.tree.leaves(params)]
    for layer in layers.layers:
        each = (layer.num_stacked, layer.num_positions)
        ids = layer.kind == "embedding"
        inputs: Any = shape(1, *each) if ids else shape(1, *each, layer.num_inputs)
        gradients: Any = shape(1, columns, *each, layer.num_outputs)
        if layer.num_turned:
            turned = (layer.num_stacked, layer.num_turned)
            inputs = inputs, shape(1, *turned, layer.num_outputs)
            back = shape(1, columns, *turned, layer.num_inputs)
            gradients = gradients, back
        stack[layer.kernel] = products(layer, inputs, gradients, shape(1))
    return stack


def _words(layers: Layers) -> tuple[str, ...]:
    """How each parameter's per-example squares are made."""
    words = {}
    for layer in layers.layers:
        shared = layer.num_positions
        if layer.num_turned:
            path = (
                "a gradient for each example, from inputs and gradients both ways, at "
                f"{shared} and {layer.num_turned} positions"
            )
        elif shared == 1:
            path = "squares of inputs times squares of gradients"
        elif layer.kind == "embedding":
            path = f"gradients summed by id over {shared} positions"
        else:
            path = (
                "a gradient for each example, from inputs and gradients at "
                f"{shared} positions"
            )
        words[layer.kernel] = path
        if layer.bias is not None:
            words[layer.bias] = "squares of gradients"
    for leaf, reason in layers.fallback:
        each = "the batch" if leaf in layers.summed else "each example"
        words[leaf] = f"a gradient for {each} ({reason})"
    return tuple(words[i] for i in range(len(words)))
