"""Kronecker factors of layers within those of larger ones.

A layer has one number of the prior for all its entries, so that new rows of a layer
that was there have the number that it has: another one is refused.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks, processes, trees
from fisherflow_jax.layers import Layer, Layers
from fisherflow_jax.structures._algebra import layer_vectors

PyTree = Any
# a stack of the new table; that of the old one, and which of it; and where they are in
# the new one: kernels, inputs, outputs
Place = tuple[str, str, slice, tuple[np.ndarray, np.ndarray, np.ndarray]]
ROUNDED = 1e-5  # what additions make of a number


def embedded(information: Any, entries: PyTree, template: Any) -> Any:
    """The factors, zero where nothing is known, and the prior of what is new."""
    new = getattr(template, "layers", None)
    if new is None:
        raise ValueError(
            "of layers that grow the new table is needed: give structure="
            "ff.structures.kronecker(ff.layers.find_layers(apply_fn, params, inputs))."
        )
    old = information.layers
    _check(old, new, entries)
    dtype, places = trees.float_dtype(information), _places(old, new)
    with jax.ensure_compile_time_eval():
        split = functools.partial(layer_vectors.split, new, dtype=dtype)
        numbers, others = jax.jit(split)(entries)
    if checks.is_traced(numbers):
        raise ValueError(
            "the prior precision of new entries of layers must be known before tracing."
        )
    numbers = processes.on_host(numbers)
    known = {name: np.zeros(x.shape, bool) for name, x in numbers.items()}
    for stack, _, _, axes in places:
        known[stack][np.ix_(*axes)] = True
    start = {name: x[:, 0, 0] for name, x in numbers.items()}
    fill = functools.partial(_filled, places, template)
    inputs, outputs, shifts = jax.jit(fill)(information, start)
    for stack, group in new.alike.items():
        _check_numbers(new, group, numbers[stack], known[stack], shifts[stack])
    return information._replace(
        input_factors=inputs,
        output_factors=outputs,
        shifts=shifts,
        other_entries=trees.laid_over(information.other_entries, others),
        layers=new,
    )


def _filled(
    places: list[Place], template: Any, information: Any, shifts: dict
) -> tuple:
    """Factors of zeros, and in them the former ones; and the layers' shifts."""
    dtype = trees.float_dtype(information)
    former = information.input_factors, information.output_factors
    sides = [
        {name: jnp.zeros(x.shape, dtype) for name, x in side.items()}
        for side in (template.input_factors, template.output_factors)
    ]
    for stack, before, rows, axes in places:
        shift = information.shifts[before][rows]
        shifts[stack] = shifts[stack].at[axes[0]].set(shift)
        for side, factors, axis in zip(sides, former, axes[1:], strict=True):
            factor = factors[before][rows]
            if factor.ndim > side[stack].ndim:
                raise ValueError(
                    f"a side of the layers like {stack} has become wider than widest, "
                    "and its factor a diagonal, which cannot hold what is known: give "
                    "kronecker a larger one."
                )
            if factor.ndim < side[stack].ndim:
                factor = jax.vmap(jnp.diag)(factor)
            cells = np.ix_(axes[0], *[axis] * (factor.ndim - 1))
            side[stack] = side[stack].at[cells].set(factor)
    return *sides, shifts


def _check(old: Layers, new: Layers, entries: PyTree) -> None:
    """Raises unless every former leaf is there, and treated as it was."""
    shapes = [jax.ShapeDtypeStruct(s, np.int8) for s in old.shapes]
    jax.eval_shape(trees.laid_over, jax.tree.unflatten(old.tree, shapes), entries)
    layer_vectors.check_like(new, entries)
    now = _owners(new)
    for name, owner in _owners(old).items():
        if now[name] != owner:
            raise ValueError(
                f"{name} was {owner}, and in the new table it is {now[name]}: what is "
                "known of it does not fit there."
            )


def _owners(layers: Layers) -> dict[str, str]:
    """What each leaf is of a layer."""
    found = dict.fromkeys(layers.names, "in no layer")
    for layer in layers.layers:
        kernel, *bias = layer_vectors.members(layers, layer)
        found |= {kernel: f"the kernel of a {layer.kind} layer"}
        found |= dict.fromkeys(bias, f"the bias of {kernel}")
    return found


def _places(old: Layers, new: Layers) -> list[Place]:
    """Of each former layer, where it is among those that are now alike."""

    def coded() -> tuple[dict, dict]:
        """What was each stack, its entries being numbered as the new ones are."""
        zeros = jax.tree.unflatten(new.tree, [jnp.zeros(s, int32) for s in new.shapes])
        stacks, others = layer_vectors.split(new, zeros, int32)
        codes = {n: jnp.arange(x.size, dtype=int32) for n, x in stacks.items()}
        codes = {n: x.reshape(stacks[n].shape) for n, x in codes.items()}
        leaves = layer_vectors.named(layer_vectors.join(new, codes | others, None))
        former = [
            leaves[name][tuple(map(slice, shape))]
            for name, shape in zip(old.names, old.shapes, strict=True)
        ]
        former = jax.tree.unflatten(old.tree, former)
        return layer_vectors.split(old, former, int32)[0], stacks

    int32, places = np.int32, []
    with jax.ensure_compile_time_eval():
        codes, stacks = jax.tree.map(np.asarray, jax.jit(coded)())
    for kernel, (before, rows) in old.places.items():
        stack, code = new.places[kernel][0], codes[before][rows]
        at = np.unravel_index(code, stacks[stack].shape)
        axes = at[0][:, 0, 0], at[1][0, :, 0], at[2][0, 0, :]
        again = np.ravel_multi_index(np.ix_(*axes), stacks[stack].shape)
        if not np.array_equal(code, again):
            raise ValueError(
                f"what {kernel} has grown by is neither inputs nor outputs nor whole "
                "kernels of its layer: what is known of it does not fit there."
            )
        places.append((stack, before, rows, axes))
    return places


def _check_numbers(
    layers: Layers,
    group: tuple[Layer, ...],
    numbers: np.ndarray,
    known: np.ndarray,
    shifts: jax.Array,
) -> None:
    """Raises where new entries of a layer are not to have the number of its prior."""
    for layer in group:
        kernel = layers.names[layer.kernel]
        for row in range(layers.places[kernel][1].start, layers.places[kernel][1].stop):
            wanted = numbers[row][~known[row]]
            if not wanted.size:
                continue
            shift = processes.fetched(shifts[row])
            if checks.is_traced(shift):
                raise ValueError(
                    f"{kernel} has grown, and the prior precision that it has must be "
                    "known before tracing: call extend outside of jit."
                )
            if not np.allclose(wanted, float(shift), rtol=ROUNDED, atol=0):
                raise ValueError(
                    "a layer of a Kronecker information has one prior precision: that "
                    f"of {kernel} is {float(shift):.6g}, and new entries of it cannot "
                    f"have {np.unique(wanted)}. Give that number, or add what is new "
                    "as a layer of its own."
                )
