"""Squares of each example's vectors: of the columns of a root, or of scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.checks import whole
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._plan import Rule
from fisherflow_jax.estimators._probes import rademacher
from fisherflow_jax.likelihoods import Likelihood, cholesky_root, root_columns


@choosable
def exact(
    *,
    root: Callable[[Likelihood], Likelihood] = cholesky_root,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""The expected Fisher information, without noise.

    .. math:: F = \sum_i w_i J_i^\top L_i L_i^\top J_i

    with `J_i` the Jacobian of the outputs of example `i` and `L_i L_i^T` the Fisher
    information of its outputs: the generalised Gauss-Newton matrix, and for a canonical
    generalised linear model the Hessian of the loss. Labels are not used.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples, each of which is
        evaluated on its own.
      likelihood: from `ff.likelihoods`; one whose root is sampled makes this estimator
        need a key.
      structure: from `ff.structures`: what is kept.
      root: a function of the likelihood, which returns it with the root whose R columns
        are pulled back; C - 1 columns for C classes by default. With
        `ff.likelihoods.diagonal_root` or `functools.partial(ff.likelihoods.rank_root,
        k=...)` the result is the bound which `hutchinson_dg` or `hutchinson_rankk`
        estimates, without noise.
      chunk_size: examples whose pulled-back vectors are held at once; None: as many as
        fit in about 64 MiB. Memory: chunk_size * R * d numbers. 1: one example and one
        column after the other, without `jax.vmap`, which some operations do not know.
      fast_squares: with the diagonal or scalar structure, square linear layers from
        their inputs and output gradients (`Estimator.paths` tells which); no vector of
        theirs is then held.
      batched: whether the model is run on whole batches, for its examples interact:
        `J_i` is then the Jacobian of row i of the batch's outputs, at the cost of a
        pass of the whole batch for each example (n times that of single ones). None: if
        the program shows that they do (or values, where it does not tell); False: each
        example for itself, whatever it shows.

    Returns:
      An `Estimator`: `estimator(params, batch) -> information`, a sum over the batch.
      Cost: one forward and R backward passes an example, R the outputs of an example
      (one less for each categorical target). Fast squares need only the backward passes
      to the layers' outputs, and one product of squares for all R columns together.

    Raises:
      ValueError: where outputs, targets and likelihood do not fit; for a model of which
        neither its program nor values tell whether examples interact, until `batched`
        does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.full(),
      ... )
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> estimator(jnp.zeros(2), (x, None)).rows  # x^T x
      Array([[2., 2.],
             [2., 4.]], dtype=float32)

    References:
      Amari, "Natural gradient works efficiently in learning", 1998.
      Martens, "New insights and perspectives on the natural gradient method", 2020.
    """

    def columns(own: Likelihood, z: jax.Array, targets: Any, key: Any) -> jax.Array:
        return root_columns(own, z, key)

    return Rule(columns, random=None, by_root=True)


def _score(likelihood: Likelihood, outputs: jax.Array, targets: Any) -> jax.Array:
    """The gradient of the log-probability with respect to the outputs."""
    return jax.grad(lambda z: jnp.sum(likelihood.log_prob(z, targets)))(outputs)


