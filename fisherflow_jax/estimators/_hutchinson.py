"""Random probes at the outputs: the diagonal Fisher from one backward pass.

Every estimator here pulls back `L xi` with random `xi`; they differ in the root `L`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax._ground import checks, trees
from fisherflow_jax.estimators._choice import choosable
from fisherflow_jax.estimators._plan import Rule
from fisherflow_jax.estimators._probes import rademacher
from fisherflow_jax.likelihoods import Likelihood, diagonal_root, rank_root

Probe = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def _random_root(
    probe: Probe, num_probes: int, root: Callable[[Likelihood], Likelihood] | None
) -> Rule:
    """Random vectors through the likelihood's root, or through another one."""
    checks.whole(num_probes, "num_probes")

    def cotangents(own: Likelihood, outputs: jax.Array, targets: Any, key: Any):
        shape, dtype = own.probe_shape(outputs.shape), trees.wide_dtype(outputs.dtype)

        def one(probe_key: jax.Array) -> jax.Array:
            root_key, probe_key = jax.random.split(probe_key)
            probes = probe(probe_key, shape, dtype)
            probes = probes * jnp.asarray(num_probes**-0.5, dtype)
            return own.root(outputs, probes, root_key if own.random_root else None)

        if num_probes == 1:
            return one(key)[None]
        return jax.vmap(one)(jax.random.split(key, num_probes))

    return Rule(
        cotangents, random=True, num_columns=num_probes, root=root, by_root=True
    )


