"""The same likelihood with another root: of fewer columns, or of a bound.

A bound of any likelihood is found from its root alone.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground import checks, choices
from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax.likelihoods._likelihood import (
    Likelihood,
    Root,
    Shape,
    scaled_probes,
)

# Of the likelihood's own root: a bound has none of these.
_OTHERS: dict[str, Any] = dict.fromkeys(("cholesky", "diagonal_bound", "low_rank"))


def _with_root(
    transform: Callable[[Likelihood], Likelihood],
    likelihood: Likelihood,
    root: Root,
    call: str,
    **changes: Any,
) -> Likelihood:
    for name in ("with_dispersion", "with_noise", "observing"):
        made = getattr(likelihood, name)
        if made is not None:
            changes[name] = lambda value, made=made: transform(made(value))
    changes |= {"root": root.apply, "probe_shape": root.probe_shape, "call": call}
    return likelihood._replace(**changes)


@choices.choice
def cholesky_root(likelihood: Likelihood) -> Likelihood:
    r"""The likelihood with the root of its output Fisher that has the fewest columns.

    Of C classes sorted by decreasing probability, with tails
    :math:`t_j = \sum_{i \ge j} p_i`, the Cholesky factor is known in closed form:

    .. math::
      L_{jj} = \sqrt{p_j t_{j+1} / t_j}, \qquad
      L_{ij} = -p_i \sqrt{p_j / (t_j t_{j+1})} \quad (i > j), \qquad
      L L^\top = \operatorname{diag}(p) - p p^\top,

    with C - 1 columns, one less than the symmetric root. Its first columns are the
    likeliest classes', so that the first k are a lower bound (`rank_root`). With two
    classes and one column, a random sign gives the exact information of an example.

    Args:
      likelihood: a `Likelihood`.

    Returns:
      A `Likelihood`, the same object for the same likelihood. For `categorical` the
      probes are `(n, ..., C - 1)` (one column, of zeros, for one class), applied in
      O(C log C) time and O(C) memory a target. A column without probability left after
      its class is zero. Likelihoods with one output a target, `gaussian_location_scale`
      and `from_log_prob` are returned unchanged, and so is one of your own without the
      field `cholesky`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.cholesky_root(likelihoods.categorical())
      >>> logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
      >>> columns = likelihoods.root_columns(likelihood, logits)[:, 0]
      >>> columns.round(3) + 0.0
      Array([[-0.25 ,  0.5  , -0.25 ],
             [ 0.354,  0.   , -0.354]], dtype=float32)
      >>> print((16 * columns.T @ columns).round())  # 16 (diag(p) - p p^T)
      [[ 3. -2. -1.]
       [-2.  4. -2.]
       [-1. -2.  3.]]

    References:
      Tanabe, Sagae, "An exact Cholesky decomposition and the generalized
      inverse of the variance-covariance matrix of the multinomial distribution", 1992.
    """
    if likelihood.cholesky is None:
        return likelihood
    call, root = f"cholesky_root({likelihood})", likelihood.cholesky
    return _with_root(cholesky_root, likelihood, root, call, cholesky=None)


@choices.choice
def diagonal_root(likelihood: Likelihood) -> Likelihood:
    r"""The likelihood with the root of a diagonal upper bound of its output Fisher.

    Of classes,

    .. math::
      \operatorname{diag}(p) - (\operatorname{diag}(p) - p p^\top) = p p^\top \succeq 0,

    the root of the bound being :math:`\operatorname{diag}(\sqrt p)`. Of any root with
    columns s, also of one of sampled scores and then for every draw,

    .. math::
      \sum_s s s^\top \preceq \operatorname{diag}(d), \qquad
      d_i = \sum_s |s_i| \sum_j |s_j|.

    Args:
      likelihood: a `Likelihood`.

    Returns:
      A `Likelihood`, the same object for the same likelihood, whose probes have the
      shape of the outputs. Where the root is diagonal already, the likelihood itself.
      For `categorical`, O(C) time and memory a target. For `from_log_prob`, and for one
      of your own without the fields `diagonal` and `diagonal_bound`, its root is
      applied once for each probe of an example, one after another.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.diagonal_root(likelihoods.categorical())
      >>> logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
      >>> (likelihood.root(logits, jnp.ones((1, 3))) ** 2).round(3)
      Array([[0.25, 0.5 , 0.25]], dtype=float32)

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    if likelihood.diagonal:
        return likelihood
    bound = likelihood.diagonal_bound or diagonal_of_columns(likelihood)
    call = f"diagonal_root({likelihood})"
    return _with_root(diagonal_root, likelihood, bound, call, diagonal=True, **_OTHERS)


