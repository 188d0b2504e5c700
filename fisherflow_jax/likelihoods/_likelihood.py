"""What a likelihood is, and what every likelihood shares.

A likelihood is a NamedTuple of functions of a model's outputs; it knows nothing of
parameters. Each function is elementwise in the examples, costs no pass of the model,
and needs memory of the order of the outputs.

Half-precision outputs are computed with in float32. What is read as a number
(log-probability, mean, variance, line, samples) stays in float32 or wider; what is
pulled back through the model (the cotangents of `root`) has the outputs' own dtype.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax._ground.arrays import like, widen


class Scale(NamedTuple):
    """An unbounded scale of the mean: `mean(outputs) == inverse(line(outputs))`."""

    name: str
    inverse: Callable  # elementwise


def identity(value):
    return value


IDENTITY = Scale("identity", identity)
LOG = Scale("log", jnp.exp)
LOGIT = Scale("logit", jax.nn.sigmoid)
# Of classes on the last axis: the line is each one's log-odds against all others.
SOFTMAX = Scale("softmax", jax.nn.sigmoid)


class Root(NamedTuple):
    """A root of the output Fisher information, or of a bound of it."""

    apply: Callable  # (outputs, probes, key=None) -> L @ probes, shape of the outputs
    probe_shape: Callable  # shape of the outputs -> shape of the probes


class Likelihood(NamedTuple):
    """The distribution of targets given a model's outputs, as functions of the outputs.

    With an unknown dispersion (`with_dispersion` is not None), `log_prob`, `variance`,
    `sample` and `root` are those of unit dispersion.
    """

    name: str
    log_prob: Callable  # (outputs, targets) -> (n, ...); impossible targets give NaN
    mean: Callable  # outputs -> expected target
    variance: Callable  # outputs -> variance of a target, shape of the mean
    sample: Callable  # (key, outputs) -> targets
    root: Callable  # (outputs, probes, key=None) -> L @ probes, shape of the outputs
    probe_shape: Callable  # shape of the outputs -> shape of the probes
    line: Callable  # outputs -> the mean on an unbounded scale, shape of the mean
    scale: Scale  # of the mean: IDENTITY, LOG, LOGIT or SOFTMAX, or one of your own
    support: Callable  # targets -> boolean: is this target possible
    check: Callable  # (outputs, targets) -> None; targets None: the outputs alone
    with_dispersion: Callable | None = None  # dispersion -> Likelihood
    pearson: Callable | None = None  # (outputs, targets) -> (y - mu)^2 / V(mu)
    log_unit_variance: Callable | None = None  # targets -> log V(y)
    random_root: bool = False  # whether `root` needs a key
    diagonal: bool = False  # whether L is diagonal, each output with its own probe
    cholesky: Root | None = None  # with the fewest columns; None: `root` itself
    diagonal_bound: Root | None = None  # of a diagonal upper bound; None: from columns
    low_rank: Callable | None = None  # (k, num_iterations) -> Root of a lower bound
    expected_log_prob: Callable | None = None
    """`(mean, variance, covariance, targets) -> log E p(targets | z)`, `(n, ...)`.

    The outputs z are normal, `mean` and `variance` `(n, ..., k)`; the covariance
    `(n, ..., k, k)` may be None unless `needs_covariance`. None: no closed form.
    """
    normal_errors: bool = False  # whether a target is normal, given the outputs
    with_noise: Callable | None = None
    """Standard deviation of a target -> Likelihood, of normal errors of one size."""

    @property
    def is_classes(self):
        """Whether the expected targets are probabilities."""
        return self.scale in (LOGIT, SOFTMAX)

    @property
    def mixes_outputs(self):
        """Whether `line` is more than the outputs themselves (`line=widen`)."""
        return self.line is not widen

    @property
    def needs_covariance(self):
        """Whether `expected_log_prob` reads the covariance of a target's outputs."""
        return self.mixes_outputs and not self.is_classes


def root_columns(likelihood, outputs, key=None):
    r"""The columns of the root of the output Fisher information, for every example.

    With :math:`L_x` the root at example :math:`x`, column :math:`r` is
    :math:`L_x e_r`, and :math:`\sum_r L_x e_r e_r^\top L_x^\top` is the Fisher
    information of the outputs of that example.

    Args:
      likelihood: a `Likelihood`.
      outputs: the model's outputs, `(n, ...)`.
      key: only for a likelihood whose root is random; shared by all columns.

    Returns:
      An array `(R, n, ...)` of the outputs' dtype, R the number of probes of an example
      (the product of `likelihood.probe_shape(outputs.shape)[1:]`). Memory: R times the
      outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisherflow_jax import likelihoods
      >>> logits = jnp.zeros((5, 3))
      >>> columns = likelihoods.root_columns(likelihoods.categorical(), logits)
      >>> columns.shape
      (3, 5, 3)
      >>> fisher = jnp.einsum("rni,rnj->nij", columns, columns)
      >>> bool(jnp.allclose(fisher[0], jnp.eye(3) / 3 - 1 / 9, atol=1e-6))
      True
    """
    outputs = jnp.asarray(outputs)
    shape = likelihood.probe_shape(outputs.shape)
    num_columns = math.prod(shape[1:])
    dtype = widen(outputs).dtype
    basis = jnp.eye(num_columns, dtype=dtype).reshape(num_columns, 1, *shape[1:])

    def column(direction):
        return likelihood.root(outputs, jnp.broadcast_to(direction, shape), key)

    return jax.vmap(column)(basis)


def nan_outside(possible, values):
    """The values, NaN where the target is impossible."""
    # A product, not a `where`: the gradient must be NaN there too, never a silent zero.
    one = jnp.ones((), values.dtype)
    return values * jnp.where(possible, one, jnp.nan)


def scaled_probes(outputs, factor, probes):
    """Applies a diagonal root: factor (in float32 or wider) times the probes."""
    return (factor * like(probes, factor)).astype(jnp.asarray(outputs).dtype)
