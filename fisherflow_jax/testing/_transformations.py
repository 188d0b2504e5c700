"""Laws of form: arrays in NamedTuples that jit, vmap and scan carry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax import structures
from fisherflow_jax._ground import trees
from fisherflow_jax.flow import FlowState
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing._laws import QUICKLY, Dense, equal
from fisherflow_jax.testing._material import Draw, Material, flat
from fisherflow_jax.transforms import ScaleByFisherState

PyTree = Any

_STATE_FIELDS = frozenset(FlowState._fields + ScaleByFisherState._fields)
_CAPABILITIES = structures.capabilities.OF_A_MATRIX | {
    structures.capabilities.ADAPTIVE,
    structures.capabilities.MARGINAL,
}


def declared(structure: Structure) -> None:
    """What the structure says about itself is consistent."""
    assert isinstance(structure.name, str) and structure.name, (
        f"the structure's name is what errors call it; got {structure.name!r}"
    )
    unknown = sorted(set(structure.supports) - _CAPABILITIES)
    assert not unknown, (
        f"supports names {unknown}, which are no capabilities: {sorted(_CAPABILITIES)}"
    )
    needs = [
        (structures.capabilities.OBSERVED, "from_matvec"),
        (structures.capabilities.MARGINAL, "from_full"),
    ]
    for capability, field in needs:
        assert capability not in structure.supports or getattr(structure, field), (
            f"a structure that supports {capability!r} needs {field}"
        )


def arrays(information: Any) -> None:
    """A NamedTuple whose leaves are arrays."""
    kind = type(information).__name__
    assert isinstance(information, tuple) and hasattr(information, "_fields"), (
        f"an information is a NamedTuple, so that Optax sees inside; got {kind}"
    )
    paths = jax.tree_util.tree_leaves_with_path(information)
    taken = sorted({path[0].name for path, _ in paths} & _STATE_FIELDS)
    assert not taken, (
        f"{kind} has fields {taken}, which the states that hold it also have: "
        "optax.tree.get would find two"
    )
    for name, leaf in trees.named_leaves(information):
        assert isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)), (
            f"{kind}: {name} is no array but {type(leaf).__name__}"
        )


def same_layout(one: Any, other: Any, what: str) -> None:
    """Raises unless both have one tree, the same shapes and the same types."""
    import chex  # for whoever tests alone

    chex.assert_trees_all_equal_shapes_and_dtypes(one, other, custom_message=what)


def shapes_alone(structure: Structure, params: PyTree) -> None:
    """isotropic needs shapes, and reduce returns what isotropic returns."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    made = structure.isotropic(shapes, 1.5)
    expected = structure.isotropic(params, jnp.asarray(1.5, trees.float_dtype(params)))
    same_layout(made, expected, "isotropic of shapes, against that of arrays,")
    for one, other in zip(
        jax.tree.leaves(made), jax.tree.leaves(expected), strict=True
    ):
        equal(one, other, 1e-6, "isotropic of shapes, against that of arrays,")


def no_leaves(structure: Structure) -> None:
    """optax.tree.map_params builds states on a tree without leaves."""
    made = structure.isotropic({}, 2.0)
    doubled = ops.scale(ops.add(made, made), 0.5)
    trees: list[Any] = [jax.tree.structure(x) for x in (made, doubled)]
    assert trees[0] == trees[1], (
        f"isotropic of a tree without leaves has the tree {trees[0]}, and added to "
        f"itself {trees[1]}"
    )


def stream(structure: Structure, params: PyTree, key: jax.Array, draw: Draw) -> None:
    """A scan carries an information: types and shapes stay."""

    def run(params: PyTree, keys: jax.Array) -> Any:
        def body(total: Any, step_key: jax.Array) -> tuple[Any, jax.Array]:
            added = structure.reduce(draw(params, step_key, 2))
            total = ops.add(ops.scale(total, 0.9), added)
            return total, ops.logdet(total, params)

        start = structure.isotropic(params, 1.0)
        return start, jax.lax.scan(body, start, keys)[0]

    start, end = jax.eval_shape(run, params, jax.random.split(key, 2))
    same_layout(end, start, "what a stream ends with, against what it began with,")


def wide(structure: Structure, params: PyTree, key: jax.Array, draw: Draw) -> None:
    """Half-precision vectors have an information in float32 or wider."""
    for narrow in (jnp.bfloat16, jnp.float16):
        half = jax.tree.map(lambda x, to=narrow: x.astype(to), params)
        made = jax.eval_shape(
            lambda p, k: (structure.reduce(draw(p, k, 2)), structure.isotropic(p, 1.0)),
            half,
            key,
        )
        for name, part in zip(("reduce", "isotropic"), made, strict=True):
            for leaf in jax.tree.leaves(part):
                assert jnp.finfo(leaf.dtype).bits >= 32, (
                    f"{name} of {jnp.dtype(narrow)} keeps {leaf.dtype}"
                )


def compiled(material: Material, tolerance: float) -> None:
    """The numbers of compiled calls are those of eager ones."""
    params = material.params

    def run(information: Any, vector: PyTree, key: jax.Array) -> dict:
        sample = ops.sample(information, key, params)
        return {
            "solve": flat(ops.solve(information, vector), params, "what solve returns"),
            "matvec": flat(ops.matvec(information, vector), params, "a product"),
            "logdet": ops.logdet(information, params),
            "sample": flat(sample, params, "a sample"),
        }

    arguments = material.whole, material.vector, material.key
    eager, jitted = run(*arguments), jax.jit(run, compiler_options=QUICKLY)(*arguments)
    for name, value in eager.items():
        equal(jitted[name], value, tolerance, f"{name} compiled, against eager,")


FACTORS = (0.5, 1.0)


def mapped(material: Material) -> tuple[jax.Array, jax.Array]:
    """Sums and solves over a stack of two multiples of the whole."""
    parts = [ops.scale(material.whole, factor) for factor in FACTORS]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *parts)

    def one(information: Any) -> tuple[jax.Array, jax.Array]:
        total = ops.add(information, material.whole)
        solved = ops.solve(total, material.vector)
        trace = ops.trace(total, material.params)
        return flat(solved, material.params, "what solve returns"), trace

    return jax.vmap(one)(stacked)


def judge_mapped(found: Any, dense: Dense, tolerance: float) -> None:
    solved, traces = found
    for index, factor in enumerate(FACTORS):
        total = (1 + factor) * dense.whole
        expected = np.linalg.solve(total, dense.vector)
        equal(solved[index], expected, tolerance, f"solve of part {index} of a stack")
        equal(traces[index], np.trace(total), tolerance, f"trace of part {index}")
