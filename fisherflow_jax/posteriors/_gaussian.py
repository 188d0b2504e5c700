"""A Gaussian posterior from any estimate and any information: made, read, drawn."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, keys, trees
from fisherflow_jax._ground.directional import derivative
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.posteriors._belief import Gaussian, described, gaussian, gaussians
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures import _prior as priors

PyTree = Any


class Posterior(NamedTuple):
    """The Gaussian `N(mean, information^-1)`.

    Attributes:
      mean: a pytree like the parameters.
      information: of the data and of the prior, divided by the temperature.
      temperature: `()`, factor of the covariance.
      prior_precision: the prior's part of the information; None: not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> state = ff.posterior(
      ...     jnp.array([2.0]),
      ...     ff.structures.Full(jnp.array([[99.0]])),
      ...     prior_precision=1.0,
      ... )
      >>> print(type(state).__name__, ff.standard_error(state).round(3))
      Posterior [0.1]
    """

    mean: PyTree
    information: Any
    temperature: jax.Array
    prior_precision: Any | None = None

    def __repr__(self) -> str:
        return f"posterior({described(self)}, temperature {self.temperature})"


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
    data: an estimator's value, what `ff.accumulate` returns, or what an optimiser
    gathered on its way. All that takes a state (`ff.confidence_interval`, `ff.sample`,
    `ff.predict`, `ff.summary`, `ff.wald_test`, `ff.delta_method`) takes a posterior.
    `ff.laplace` makes one of a model and its data.

    Args:
      mean: the estimate, a pytree of arrays.
      information: F, a sum over the observations, about parameters like `mean`; an
        `Accumulation` is taken as its information. A structure
        (`ff.structures.diagonal()`): what is believed before any data, F = 0.
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
      TypeError: for something that is no information, such as a structure that was not
        called.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Diagonal(jnp.array([3.0, 15.0]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=1.0)
      >>> ff.standard_error(state)
      Array([0.5 , 0.25], dtype=float32)
      >>> before = ff.posterior(
      ...     jnp.array([1.0, 2.0]), ff.structures.diagonal(), prior_precision=4.0
      ... )
      >>> ff.standard_error(before)
      Array([0.5, 0.5], dtype=float32)

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", 1992.
      Wenzel et al., "How good is the Bayes posterior in deep neural networks really?",
      2020.
    """
    mean = trees.real_arrays(mean, "mean")
    if isinstance(information, str) or inspect.isfunction(information):
        checks.made(
            information,
            Structure,
            "information, where a structure stands for what is known before any data,",
            "ff.structures.diagonal()",
        )
    if isinstance(information, Structure):
        information = information.empty(mean)
    information = gathered(information)
    check_about(information, mean)
    temperature = jnp.asarray(temperature, trees.float_dtype(mean))
    if temperature.shape != ():
        raise ValueError(f"temperature is one number; got shape {temperature.shape}.")
    checks.positive(temperature, "temperature")
    precision = priors.as_precision(gathered(prior_precision), mean)
    # of several numbers a structure may ask the values
    one_number = trees.is_leaf(prior_precision) and jnp.ndim(prior_precision) == 0
    run = _compiled if one_number else _tempered
    total, precision = run(information, precision, temperature)
    return Posterior(
        mean=mean,
        information=total,
        temperature=temperature,
        prior_precision=precision,
    )


def _tempered(information: Any, precision: Any, temperature: jax.Array) -> tuple:
    total = ops.add(information, precision)
    return ops.scale(total, 1 / temperature), ops.scale(precision, 1 / temperature)


# operation by operation, a first call would take seconds
_compiled = jax.jit(_tempered)


def _read(information: Any, mean: PyTree) -> tuple[PyTree, PyTree]:
    """The entries of the diagonal, and of which leaves they can be those."""
    entries = ops.diagonal(information, mean)

    def valid(leaf: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(leaf) & (leaf >= 0))

    return entries, jax.tree.map(valid, entries)


_compiled_read = jax.jit(_read)


def check_about(information: Any, mean: PyTree) -> None:
    """Raises unless the information is about parameters like the mean, and finite."""
    # anything else is refused by its own name, and not by a tracer's
    read = _compiled_read if ops.is_information(information) else _read
    entries, valid = read(information, mean)
    check_like(entries, mean)
    for (name, leaf), fine in zip(
        trees.named_leaves(entries), jax.tree.leaves(valid), strict=True
    ):
        if not checks.holds(fine):
            raise ValueError(
                "the diagonal of an information is finite and not negative; that of "
                f"parameter {name} is {checks.shown(leaf)}."
            )


