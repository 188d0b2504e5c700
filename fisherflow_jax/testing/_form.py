"""Laws of form: arrays in NamedTuples that states hold and scan carries."""

from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax.flow import FlowState
from fisherflow_jax.structures import capabilities
from fisherflow_jax.testing._laws import same_layout, wide
from fisherflow_jax.testing._material import Material, PyTree
from fisherflow_jax.transforms import ScaleByFisherState

STATE_FIELDS = frozenset(FlowState._fields + ScaleByFisherState._fields)
NEEDS = {capabilities.OBSERVED: "from_matvec", capabilities.MARGINAL: "from_full"}
CAPABILITIES = capabilities.OF_A_MATRIX | {capabilities.ADAPTIVE, capabilities.MARGINAL}


def declared(m: Material) -> Any:
    """declared: the name, the capabilities and the functions they need are there"""
    name, supports = m.structure.name, set(m.structure.supports)
    assert isinstance(name, str) and name, (
        f"the structure's name is what errors call it; got {name!r}"
    )
    unknown = sorted(supports - CAPABILITIES)
    assert not unknown, (
        f"supports names {unknown}, which are no capabilities: {sorted(CAPABILITIES)}"
    )
    for capability, field in NEEDS.items():
        assert capability not in supports or getattr(m.structure, field), (
            f"a structure that supports {capability!r} needs {field}"
        )


def arrays(m: Material) -> Any:
    """arrays: an information is a NamedTuple of arrays with names of its own"""
    kind = type(m.whole).__name__
    assert isinstance(m.whole, tuple) and hasattr(m.whole, "_fields"), (
        f"an information is a NamedTuple, so that Optax sees inside; got {kind}"
    )
    paths: Any = jax.tree_util.tree_leaves_with_path(m.whole)
    taken = sorted({path[0].name for path, _ in paths} & STATE_FIELDS)
    assert not taken, (
        f"{kind} has fields {taken}, which the states that hold it also have: "
        "optax.tree.get would find two"
    )
    assert not m.strangers, f"{kind}: {', '.join(m.strangers)}"


def shapes_alone(m: Material) -> Any:
    """shapes alone: isotropic needs nothing but shapes and types"""
    shapes = jax.eval_shape(lambda: m.params)
    made = m.structure.isotropic(shapes, 1.5)
    expected = m.structure.isotropic(m.params, m.number(1.5))
    same_layout(made, expected, "isotropic of shapes, against that of arrays,")
    return list(zip(*map(jax.tree.leaves, (made, expected)), strict=True))


def no_leaves(m: Material) -> Any:
    """no leaves: isotropic of a tree without leaves adds and scales"""
    # optax.tree.map_params builds states on one
    made = m.structure.isotropic({}, 2.0)
    doubled = ops.scale(ops.add(made, made), 0.5)
    assert trees.same_structure(made, doubled), (
        f"isotropic of a tree without leaves is {made}, and added to itself {doubled}"
    )


def stream(m: Material) -> Any:
    """scan: an information is carried by lax.scan: shapes and types stay"""

    def run(params: PyTree, keys: jax.Array) -> Any:
        def body(total: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            added = m.structure.reduce(m.draw(params, key, 2))
            total = ops.add(ops.scale(total, 0.9), added)
            return total, ops.logdet(total, params)

        start = m.structure.isotropic(params, 1.0)
        return start, jax.lax.scan(body, start, keys)[0]

    start, end = jax.eval_shape(run, m.params, jax.random.split(m.key, 2))
    same_layout(end, start, "what a stream ends with, against what it began with,")


def float32_or_wider(m: Material) -> Any:
    """float32 or wider: half-precision vectors have a float32 information"""

    def run(params: PyTree, key: jax.Array) -> Any:
        reduced = m.structure.reduce(m.draw(params, key, 2))
        return reduced, m.structure.isotropic(params, 1.0)

    for narrow in (jnp.bfloat16, jnp.float16):
        half = jax.tree.map(lambda x, to=narrow: x.astype(to), m.params)
        reduced, isotropic = jax.eval_shape(run, half, m.key)
        wide(reduced, f"reduce of {jnp.dtype(narrow)}")
        wide(isotropic, f"isotropic of {jnp.dtype(narrow)}")
