"""A damped information to a power: factorised once, applied to many vectors.

A factorisation is a pytree of arrays, so that a state can keep it. Those of
`ff.information` have a method `divide`. A way of damping of one's own is a function
`(information, damping, power, root_damping) -> factorisation` whose type has such a
method too, or is registered with `apply`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import trees

PyTree = Any


def factorise(
    information: Any,
    damping: jax.Array,
    power: float = -1,
    root_damping: jax.typing.ArrayLike = 0.0,
    like: PyTree | None = None,
) -> Any:
    r"""Prepares :math:`((F + \lambda)^{-p} + \epsilon)^{-1}` for `apply`.

    Args:
      information: the mean information of an observation.
      damping: `lambda`, on the information's scale.
      power: p; -1 is the inverse, -1/2 the inverse root.
      root_damping: `epsilon`, added after the root, as Adam's eps.
      like: a tree with the parameters' shapes, for a structure that stores none.

    In an eigenbasis no damped value of a layer (or block) is less than the precision
    times its largest: what a gradient has there is rounding.

    Returns:
      A pytree of arrays. Scalar and diagonal: the divisors; kronecker: its eigenbasis;
      full and blocks: a Cholesky factor for the power -1, an eigendecomposition for
      others. Any other structure is solved anew for each vector for the power -1, and
      has its dense matrix decomposed for others.

    Raises:
      ValueError: for a power other than -1 where only the dense matrix of more than
        4,096 parameters has it, with its bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([4.0, 9.0]))
      >>> root = ff.transforms.factorise(information, 0.0, power=-0.5)
      >>> print(ff.transforms.apply(root, jnp.ones(2)).round(3))
      [0.5   0.333]
    """
    own = ops.provides(ops.spectral, information)
    if power == -1 and (ops.facts(information).dense or not own):
        return ops.factorise(information, damping + root_damping)

    def rooted(damped: jax.Array) -> jax.Array:
        if power == -0.5:
            return jnp.sqrt(damped) + root_damping  # of a power the last bit is another
        return (damped if power == -1 else damped ** (-power)) + root_damping

    # layers by name: all of them, also those that a wrapper hides
    try:
        spectrum = ops.spectral(information, None if own else like)
    except ValueError as error:
        raise ValueError(f"power must be -1, got {power}: {error}") from error
    damped = ops.floored(spectrum.map(lambda x: x + jnp.asarray(damping, x.dtype)))
    return damped.map(rooted)


def was_floored(factorisation: Any) -> jax.Array | None:
    """Whether an eigenvalue was raised to what rounding knows; None: none can be."""
    if not isinstance(factorisation, ops.Floored):
        return None
    flags = factorisation.raised.values()
    return functools.reduce(jnp.logical_or, flags, jnp.array(False))


def relative_to_mean_eigenvalue(
    information: Any,
    damping: jax.Array,
    power: float = -1,
    root_damping: jax.typing.ArrayLike = 0.0,
    like: PyTree | None = None,
) -> Any:
    """As `factorise`, the damping being in units of the mean eigenvalue.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([1.0, 3.0]))
      >>> factorisation = ff.transforms.relative_to_mean_eigenvalue(information, 0.5)
      >>> print(ff.transforms.apply(factorisation, jnp.ones(2)))  # 1 / (I + 0.5 * 2)
      [0.5  0.25]
    """
    if ops.facts(information).elementwise:
        values = ops.spectral(information).values
        total = jnp.sum(trees.ravel(values))
    else:
        shown = None if ops.provides(ops.spectral, information) else like
        values = jax.eval_shape(lambda i: ops.diagonal(i, shown), information)
        total = ops.trace(information, shown)
    unit = total / max(trees.size(values), 1)
    return factorise(information, damping * unit, power, root_damping, like)


def factored_damping(
    information: Any,
    damping: jax.Array,
    power: float = -1,
    root_damping: jax.typing.ArrayLike = 0.0,
) -> Any:
    r"""Damps each Kronecker factor instead of the product.

    .. math::
      (A + \pi \sqrt\lambda)^{-1} \otimes (G + \sqrt\lambda / \pi)^{-1}, \qquad
      \pi^2 = \frac{\operatorname{tr} A / I}{\operatorname{tr} G / O}

    For `factorise=` of `ff.scale_by_fisher`: two Cholesky factorisations a layer, three
    to six times cheaper than the eigendecompositions of damping that is exact
    (`factorise`, the default). The product is damped by `lambda` and by cross terms on
    top, so that steps are shorter.

    Args:
      information: the mean information of an observation, a `Kronecker`.
      damping: `lambda`, on the information's scale.
      power: -1.
      root_damping: 0.

    Returns:
      The inverses of the factors, for `ff.transforms.apply`.

    Raises:
      ValueError: for another structure, power or root_damping.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     return x @ params["w"]
      >>> params, x = {"w": jnp.ones((2, 1))}, jnp.eye(2)
      >>> layers = ff.layers.find_layers(apply_fn, params, x)
      >>> structure = ff.structures.kronecker(layers)
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), structure
      ... )
      >>> mean = ff.information.scale(estimator(params, (x, None)), 1 / 2)
      >>> factorisation = ff.transforms.factored_damping(mean, 1e-4)
      >>> print(ff.transforms.apply(factorisation, params)["w"].shape)
      (2, 1)

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
    """
    factored = ops.provides(ops.factored, information)
    if not factored or power != -1 or root_damping != 0:
        raise ValueError(
            "factored damping is for the inverse of a Kronecker information: got "
            f"{type(information).__name__}, power {power}, root_damping {root_damping}."
        )
    return ops.factored(information, damping)


class Narrow(NamedTuple):
    """A factorisation whose arrays are kept in a narrower type."""

    narrow: Any

    def divide(self, vector: PyTree) -> PyTree:
        """As the factorisation does, in the vector's type or float32."""
        return apply(self.widened(vector), vector)

    def widened(self, vector: PyTree) -> Any:
        """The factorisation in the vector's type or float32."""
        return optax.tree.cast(self.narrow, trees.float_dtype(vector))