@choosable
def hutchinson(
    *,
    num_probes: int = 1,
    groups: int | None = 1,
    probe: Probe = rademacher,
    root: Callable[[Likelihood], Likelihood] | None = None,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""The Fisher information from one random backward pass: unbiased, no labels.

    .. math:: \hat F = g g^\top, \quad g = \sum_i \sqrt{w_i} J_i^\top L_i \xi_i, \quad
       E\, \xi_i \xi_j^\top = \delta_{ij} 1
       \;\Rightarrow\; E \hat F = \sum_i w_i J_i^\top L_i L_i^\top J_i

    For a categorical likelihood `g` is the gradient of
    :math:`\sum_{x,y} \sqrt{\tilde p(y|x)} \log p(y|x) \xi_{xy}` with :math:`\tilde p`
    held constant, and equally of :math:`2 \sum_{x,y} \sqrt{p(y|x)}\, \xi_{xy}`: the
    same number for the same probes, which is why `hutchinson_sqrt` is this function
    under another name.

    A diagonal entry of one square has, with signs for probes, the variance
    :math:`2 F_{jj}^2 - 2 \sum a^4 \le 2 F_{jj}^2`, where the `a` are the entries
    :math:`(L_i^\top J_i)_{cj}`; with Gaussian probes it is :math:`2 F_{jj}^2`. The
    relative standard deviation therefore never exceeds :math:`\sqrt{2 / m}` with m
    probes, on however confident a model, and does not fall with the size of the batch.
    `groups` is what lowers it at no extra cost: G micro-batches have about
    :math:`2 F_{jj}^2 / G`.

    Use it in place of `monte_carlo` on trained models, whose rare labels carry the
    information; use `exact` where there are few classes.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      num_probes: m; their squares are averaged, never their vectors.
      groups: G, the number of equal micro-batches that are squared separately; 1: the
        whole batch; None: every example for itself.
      probe: `ff.estimators.rademacher`, `ff.estimators.gaussian`, or a function of
        `(key, shape, dtype)`.
      root: a function of the likelihood, such as `ff.likelihoods.cholesky_root`, which
        returns it with another root of the output Fisher; None: its own. With two
        classes, `groups=None` and the Cholesky root the result is exact.
      chunk_size: examples in one pass; None: a group, and about 64 MiB of vectors. No
        draw and no value depends on it.
      fast_squares: with `groups=None` and the diagonal or scalar structure, square
        linear layers from their inputs and output gradients (`Estimator.paths` tells
        which).
      batched: whether the model is run on whole batches, as in `exact`; `groups=1` is
        one pass of the batch for every model.

    Returns:
      An `Estimator` that needs a key. Cost: one forward and m backward passes of the
      batch, the same with `groups=None` for linear layers used once an example.
      Memory: m G vectors, or what a gradient takes where they are squared fast.

    Raises:
      ValueError: for options that are not positive whole numbers; when called, without
        a key, or with a batch that `groups` does not divide.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def diagonal(estimator, **options):
      ...     return estimator(
      ...         lambda params, x: x @ params,
      ...         ff.likelihoods.bernoulli(),
      ...         ff.structures.diagonal(),
      ...         **options,
      ...     )
      >>> params, batch = jnp.zeros(2), (jnp.eye(4, 2), None)
      >>> diagonal(ff.estimators.exact)(params, batch).entries
      Array([0.25, 0.25], dtype=float32)
      >>> estimator = diagonal(ff.estimators.hutchinson)
      >>> information = jax.vmap(lambda key: estimator(params, batch, key))
      >>> draws = information(jax.random.split(jax.random.key(0), 100)).entries
      >>> print(draws.mean(0).round(2))  # one output each: no cross terms
      [0.25 0.25]

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
      Hutchinson, "A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines", 1990.
    """
    return _random_root(probe, num_probes, root)


hutchinson_sqrt = hutchinson


@choosable
def hutchinson_dg(
    *,
    num_probes: int = 1,
    groups: int | None = 1,
    probe: Probe = rademacher,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""An upper bound of the Fisher information, from one random backward pass.

    .. math:: E \hat F = \sum_i w_i J_i^\top \operatorname{diag}(p_i) J_i
       = F + \sum_i w_i (J_i^\top p_i) (J_i^\top p_i)^\top \succeq F

    for a categorical likelihood: the second moment of the raw logits' gradients. A
    bound, not an estimate: it counts what adding one constant to all logits changes,
    which the model does not see, and on confident models it may exceed the information
    a hundred times. Where outputs are independent (all likelihoods with one output a
    target) it is the information itself. It costs what `hutchinson` costs.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      num_probes, groups, probe, chunk_size, fast_squares, batched: as in
        `hutchinson`.

    Returns:
      An `Estimator` that needs a key. Cost and variance as for `hutchinson`, with the
      bound in place of F.

    Raises:
      ValueError: as `hutchinson`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.hutchinson_dg(
      ...     lambda bias, x: jnp.broadcast_to(bias, (x.shape[0], 2)),
      ...     ff.likelihoods.categorical(),
      ...     ff.structures.diagonal(),
      ... )
      >>> batch = jnp.ones((1, 1)), None
      >>> estimator(jnp.zeros(2), batch, key=0).entries.round(3)  # p; F is p (1 - p)
      Array([0.5, 0.5], dtype=float32)

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    return _random_root(probe, num_probes, diagonal_root)


@choosable
def hutchinson_rankk(
    *,
    k: int = 2,
    num_iterations: int | None = None,
    num_probes: int = 1,
    groups: int | None = 1,
    probe: Probe = rademacher,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Rule:
    r"""A lower bound of the Fisher information, from one random backward pass.

    .. math:: E \hat F = \sum_i w_i J_i^\top L_i^{(k)} L_i^{(k)\top} J_i \preceq F

    with :math:`L^{(k)}` of k columns for each target. The bound is certified at any
    number of iterations: by default the first k columns of the pivoted Cholesky factor
    of the output Fisher, in closed form; with `num_iterations`, that many steps of
    subspace iteration and a Nystrom correction, which reaches the k largest
    eigenvalues. It is tight on confident models, whose output Fisher has few large
    eigenvalues, and exact for C - 1 columns.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      k: the rank kept for each target, below the number of classes.
      num_iterations: None: the closed form; a whole number: subspace iteration.
      num_probes, groups, probe, chunk_size, fast_squares, batched: as in
        `hutchinson`.

    Returns:
      An `Estimator` that needs a key. Cost: that of `hutchinson`, and O(C k) a target
      for the root (times the iterations).

    Raises:
      ValueError: for k that is no positive whole number or exceeds the rank C - 1; and
        as `hutchinson`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.hutchinson_rankk(
      ...     lambda logits, x: jnp.broadcast_to(logits, (x.shape[0], 3)),
      ...     ff.likelihoods.categorical(),
      ...     ff.structures.diagonal(),
      ...     k=1,
      ... )
      >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
      >>> estimator(logits, (jnp.ones((1, 1)), None), key=0).entries.round(4)
      Array([0.25  , 0.0625, 0.0625], dtype=float32)

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
      Tanabe, Sagae, "An exact Cholesky decomposition and the generalized inverse of the
      variance-covariance matrix of the multinomial distribution", 1992.
    """
    root = functools.partial(rank_root, k=k, num_iterations=num_iterations)
    return _random_root(probe, num_probes, root)


hutchinson_rank1 = functools.partial(hutchinson_rankk, k=1)