def check_like(entries: PyTree, mean: PyTree) -> None:
    """Raises unless an information's diagonal, or its shapes, is like the mean."""
    rule = "the information is about another tree than the mean"
    trees.check_shapes(entries, mean, rule)


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
    mean, information = gaussian(state)[:2]
    trees.check_shapes(params, mean, "params must be like the mean")
    step = jax.tree.map(lambda x, m: x - m, params, mean)
    logdet = ops.logdet(information, mean)
    quadratic = ops.quadratic_form(information, step)
    return 0.5 * (logdet - trees.size(mean) * jnp.log(2 * jnp.pi) - quadratic)


def sample(
    state: Any,
    key: Any,
    shape: tuple[int, ...] = (),
    *,
    log_density: Callable[[PyTree], jax.Array] | None = None,
) -> PyTree:
    r"""Draws from the posterior `N(mean, information^-1)`.

    Where the dispersion is estimated the draws are of the multivariate Student's t that
    integrates over it; for a bank, of the mixture.

    Args:
      state: anything with `.mean` and `.information`.
      key: an int, a key, or key data.
      shape: leading shape of the draws.
      log_density: a function of the parameters that returns a number: the logarithm of
        the density that the state approximates, up to a constant and a quadratic, so
        that the log-likelihood will do. The draws are then skew-modal: the way h from
        the mean is kept with probability
        :math:`\Phi(\sqrt{2 \pi} \, \ell'''[h, h, h] / 12)`, and turned round
        otherwise. Moments of even order stay; the mean, and quantiles on the whole, are
        off by less than those of the normal.

    Returns:
      A pytree like the parameters with leaves `(*shape, *leaf.shape)`. Cost: one
      factorisation and a triangular solve a draw; with a log-density its third
      derivative along each draw, some eight evaluations.

    Raises:
      ValueError: for a log-density that returns no number, and with one where the
        dispersion is estimated, so that draws are of Student's t.
      TypeError: with a log-density, for a mixture.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x @ params["w"],
      ...     ff.likelihoods.gaussian(),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ... )
      >>> state = flow.init({"w": jnp.zeros(3)})
      >>> ff.sample(state, key=0, shape=(5,))["w"].shape
      (5, 3)

    References:
      Durante, Pozza, Szabo, "Skewed Bernstein-von Mises theorem and skew-modal
      approximations", 2024.
    """
    weights, members = gaussians(state)
    if not isinstance(shape, tuple | list):
        raise TypeError(
            "ff.sample(state, key, shape): the shape is a tuple, (1000,) for a "
            f"thousand draws; got {checks.described(shape)}."
        )
    if log_density is not None:
        _check_skewed(gaussian(state), log_density)

    def draw(key: jax.Array) -> PyTree:
        if log_density is not None:
            return _skewed(members[0], key, log_density)
        if len(members) == 1:
            return _draw(members[0], key)
        chosen = jax.random.categorical(key, jnp.log(weights))
        draws = [_draw(member, jax.random.fold_in(key, 2)) for member in members]
        return jax.tree.map(lambda *x: jnp.stack(x)[chosen], *draws)

    draws = jax.vmap(draw)(jax.random.split(keys.typed_key(key), math.prod(shape)))
    return jax.tree.map(lambda x: x.reshape((*shape, *x.shape[1:])), draws)


def _draw(belief: Gaussian, key: jax.Array) -> PyTree:
    step = ops.sample(belief.information, key, belief.mean)
    dispersion, spare = belief.dispersion, belief.degrees_of_freedom
    if dispersion is not None and spare is not None:
        chi2 = 2 * jax.random.gamma(
            jax.random.fold_in(key, 1), spare / 2, dtype=spare.dtype
        )
        root = jnp.sqrt(dispersion * spare / chi2)
        step = jax.tree.map(lambda x: x * root, step)
    return jax.tree.map(lambda m, x: m + x, trees.widen(belief.mean), step)


def _check_skewed(belief: Gaussian, log_density: Callable) -> None:
    if belief.dispersion is not None:
        raise ValueError(
            "with an estimated dispersion draws are of Student's t, and log_density "
            "skews those of a normal: give the likelihood its dispersion."
        )
    found = jax.eval_shape(log_density, trees.widen(belief.mean))
    if getattr(found, "shape", None) != ():
        raise ValueError(
            f"log_density is a function of the parameters to a number; got {found}."
        )


def _skewed(belief: Gaussian, key: jax.Array, log_density: Callable) -> PyTree:
    """A draw, turned round now and then to the side where there is more."""
    mean = trees.widen(belief.mean)
    step = ops.sample(belief.information, key, belief.mean)
    third = derivative(log_density, mean, step, step, step)
    share = ndtr(math.sqrt(2 * math.pi) / 12 * third)
    uniform = jax.random.uniform(jax.random.fold_in(key, 1), dtype=share.dtype)
    keep = uniform < share
    return jax.tree.map(lambda m, x: jnp.where(keep, m + x, m - x), mean, step)