@ops.parts.register
def _(factorisation: Narrow) -> ops.Parts:
    return ops.parts(factorisation.narrow)


@dataclasses.dataclass(frozen=True)
class Narrowed:
    """A way of damping, what it gives being kept in this type."""

    factorise: Callable
    dtype: Any

    def __call__(self, *given: Any) -> Narrow:
        return Narrow(optax.tree.cast(self.factorise(*given), self.dtype))


def applied(
    factorisation: Any, vector: PyTree, sound: jax.Array
) -> tuple[PyTree, jax.Array]:
    """`apply`, or zeros unless `sound` and finite, and whether it is.

    Of stacks before they are cut into leaves, for each of which it would be compiled.
    """
    if isinstance(factorisation, Narrow):
        return applied(factorisation.widened(vector), vector, sound)
    stacked = hasattr(factorisation, "divide_stacks")
    found = (
        factorisation.divide_stacks(vector) if stacked else apply(factorisation, vector)
    )
    sound = sound & trees.all_finite(found)
    found = trees.zero_unless(sound, found)
    return (factorisation.apart(found, vector, sound) if stacked else found), sound


@functools.singledispatch
def apply(factorisation: Any, vector: PyTree) -> PyTree:
    """The prepared power times a vector, like the vector.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> factors = ff.transforms.factorise(
      ...     ff.structures.Diagonal(jnp.array([1.0, 3.0])), 1.0
      ... )
      >>> print(ff.transforms.apply(factors, jnp.ones(2)))
      [0.5  0.25]
    """
    if not hasattr(factorisation, "divide"):
        raise TypeError(
            f"{type(factorisation).__name__} is no factorisation: give it a method "
            "divide(vector), or register how it is applied with "
            "ff.transforms.apply.register."
        )
    return factorisation.divide(vector)
