"""What variational training keeps: a precision, and averaged gradients."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import estimators, posteriors, structures
from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.transforms.preconditioner import checks as rules
from fisherflow_jax.transforms.preconditioner import state as states

PyTree = Any


class VariationalState(NamedTuple):
    """The precision of the Gaussian whose mean are the parameters.

    Made by `ff.transforms.variational`.

    Attributes:
      step: `()` int32, updates that were not skipped.
      information: I, of all observations and of the prior.
      prior_precision: P, the prior's part of it.
      prior_mean: like the parameters; None: zero.
      momentum: averaged gradients, like the parameters, in float32 or wider.
      num_skipped: `()` int32, updates refused for a non-finite value.
      rows_skipped: `()` int32, bad rows of batches, left out.
      key: key data; None if nothing is drawn from it.
    """

    step: jax.Array
    information: Any
    prior_precision: Any
    prior_mean: PyTree | None
    momentum: PyTree
    num_skipped: jax.Array
    rows_skipped: jax.Array
    key: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The choices of `variational` that an update reads."""

    estimator: estimators.Estimator | None
    num_samples: int
    num_observations: Any
    b1: Any
    b2: Any
    bad_rows: str

    @property
    def structure(self) -> structures.Structure:
        own = self.estimator
        return structures.diagonal() if own is None else own.structure

    @property
    def indefinite(self) -> bool:
        """Whether what is measured may leave the cone of positive matrices."""
        return self.estimator is None or self.estimator.not_a_curvature is not None


def get_posterior(opt_state: Any, params: PyTree) -> posteriors.Posterior:
    """The Gaussian that `ff.transforms.variational` trains, as a state.

    Args:
      opt_state: that of any chain or wrapper of Optax that holds one `variational`.
      params: the parameters of the loop, its mean.

    Returns:
      A `Posterior`, for `ff.sample`, `ff.predict`, `ff.confidence_interval` and all
      else that takes a state. Within `optax.masked` or `optax.partition` it is about
      the parameters that were shown. Cost: none.

    Raises:
      ValueError: where there is no `variational`, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> optimizer = ff.transforms.variational(
      ...     0.1, num_observations=100, information=99.0
      ... )
      >>> params = jnp.ones(2)
      >>> posterior = ff.transforms.get_posterior(optimizer.init(params), params)
      >>> ff.standard_error(posterior)
      Array([0.1, 0.1], dtype=float32)
    """
    state = states.only_state(opt_state, VariationalState, "ff.transforms.variational")
    return posteriors.Posterior(
        mean=shown(params, state.momentum),
        information=state.information,
        temperature=jnp.ones((), trees.float_dtype(state.momentum)),
        prior_precision=state.prior_precision,
    )


def init(recipe: Recipe, start: tuple, params: PyTree) -> VariationalState:
    information, prior_precision, prior_mean, key = start
    if recipe.estimator is not None:
        name = f"estimators.{recipe.estimator.name}"
        rules.check_key(name, recipe.estimator.random, key)
    rules.check_real(params)
    like = jax.tree.map(jnp.zeros_like, params)  # params may be shapes
    if jax.tree.leaves(like):
        prior_mean = _anchor(prior_mean, like)
        about = _start(recipe.structure, gathered(information), like)
        believed = posteriors.posterior(like, about, prior_precision=prior_precision)
        about, precision = believed.information, believed.prior_precision
    else:  # as optax.tree.map_params has it, to see what is like the parameters
        about, precision = recipe.structure.empty(like), prior_precision
        prior_mean = None if prior_mean is None else like
        if not ops.is_information(precision):
            number = trees.is_leaf(precision)
            precision = (
                structures.Scalar(jnp.zeros(()))
                if number
                else structures.Diagonal(like)
            )
    if recipe.estimator is None and not ops.facts(about).elementwise:
        raise ValueError(
            "without an estimator the precision is diagonal, and the prior_precision "
            "is a number, a pytree prefix of numbers or a diagonal information."
        )
    count = jnp.zeros((), jnp.int32)
    state = VariationalState(
        step=count,
        information=about,
        prior_precision=precision,
        prior_mean=prior_mean,
        momentum=trees.widen(like),
        num_skipped=count,
        rows_skipped=count,
        key=key,
    )
    return states.settled(state)


def _anchor(prior_mean: PyTree | None, like: PyTree) -> PyTree | None:
    if prior_mean is None:
        return None
    prior_mean = shown(trees.real_arrays(prior_mean, "prior_mean"), like)
    trees.check_shapes(prior_mean, like, "prior_mean must be like the parameters")
    return trees.widen(prior_mean)


def shown(whole: PyTree, params: PyTree) -> PyTree:
    """What the parameters show of a tree, which wrappers of Optax give them alone."""
    if not trees.has_holes(params) or trees.has_holes(whole):
        return whole
    return trees.punch(whole, params)


def _start(structure: structures.Structure, information: Any, like: PyTree) -> Any:
    """What the precision starts from, in the structure."""
    nothing = structure.empty(like)
    if not ops.is_information(information):
        if not trees.is_leaf(information) or jnp.shape(information) != ():
            raise ValueError(
                "information is one of this library, of the num_observations rows, or "
                f"a number; got {checks.described(information)}."
            )
        checks.positive(information, "information, where it is a number,")
        return structure.isotropic(like, information)
    if trees.has_holes(like) and not trees.has_holes(ops.diagonal(information, like)):
        information = structure.restrict(information, like)
    total = ops.add(nothing, information)
    if type(total) is not type(nothing):
        raise ValueError(
            f"information is a {type(information).__name__}, which the structure "
            f"{structure.name} cannot hold: give one of an estimator "
            "with that structure, or a number."
        )
    return total
