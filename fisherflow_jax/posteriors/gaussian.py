"""A Gaussian posterior from any estimate and any information about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax import batch as batches
from fisherflow_jax import information as ops
from fisherflow_jax import priors, vectors

PyTree = Any


class Posterior(NamedTuple):
    """The Gaussian `N(mean, information^-1)`."""

    mean: PyTree
    information: Any  # of the data and of the prior, divided by the temperature
    temperature: jax.Array  # shape=(), factor of the covariance


def posterior(
    mean: PyTree,
    information: Any,
    *,
    prior_precision: Any,
    temperature: jax.typing.ArrayLike = 1.0,
) -> Posterior:
    r"""The Gaussian posterior of an estimate: Laplace's approximation.

    .. math:: \mathcal N\big(\hat\theta,\; T (F + P)^{-1}\big)

    The mean may come from any training, and the information from any pass over the
    data: an estimator's value, `ff.accumulate(...).information`, or what an optimiser
    gathered on its way. All that takes a state (`ff.confidence_interval`, `ff.sample`,
    `ff.predict`, `ff.summary`, `ff.wald_test`, `ff.delta_method`) takes a posterior.

    Args:
      mean: the estimate, a pytree of arrays.
      information: F, a sum over the observations, about parameters like `mean`.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information. On a Kronecker information one number a layer.
      temperature: T, a positive factor of the covariance; below 1 for a cold posterior.

    Returns:
      A `Posterior`. Cost: one addition and the diagonal (for Kronecker factors that is
      their eigenvectors); what is solved is solved where it is used. On a Kronecker
      information a prior of several numbers is given outside of `jax.jit`.

    Raises:
      ValueError: where the information is about parameters of other shapes; for a prior
        or a temperature that is not positive, or an information that is not finite,
        where they are at hand.
      TypeError: for something that is no information.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0, 15.0]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> ff.standard_error(state)
      Array([0.5 , 0.25], dtype=float32)

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", 1992.
      Wenzel et al., "How good is the Bayes posterior in deep neural networks really?",
      2020.
    """
    mean = vectors.real_arrays(mean, "mean")
    check_about(information, mean)
    temperature = jnp.asarray(temperature, vectors.float_dtype(mean))
    if temperature.shape != ():
        raise ValueError(f"temperature is one number; got shape {temperature.shape}.")
    if not batches.holds((temperature > 0) & jnp.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}.")
    precision = priors.as_precision(prior_precision, mean)
    total = ops.add(information, precision)
    return Posterior(mean, ops.scale(total, 1 / temperature), temperature)


def check_about(information: Any, mean: PyTree) -> None:
    """Raises unless the information is about parameters like the mean, and finite."""
    entries = ops.diagonal(information, mean)
    check_like(entries, mean)
    for path, leaf in jax.tree_util.tree_leaves_with_path(entries):
        if not batches.holds(jnp.isfinite(leaf) & (leaf >= 0)):
            raise ValueError(
                "the diagonal of an information is finite and not negative; that of "
                f"parameter {jax.tree_util.keystr(path)} is {leaf}."
            )


def check_like(entries: PyTree, mean: PyTree) -> None:
    """Raises unless an information's diagonal, or its shapes, is like the mean."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (entries, mean)]
    if not vectors.same_structure(entries, mean) or shapes[0] != shapes[1]:
        raise ValueError(
            "the information is about another tree than the mean: its parameters have "
            f"shapes {shapes[0]}, the mean's are {shapes[1]}."
        )


def log_density(state: Any, params: PyTree) -> jax.Array:
    r"""The log-density of the posterior at `params`, a number.

    .. math:: \tfrac12 \log|I| - \tfrac d2 \log 2\pi
       - \tfrac12 (\theta - \hat\theta)^\top I (\theta - \hat\theta)

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0]))
      >>> state = ff.posterior(jnp.zeros(1), information, prior_precision=1.0)
      >>> print(ff.log_density(state, jnp.zeros(1)).round(3))
      -0.226
    """
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, state.mean)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"params must be like the mean: got shapes {shapes[0]}, not {shapes[1]}."
        )
    step = jax.tree.map(lambda x, m: x - m, params, state.mean)
    dimension = vectors.size(state.mean)
    logdet = ops.logdet(state.information, state.mean)
    quadratic = ops.quadratic_form(state.information, step)
    return 0.5 * (logdet - dimension * jnp.log(2 * jnp.pi) - quadratic)


def only(
    apply_fn: Callable, params: PyTree, chosen: Callable[[str], bool] | PyTree
) -> tuple[Callable, PyTree]:
    """A model of some of its parameters, the others held at their values.

    The last layer, adapters, or any mask: everything in this package then sees the
    chosen parameters alone.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      params: all parameters.
      chosen: a function of a leaf's path (`jax.tree_util.keystr`, such as
        `"['head']['kernel']"`), or a pytree of booleans like the parameters, or a
        prefix of it.

    Returns:
      `(apply_chosen, chosen_params)`: a function `(chosen_params, inputs) -> outputs`,
      and the chosen parameters: `params` with None in place of the others. No pass of
      the model.

    Raises:
      ValueError: if no parameter is chosen, or `chosen` does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["head"]
      >>> params = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
      >>> model, head = ff.only(apply_fn, params, lambda path: "head" in path)
      >>> head
      {'head': Array([1., 1., 1.], dtype=float32), 'w': None}
      >>> model(head, jnp.zeros((1, 2)))
      Array([0.], dtype=float32)
    """
    if callable(chosen):
        mask = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(chosen(jax.tree_util.keystr(path))), params
        )
    else:
        try:
            mask = jax.tree.map(
                lambda keep, part: jax.tree.map(lambda _: bool(keep), part),
                chosen,
                params,
            )
        except ValueError as error:
            raise ValueError(
                "chosen must be a pytree of booleans like the parameters, or a prefix "
                f"of it: {error}"
            ) from error
    if not any(jax.tree.leaves(mask)):
        names = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        raise ValueError(f"no parameter is chosen; their paths are {names}.")
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, params)
    held = jax.tree.map(lambda keep, x: None if keep else x, mask, params)

    def apply_chosen(chosen_params: PyTree, inputs: PyTree) -> Any:
        whole = jax.tree.map(
            lambda x, y: y if x is None else x,
            chosen_params,
            held,
            is_leaf=lambda x: x is None,
        )
        return apply_fn(whole, inputs)

    return apply_chosen, kept