@choosable
def empirical(
    *,
    groups: int | None = None,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""The empirical Fisher: the sum of squared scores of the data's labels.

    .. math:: \sum_i w_i s_i s_i^\top, \quad
       s_i = \nabla_\theta \log p(y_i | f(\theta, x_i))

    Not the Fisher information: it shrinks to nothing where the model fits its labels,
    and equals the Fisher only in expectation at the true parameters. It is the right
    middle of a sandwich variance, which is what `robust=True` keeps.

    With `groups`, one random sign an example stands in for the squares of each:

    .. math:: \Big(\sum_i r_i \sqrt{w_i}\, s_i\Big)
       \Big(\sum_i r_i \sqrt{w_i}\, s_i\Big)^\top, \quad r_i = \pm 1

    has the same mean, from one backward pass of any model, with a relative standard
    deviation of at most :math:`\sqrt 2` on the diagonal, about :math:`\sqrt{2 / G}`
    for G groups.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      groups: None: the squares of every example, without noise; G: random signs, and G
        equal micro-batches that are squared separately. A key is then needed.
      chunk_size: examples whose scores are held at once; None: about 64 MiB.
      fast_squares: with the diagonal or scalar structure, square linear layers from
        their inputs and output gradients (`Estimator.paths` tells which).
      batched: whether the model is run on whole batches, as in `exact`.

    Returns:
      An `Estimator`. Cost: one forward and one backward pass an example; with `groups`,
      or where all layers are squared fast, that of one gradient of the batch.

    Raises:
      ValueError: when called with a batch without targets, or that `groups` does not
        divide.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.empirical(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.diagonal(),
      ... )
      >>> batch = (jnp.array([[1.0, 2.0]]), jnp.array([3.0]))
      >>> estimator(jnp.zeros(2), batch)  # residual 3
      Diagonal(entries=Array([ 9., 36.], dtype=float32))

    References:
      Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for
      natural gradient descent", 2019.
    """

    def cotangents(own: Likelihood, outputs: jax.Array, targets: Any, key: Any):
        scores = _score(own, outputs, targets)[None]
        return scores if groups is None else rademacher(key, (), scores.dtype) * scores

    return Rule(cotangents, random=groups is not None, needs_targets=True)


@choosable
def monte_carlo(
    *,
    num_samples: int = 1,
    groups: int | None = None,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""The Fisher information from labels drawn from the model: unbiased, noisy.

    .. math:: \sum_i w_i \frac{1}{m} \sum_{k=1}^m s_{ik} s_{ik}^\top, \quad
       s_{ik} = \nabla_\theta \log p(y_{ik} | f(\theta, x_i)), \;
       y_{ik} \sim p(\cdot | f(\theta, x_i))

    Its relative variance falls as `1 / m`, but has no bound on a confident model, whose
    rare labels carry the information: an event of probability :math:`\epsilon` gives a
    relative standard deviation of about :math:`\epsilon^{-1/2}`.

    With `groups`, scores are summed over each micro-batch before they are squared. The
    mean stays, since a sampled score has mean zero, and one backward pass serves the
    batch; the variance is about :math:`2 F_{jj}^2 / G` on top of the labels' own.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      num_samples: draws m for each example.
      groups: None: squares of every example; G: the number of equal micro-batches that
        are squared separately, 1 for the whole batch.
      chunk_size: examples whose scores are held at once; None: about 64 MiB. Each
        example draws from its own key, so neither chunks nor groups change a draw.
      fast_squares: with the diagonal or scalar structure, square linear layers from
        their inputs and output gradients (`Estimator.paths` tells which).
      batched: whether the model is run on whole batches, as in `exact`.

    Returns:
      An `Estimator` that needs a key: `estimator(params, batch, key)`. Cost: one
      forward and m backward passes an example; of the batch with `groups`, or where all
      layers are squared fast.

    Raises:
      ValueError: if `num_samples` is not a positive whole number; without a key; when
        called with a batch that `groups` does not divide.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.monte_carlo(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.scalar(),
      ...     num_samples=1000,
      ... )
      >>> information = estimator(jnp.zeros(1), (jnp.ones((1, 1)), None), key=0)
      >>> print(round(float(information.value), 1))  # the exact value is 1
      1.0
    """
    whole(num_samples, "num_samples")

    def cotangents(own: Likelihood, outputs: jax.Array, targets: Any, key: Any):
        def one(key: jax.Array) -> jax.Array:
            return _score(own, outputs, own.sample(key, outputs))

        scores = jax.vmap(one)(jax.random.split(key, num_samples))
        return scores / jnp.sqrt(jnp.asarray(num_samples, outputs.dtype))

    return Rule(cotangents, random=True, num_columns=num_samples)
