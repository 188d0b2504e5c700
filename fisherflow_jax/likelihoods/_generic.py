"""A likelihood from a log-probability and a sampler, with a root of sampled scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fisherflow_jax._ground.arrays import like, widen
from fisherflow_jax._ground.checks import whole
from fisherflow_jax.likelihoods import _likelihood as shared


@shared.family
def from_log_prob(
    log_prob: Callable,
    sample: Callable,
    *,
    num_samples: int = 16,
    mean: Callable | None = None,
    variance: Callable | None = None,
) -> shared.Likelihood:
    r"""Any likelihood that can be evaluated and sampled.

    The root of the output Fisher information is random: with m targets drawn from the
    model,

    .. math::
      L \xi = m^{-1/2} \sum_{k \le m} \xi_k \nabla_z \log p(y_k \mid z), \qquad
      E\, L L^\top = E_y \nabla_z \log p\, (\nabla_z \log p)^\top.

    It is unbiased, with a relative error that falls as :math:`m^{-1/2}` and is large
    for predictions that are almost certain; where a closed form is known, prefer it.
    Each call of the root costs m evaluations of `log_prob` and its gradient, no pass of
    the model, and the memory of m copies of the outputs.

    Args:
      log_prob: `(outputs, targets) -> (n, ...)`, one value a target, which depends only
        on the outputs of its own example. Outputs of half precision arrive in float32.
      sample: `(key, outputs) -> targets`.
      num_samples: m, the number of targets drawn.
      mean: `outputs -> expected target`, needed for `mean` and `line`.
      variance: `outputs -> variance of a target`, of the shape of the mean.

    Returns:
      A `Likelihood`, the same object for the same functions. Its `root` needs a key.
      Probes are `(n, ..., m)`, so that independent targets of one example have columns
      of their own. Every target counts as possible, and `line` is the mean.

    Raises:
      ValueError: for fewer than one sample; by `root` without a key; by `mean`,
        `variance` and `line` where the function was not given; by `check`, for leading
        axes that differ.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> def log_prob(outputs, targets):  # Laplace
      ...     return -jnp.abs(targets - outputs) - jnp.log(2.0)
      >>> def sample(key, outputs):
      ...     return outputs + jax.random.laplace(key, outputs.shape, outputs.dtype)
      >>> likelihood = likelihoods.from_log_prob(log_prob, sample, num_samples=64)
      >>> likelihood.probe_shape((5,))
      (5, 64)
      >>> outputs, key = jnp.zeros(5), jax.random.key(0)
      >>> columns = likelihoods.root_columns(likelihood, outputs, key)
      >>> fisher = jnp.sum(columns**2, axis=0)  # exactly 1: the score is -1 or 1
      >>> bool(jnp.allclose(fisher, 1.0))
      True

    References:
      Kunstner, Balles, Hennig, "Limitations of the empirical Fisher
      approximation for natural gradient descent", 2019.
    """
    name = "from_log_prob"
    whole(num_samples, f"{name}: num_samples", of="targets")

    def check(outputs: Any, targets: Any) -> None:
        shape = shared.check_outputs(name, outputs)
        if targets is None:
            return
        target_shape, _ = shared.shape_and_dtype(targets)
        if not shape or not target_shape or shape[0] != target_shape[0]:
            raise ValueError(
                f"{name}: outputs have shape {shape} and targets have shape "
                f"{target_shape}; their leading axes (the examples) must agree."
            )

    def probe_shape(shape: shared.Shape) -> shared.Shape:
        like = jax.ShapeDtypeStruct(tuple(shape), jnp.result_type(float))
        draws = jax.eval_shape(sample, jax.random.key(0), like)
        return (*jax.eval_shape(log_prob, like, draws).shape, num_samples)

    def root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        if key is None:
            raise ValueError(
                f"{name}: root draws targets, so it needs a key: "
                "root(outputs, probes, key)."
            )
        wide = widen(outputs)
        keys = jax.random.split(key, num_samples)
        targets = jax.vmap(sample, in_axes=(0, None))(keys, wide)
        each = jax.vmap(log_prob, in_axes=(None, 0))
        log_probs, pull_back = jax.vjp(lambda outputs: each(outputs, targets), wide)
        weights = jnp.moveaxis(like(probes, log_probs), -1, 0) * num_samples**-0.5
        (cotangents,) = pull_back(weights)
        return cotangents.astype(jnp.asarray(outputs).dtype)

    def given(function: Callable | None, argument: str) -> Callable:
        def missing(outputs: Any) -> jax.Array:
            raise ValueError(
                f"{name}: no {argument} was given, and none can be found from a "
                f"log-probability: pass from_log_prob(..., {argument}=...)."
            )

        return lambda outputs: (function or missing)(widen(outputs))

    return shared.Likelihood(
        name=name,
        log_prob=lambda outputs, targets: log_prob(widen(outputs), targets),
        mean=given(mean, "mean"),
        variance=given(variance, "variance"),
        sample=lambda key, outputs: sample(key, widen(outputs)),
        root=root,
        probe_shape=probe_shape,
        line=given(mean, "mean"),
        scale=shared.IDENTITY,
        support=lambda targets: jnp.ones(shared.shape_and_dtype(targets)[0], bool),
        check=check,
        random_root=True,
    )