@choices.choice
def rank_root(
    likelihood: Likelihood, k: int, num_iterations: int | None = None
) -> Likelihood:
    r"""The likelihood with the root of a lower bound of rank k of its output Fisher.

    Of C classes, the first k columns of the pivoted Cholesky factor (`cholesky_root`),
    those of the k likeliest. With `num_iterations` these are improved by subspace
    iteration towards the k largest eigenvalues. With q the square roots of the
    probabilities and Y orthonormal and orthogonal to q, the root is

    .. math::
      L = \operatorname{diag}(q)\, Y = A V (V^\top A V)^{-1/2}, \qquad
      L L^\top \preceq A = \operatorname{diag}(p) - p p^\top,

    a Nystrom factor: a lower bound after any number of iterations, where Ritz vectors
    with Ritz values are one only in the limit. It is exact for k = C - 1.

    Of `gaussian_location_scale`, the k larger of the two entries of each target. Of
    `from_log_prob`, k pivoted Cholesky columns of each target's sampled scores, a lower
    bound for every draw. One output a target has rank 1, and nothing to leave out.

    Args:
      likelihood: a `Likelihood`.
      k: the number of columns kept for each target.
      num_iterations: None: the closed form; a whole number: that many iterations, 0
        being the closed form again. Only `categorical` has any use for them: the other
        bounds have no iteration.

    Returns:
      A `Likelihood`, the same object for equal arguments, whose probes are
      `(n, ..., k)`, k for each target. For `categorical`, O(C k) memory a target; time
      O(C log k), and O(C k^2) for each iteration. For `from_log_prob`, and for one of
      your own without the field `low_rank`, the last axis of its probes is taken for
      the columns of one target, and all columns are held.

    Raises:
      ValueError: for a k that is no positive whole number or beyond the rank of a
        target, as soon as that is known (from the shape of the outputs); for a
        `num_iterations` that is no whole number from 0 on.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> likelihood = likelihoods.rank_root(likelihoods.categorical(), k=1)
      >>> logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
      >>> likelihood.probe_shape(logits.shape)
      (1, 1)
      >>> likelihoods.root_columns(likelihood, logits)[0, 0].round(3)
      Array([-0.25,  0.5 , -0.25], dtype=float32)

    References:
      Tanabe, Sagae, "An exact Cholesky decomposition and the generalized
      inverse of the variance-covariance matrix of the multinomial distribution", 1992.
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    checks.whole(k, "rank_root: k")
    if num_iterations is not None:
        checks.whole(num_iterations, "rank_root: num_iterations", least=0)
    if likelihood.low_rank is not None:
        bound = likelihood.low_rank(k, num_iterations)
    elif not likelihood.diagonal:
        bound = rank_of_columns(likelihood, k)
    elif k == 1:
        return likelihood
    else:
        raise ValueError(
            f"rank_root: k = {k}, but {likelihood.name} has one output a target (its "
            "root is diagonal), of rank 1; k is at most 1, where the bound is exact."
        )
    again = functools.partial(rank_root, k=k, num_iterations=num_iterations)
    call = f"rank_root({likelihood}, k={k}, num_iterations={num_iterations})"
    return _with_root(again, likelihood, bound, call, diagonal=False, **_OTHERS)


def _require_rank(k: int, rank: int, shape: Shape) -> None:
    if k > rank:
        raise ValueError(
            f"rank_root: k = {k}, but the information of one target has at most rank "
            f"{rank} here (outputs of shape {tuple(shape)}); k is at most {rank}, where"
            " the bound is exact."
        )


def largest_entries(root: Callable) -> Callable:
    """Of a diagonal root with one target on the last axis: its k largest entries."""

    def low_rank(k: int, num_iterations: int | None) -> Root:
        del num_iterations  # no k columns capture more than these

        def probe_shape(shape: Shape) -> Shape:
            _require_rank(k, shape[-1], shape)
            return (*shape[:-1], k)

        def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
            probe_shape(jnp.shape(outputs))
            wide = widen(outputs)
            factor = root(wide, jnp.ones_like(wide), key)
            kept = jax.lax.top_k(jnp.abs(factor), k)[1]
            entries = jnp.take_along_axis(factor, kept, -1) * like(probes, factor)
            none = jnp.zeros_like(factor)
            cotangents = jnp.put_along_axis(none, kept, entries, -1, inplace=False)
            return cotangents.astype(jnp.asarray(outputs).dtype)

        return Root(apply, probe_shape)

    return low_rank


def _column_of(
    likelihood: Likelihood, outputs: jax.Array, key: Any
) -> tuple[int, Callable]:
    """The number of columns of the root, and the function of their index."""
    shape = likelihood.probe_shape(outputs.shape)
    count = math.prod(shape[1:])
    # Linearised, so that a random root draws its targets once and not for each column.
    _, linear = jax.linearize(
        lambda probes: likelihood.root(outputs, probes, key),
        jnp.zeros(shape, outputs.dtype),
    )

    def column(index: jax.Array) -> jax.Array:
        direction = jax.nn.one_hot(index, count, dtype=outputs.dtype)
        return linear(jnp.broadcast_to(direction.reshape(1, *shape[1:]), shape))

    return count, column


def diagonal_of_columns(likelihood: Likelihood) -> Root:
    r"""The root of a diagonal upper bound of the sum of a root's squared columns.

    For every column s, :math:`s s^\top \preceq \operatorname{diag}(|s_i| \sum_j
    |s_j|)`, because the difference is diagonally dominant; the sum over j is over the
    outputs of the example that the column touches. One column is held at a time.
    """

    def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        wide = widen(outputs)
        count, column = _column_of(likelihood, wide, key)
        axes = tuple(range(1, wide.ndim))

        def add(index: Any, total: jax.Array) -> jax.Array:
            sizes = jnp.abs(column(index))
            return total + sizes * jnp.sum(sizes, axes, keepdims=True)

        bound = jax.lax.fori_loop(0, count, add, jnp.zeros_like(wide))
        return scaled_probes(outputs, jnp.sqrt(bound), probes)

    return Root(apply, tuple)


def rank_of_columns(likelihood: Likelihood, k: int) -> Root:
    """The root of a lower bound: k pivoted Cholesky columns of a root's squares.

    The last axis of the probes holds the columns of one target; the axes between it and
    the examples are targets, whose informations add, each with k columns of its own.
    All columns are held: as many copies of the outputs as an example has probes.
    """

    def probe_shape(shape: Shape) -> Shape:
        own = likelihood.probe_shape(shape)
        columns = own[-1] if len(own) > 1 else 1
        _require_rank(k, min(columns, math.prod(shape[1:])), shape)
        return (own[0], *own[1:-1], k)

    def apply(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        examples, *targets, _ = probe_shape(jnp.shape(outputs))
        num_targets = math.prod(targets)
        wide = widen(outputs)
        count, column = _column_of(likelihood, wide, key)
        columns = jax.lax.map(column, jnp.arange(count))
        # (targets, columns of one, examples, outputs of one)
        columns = columns.reshape(num_targets, count // num_targets, examples, -1)
        probes = like(probes, wide).reshape(examples, num_targets, k)

        def add(j: Any, carry: tuple) -> tuple:
            columns, total = carry
            sizes = jnp.sum(columns**2, 1)
            pivot = jnp.argmax(sizes, -1)[:, None, :, None]
            direction = jnp.take_along_axis(columns, pivot, -1)
            square = jnp.sum(direction**2, 1, keepdims=True)
            vanishes = square <= jnp.finfo(wide.dtype).tiny
            direction = direction / jnp.sqrt(jnp.where(vanishes, 1, square))
            direction = jnp.where(vanishes, 0, direction)
            chosen = jnp.sum(direction * columns, 1)
            columns = columns - direction * chosen[:, None]
            probe = jax.lax.dynamic_index_in_dim(probes, j, 2, keepdims=False)
            return columns, total + jnp.sum(chosen * probe.T[..., None], 0)

        total = jnp.zeros((examples, columns.shape[-1]), wide.dtype)
        _, total = jax.lax.fori_loop(0, k, add, (columns, total))
        return total.reshape(wide.shape).astype(jnp.asarray(outputs).dtype)

    return Root(apply, probe_shape)
