"""Checks a structure: one call, all the laws."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import keys, trees
from fisherflow_jax.structures import Structure
from fisherflow_jax.testing import _eager, _form, _operations, _programs, _sums
from fisherflow_jax.testing._laws import Laws, Report, laws_in, setting
from fisherflow_jax.testing._material import Draw, Material, random_vectors

PyTree = Any

LARGEST = 256  # parameters: dense matrices are the reference
COMPILED = laws_in(_form, _sums, _operations, _programs)
EAGER = laws_in(_eager)
LAWS = COMPILED | EAGER
AGAIN = laws_in(_form, _operations)  # in the second type; sums need no second look


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
      (52, {})
    """
    size = trees.size(trees.real_arrays(params, "params"))
    if not 1 <= size <= LARGEST:
        raise ValueError(
            f"params have {size} entries: a structure is checked on 1 to {LARGEST}, "
            "since dense matrices are the reference."
        )
    if num_samples < 100:
        raise ValueError(
            "a covariance is not seen in fewer than 100 samples; num_samples is "
            f"{num_samples}."
        )
    laws = Laws(f"structure {structure.name}", LAWS, skip)
    for float_type in float_types:
        allowed = tolerance if float_type == "float64" else float32_tolerance
        with setting(float_type):
            cast = jax.tree.map(lambda x, to=float_type: jnp.asarray(x, to), params)
            material = Material(
                structure, cast, draw, keys.typed_key(key), allowed, num_samples
            )
            first = float_type == float_types[0]
            laws.check_compiled(COMPILED if first else AGAIN, material)
            if first:
                laws.check(EAGER, material)
    return laws.report()
