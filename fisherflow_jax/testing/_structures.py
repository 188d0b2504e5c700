"""Checks a structure: one call, all the laws."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees
from fisherflow_jax._ground.keys import typed_key
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing import _algebra as algebra
from fisherflow_jax.testing import _draws as draws
from fisherflow_jax.testing import _operations as operations
from fisherflow_jax.testing import _transformations as transformations
from fisherflow_jax.testing._laws import Dense, Law, Laws, Report, setting
from fisherflow_jax.testing._material import Draw, Material, make, random_vectors

PyTree = Any

LARGEST = 256  # parameters: dense matrices are the reference
MAPPED = Law(
    "vmap",
    "operations over a stack are those of its parts",
    transformations.mapped,
    transformations.judge_mapped,
)
# sums need no second look in float32
MATRIX_LAWS = [*algebra.LAWS, *operations.LAWS, MAPPED]
FORM = {
    "declared": "the name, the capabilities and the functions they need are there",
    "arrays": "an information is a NamedTuple of arrays with names of its own",
    "shapes alone": "isotropic needs nothing but shapes and types",
    "no leaves": "isotropic of a tree without leaves adds and scales",
    "scan": "an information is carried by lax.scan: shapes and types stay",
    "float32 or wider": "half-precision vectors have a float32 information",
    "sample": "samples have mean zero and the inverse matrix for covariance",
    "keys": "the same key gives the same sample, another key another",
    "jit": "eager calls give the numbers of compiled ones",
}
STRUCTURE_LAWS = FORM | {law.name: law.rule for law in MATRIX_LAWS}


def check_structure(
    structure: Structure,
    params: PyTree,
    *,
    draw: Draw = random_vectors,
    key: Any = 0,
    tolerance: float = 1e-9,
    float32_tolerance: float = 1e-3,
    float_types: Sequence[str] = ("float64", "float32"),
    num_samples: int = 5000,
    skip: Mapping[str, str] | None = None,
) -> Report:
    r"""Checks every law of a structure and of its information type, by numbers.

    Operations are compared with dense matrices in numpy, sums with sums of matrices,
    samples with Wishart's variances

    .. math:: \operatorname{var}(S_{ij}) = (C_{ij}^2 + C_{ii} C_{jj}) / n,
       \quad C = I^{-1},

    in float64, and the operations once more in float32, whatever the settings of the
    caller, and under strict promotion of types and of ranks.

    Args:
      structure: a `Structure`, yours or one of `ff.structures`.
      params: a tree of arrays for which to check it, of at most 256 entries. Leaves of
        several shapes (of no axis, one, two) find more.
      draw: `(params, key, count) -> stack`, what `structure.reduce` is given; by
        default leaves `(count, *leaf.shape)`. For a structure that takes
        `OuterProducts` only.
      key: of the random numbers, an int or a key.
      tolerance: largest error in float64, relative to the largest entry.
      float32_tolerance: the same in float32.
      float_types: the types to check in.
      num_samples: samples whose covariance is looked at, in the first of the types. Of
        all its entries the worst may be as far off as happens once in a million checks.
      skip: law -> why it does not apply, as `{"addition": "recompressed to its rank"}`.
        The reasons are kept in the report.

    Returns:
      A `Report`: the laws that hold, and those that do not apply with the reason. Cost:
      some seconds, in which JAX compiles; memory a few d x d matrices and
      `num_samples` vectors.

    Raises:
      AssertionError: if laws are broken: their names, rules and numbers, all at once.
      ValueError: for parameters that are too many or not floating point, fewer than
        100 samples, and names in `skip` that are no laws.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
      >>> report = ff.testing.check_structure(ff.structures.diagonal(), params)
      >>> len(report.checked), report.not_applicable
      (48, {})
    """
    _check_params(params)
    if num_samples < 100:
        raise ValueError(
            "a covariance is not seen in fewer than 100 samples; num_samples is "
            f"{num_samples}."
        )
    laws = Laws(f"structure {structure.name}", STRUCTURE_LAWS, skip)
    laws.check("declared", lambda: transformations.declared(structure))
    samples = num_samples
    for float_type in float_types:
        allowed = tolerance if float_type == "float64" else float32_tolerance
        with setting(float_type):
            cast = jax.tree.map(lambda x, to=float_type: np.asarray(x, to), params)
            cast = jax.tree.map(jax.numpy.asarray, cast)
            _check_in(structure, cast, draw, key, allowed, samples, laws)
        samples = 0
    return laws.report()


def _check_params(params: PyTree) -> None:
    arrays = trees.real_arrays(params, "params")
    size = trees.size(arrays)
    if not 1 <= size <= LARGEST:
        raise ValueError(
            f"params have {size} entries: a structure is checked on 1 to {LARGEST}, "
            "since dense matrices are the reference."
        )


def _check_in(
    structure: Structure,
    params: PyTree,
    draw: Draw,
    key: Any,
    tolerance: float,
    num_samples: int,
    laws: Laws,
) -> None:
    """Checks in one float type; without samples the operations alone."""
    typed = typed_key(key)
    forms = {
        "shapes alone": lambda: transformations.shapes_alone(structure, params),
        "no leaves": lambda: transformations.no_leaves(structure),
        "scan": lambda: transformations.stream(structure, params, typed, draw),
        "float32 or wider": lambda: transformations.wide(
            structure, params, typed, draw
        ),
    }
    for name, test in forms.items():
        laws.check(name, test)
    # one by one and not in one compiled program: what JAX has compiled for one
    # structure then serves the next, and most of the time goes into compiling
    material = make(structure, params, typed, trees.size(params) + 3, draw)
    whole = material.whole
    dense = Dense(
        [_matrix(part, params) for part in material.parts],
        _matrix(whole, params),
        np.asarray(trees.ravel(material.vector), np.float64),
    )
    laws.check("arrays", lambda: transformations.arrays(whole))
    for law in MATRIX_LAWS if num_samples else operations.LAWS:
        why_not = law.applies(material)
        if why_not is not None:
            laws.pass_over(law.name, why_not)
            continue
        laws.check(
            law.name,
            functools.partial(_hold, law, material, dense, tolerance),
        )
    if num_samples:
        laws.check("jit", lambda: transformations.compiled(material, tolerance))
        _check_samples(material, dense, num_samples, laws)


def _matrix(information: Any, params: PyTree) -> np.ndarray:
    return np.asarray(ops.to_dense(information, params), np.float64)


def _hold(law: Law, material: Material, dense: Dense, tolerance: float) -> None:
    found = jax.tree.map(np.asarray, law.measure(material))
    law.judge(found, dense, tolerance)


def _check_samples(
    material: Material, dense: Dense, num_samples: int, laws: Laws
) -> None:
    found = []

    def judge() -> None:
        found.append(np.asarray(draws.measure(material, num_samples)))
        draws.judge(found[0], dense.whole)

    laws.check("sample", judge)
    if found:
        laws.check("keys", lambda: draws.judge_keys(found[0]))
