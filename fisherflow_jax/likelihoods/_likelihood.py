"""What a likelihood is, and what every likelihood shares.

A likelihood is a NamedTuple of functions of a model's outputs; it knows nothing of
parameters. Each function is elementwise in the examples, costs no pass of the model,
and needs memory of the order of the outputs.

Half-precision outputs are computed with in float32. What is read as a number
(log-probability, mean, variance, line, samples) stays in float32 or wider; what is
pulled back through the model (the cotangents of `root`) has the outputs' own dtype.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fisherflow_jax._ground import arrays, checks, choices
from fisherflow_jax._ground.telling import told

Parameters = ParamSpec("Parameters")
Shape = tuple[int, ...]


class Scale(NamedTuple):
    """An unbounded scale of the mean: `mean(outputs) == inverse(line(outputs))`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> scale = ff.likelihoods.poisson().scale
      >>> print(scale.name, scale.inverse(jnp.array(0.0)))
      log 1.0
    """

    name: str
    inverse: Callable  # elementwise


def _identity(value: jax.Array) -> jax.Array:
    return value


IDENTITY = Scale("identity", _identity)
LOG = Scale("log", jnp.exp)
LOGIT = Scale("logit", jax.nn.sigmoid)
# Of classes on the last axis: the line is each one's log-odds against all others.
SOFTMAX = Scale("softmax", jax.nn.sigmoid)


class Root(NamedTuple):
    """A root of the output Fisher information, or of a bound of it.

    One is made by `ff.likelihoods.cholesky_root`.
    """

    apply: Callable  # (outputs, probes, key=None) -> L @ probes, shape of the outputs
    probe_shape: Callable  # shape of the outputs -> shape of the probes


class Likelihood(NamedTuple):
    r"""The distribution of targets given a model's outputs, as functions of these.

    One is made by `ff.likelihoods.categorical`.

    With an unknown dispersion (`with_dispersion` is not None), `log_prob`, `variance`,
    `sample` and `root` are those of unit dispersion. With another root
    (`_replace(root=...)`) it is still the same likelihood.

    Attributes:
      name: what errors call it.
      log_prob: `(outputs, targets) -> (n, ...)`; impossible targets give NaN.
      mean: `outputs -> expected target`.
      variance: `outputs -> variance of a target`, of the shape of the mean.
      sample: `(key, outputs) -> targets`.
      root: `(outputs, probes, key=None) -> L @ probes`, of the shape of the outputs,
        with :math:`L L^\top` their Fisher information.
      probe_shape: shape of the outputs -> shape of the probes.
      line: `outputs -> the mean on an unbounded scale`, of the shape of the mean;
        `ff.likelihoods.widen` where that is the outputs themselves.
      scale: that scale: `IDENTITY`, `LOG`, `LOGIT`, `SOFTMAX`, or one of your own.
      support: `targets -> bool`: is this target possible.
      check: `(outputs, targets)`, or `(outputs, None)`: raises for wrong shapes.
      with_dispersion: `dispersion -> Likelihood`; None: the dispersion is known.
      pearson: `(outputs, targets) ->` :math:`(y - \mu)^2 / V(\mu)`.
      log_unit_variance: `targets ->` :math:`\log V(y)`.
      random_root: whether `root` needs a key.
      diagonal: whether L is diagonal, each output with its own probe.
      cholesky: the `Root` with the fewest columns; None: `root` itself.
      diagonal_bound: the `Root` of a diagonal upper bound; None: from the columns.
      low_rank: `(k, num_iterations) ->` the `Root` of a lower bound.
      expected_log_prob: `(mean, variance, covariance, targets) ->`
        :math:`\log \mathrm{E}\, p(y \mid z)`, `(n, ...)`, for normal outputs z. Mean
        and variance are `(n, ..., k)`; the covariance `(n, ..., k, k)` may be None
        unless `needs_covariance`. None: no closed form.
      normal_errors: whether a target is normal, given the outputs.
      with_noise: `standard deviation of a target -> Likelihood`, where errors are
        normal and of one size.
      observing: `which targets there are (n, ..., k), 1 or 0 -> Likelihood` of these
        alone, where those on the last axis have one log-probability together; None:
        each has its own.
      known: `outputs ->` those of them that say what is known, such as the noise of
        each row, and that no parameter may move; None: there are none.
      nuisance: the `Nuisance` parameters that are unknown; None: none are.
      kl: `(outputs, other) ->` the Kullback-Leibler divergence from the first, one a
        target, `(n, ...)`. None: no closed form.
      distance: `(outputs, other) ->` the Fisher-Rao distance of one observation, one a
        target, `(n, ...)`. None: no closed form.
      call: how it was made, for printing.
    """

    name: str
    log_prob: Callable
    mean: Callable
    variance: Callable
    sample: Callable
    root: Callable
    probe_shape: Callable
    line: Callable
    scale: Scale
    support: Callable
    check: Callable
    with_dispersion: Callable | None = None
    pearson: Callable | None = None
    log_unit_variance: Callable | None = None
    random_root: bool = False
    diagonal: bool = False
    cholesky: Root | None = None
    diagonal_bound: Root | None = None
    low_rank: Callable | None = None
    expected_log_prob: Callable | None = None
    normal_errors: bool = False
    with_noise: Callable | None = None
    observing: Callable | None = None
    known: Callable | None = None
    nuisance: Any = None
    kl: Callable | None = None
    distance: Callable | None = None
    call: str = ""

    @property
    def is_classes(self) -> bool:
        """Whether the expected targets are probabilities."""
        return self.scale in (LOGIT, SOFTMAX)

    @property
    def mixes_outputs(self) -> bool:
        """Whether `line` is more than the outputs themselves (`line=widen`)."""
        return self.line is not arrays.widen

    @property
    def at_start(self) -> "Likelihood":
        """Itself, what is unknown of it where a search begins: of the same shapes."""
        unknown = self.nuisance
        if unknown is None:
            return self
        start = map(np.asarray, unknown.start)
        return unknown.known(dict(zip(unknown.names, start, strict=True)))

    def num_classes(self, outputs: Any) -> int | None:
        """The classes that targets may be, given the shape of the outputs, if any."""
        return outputs.shape[-1] if self.scale is SOFTMAX else None

    def shape_of_targets(self, outputs: Any) -> Shape:
        """Of the log-probabilities, one a target, given the shape of the outputs.

        Of the targets themselves, where those of an example have one together.
        """

        if self.nuisance is not None:  # which changes no shape
            return self.at_start.shape_of_targets(outputs)

        def drawn(key: jax.Array, outputs: jax.Array) -> jax.Array:
            targets = self.sample(key, outputs)
            together = self.observing is not None
            return targets if together else self.log_prob(outputs, targets)

        return jax.eval_shape(drawn, jax.random.key(0), outputs).shape

    @property
    def needs_covariance(self) -> bool:
        """Whether `expected_log_prob` reads the covariance of a target's outputs."""
        return self.mixes_outputs and not self.is_classes

    def __repr__(self) -> str:
        return self.call or self.name


class Call(str):
    """A call in words, that its arguments can be read of."""

    factory: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, factory: str, arguments: dict[str, Any], kept: set[str]) -> "Call":
        """`kept` are arguments that are shown also where they are None."""
        shown = [
            f"{key}={told(x)}"
            for key, x in arguments.items()
            if x is not None or key in kept
        ]
        call = cls(f"{factory}({', '.join(shown)})")
        call.factory, call.arguments = factory, arguments
        return call


def family(
    factory: Callable[Parameters, Likelihood],
) -> Callable[Parameters, Likelihood]:
    """Makes equal calls of a factory the same object, which prints as its call."""
    signature = inspect.signature(factory)
    named = inspect.Parameter.KEYWORD_ONLY
    kept = {k for k, x in signature.parameters.items() if x.kind != named}

    @choices.choice
    @functools.wraps(factory)
    def made(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Likelihood:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = Call.of(factory.__name__, dict(bound.arguments), kept)
        return factory(*args, **kwargs)._replace(call=call)

    return made


def root_columns(
    likelihood: Likelihood, outputs: ArrayLike, key: jax.Array | None = None
) -> jax.Array:
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
    dtype = arrays.widen(outputs).dtype
    basis = jnp.eye(num_columns, dtype=dtype).reshape(num_columns, 1, *shape[1:])

    def column(direction: jax.Array) -> jax.Array:
        return likelihood.root(outputs, jnp.broadcast_to(direction, shape), key)

    return jax.vmap(column)(basis)


def nan_outside(possible: jax.Array, values: jax.Array) -> jax.Array:
    """The values, NaN where the target is impossible."""
    # A product, not a `where`: the gradient must be NaN there too, never a silent zero.
    one, no = jnp.ones_like(values), jnp.full_like(values, jnp.nan)
    return values * jax.lax.select(jnp.broadcast_to(possible, values.shape), one, no)


def scaled_probes(outputs: ArrayLike, factor: jax.Array, probes: Any) -> jax.Array:
    """Applies a diagonal root: factor (in float32 or wider) times the probes."""
    return (factor * arrays.like(probes, factor)).astype(jnp.asarray(outputs).dtype)


def shape_and_dtype(value: Any) -> tuple[Shape, Any]:
    """Of an array, a tracer, a ShapeDtypeStruct or a Python number."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        value = np.asarray(value)
    return tuple(value.shape), value.dtype


def check_outputs(name: str, outputs: Any) -> Shape:
    """Raises unless the outputs are floating point; returns their shape."""
    shape, dtype = shape_and_dtype(outputs)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: outputs must be floating point, got dtype {dtype} "
            f"(shape {shape})."
        )
    return shape


def check_targets(
    name: str, shape: Shape, expected: Shape, targets: Any, rule: str
) -> None:
    """Raises unless the targets, if any, are real and have the expected shape."""
    if targets is None:
        return
    target_shape, dtype = shape_and_dtype(targets)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name}: targets must be real, got dtype {dtype}.")
    if target_shape == expected:
        return
    hint = ""
    if expected == (*target_shape, 1):
        hint = (
            " The outputs have a trailing axis of 1: drop it (outputs[..., 0]), or give"
            " the targets one (targets[..., None])."
        )
    elif target_shape == (*expected, 1):
        hint = " The targets have a trailing axis of 1: drop it (targets[..., 0])."
    raise ValueError(
        f"{name}: outputs have shape {shape} and targets have shape {target_shape}; "
        f"{rule}, here {expected}.{hint}"
    )


def require_positive(name: str, parameter: str, value: Any, else_: str = "") -> None:
    """Raises unless the parameter is one number, positive when its value is known."""
    shape, _ = shape_and_dtype(value)
    if shape != ():
        raise ValueError(
            f"{name}: {parameter} must be one number, got an array of shape {shape}"
            f"{else_}."
        )
    checks.positive(value, f"{name}: {parameter}")


def on_both(
    name: str, function: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """A function of both, of one shape and wide, for those that pass the check."""

    def checked(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        _check(name, outputs, targets)
        wide = arrays.widen(outputs)
        return function(wide, arrays.like(targets, wide))

    return checked


def on_wide(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """A function of two outputs, both wide."""

    def widened(outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        wide = arrays.widen(outputs)
        return function(wide, arrays.like(other, wide))

    return widened


def _check(name: str, outputs: Any, targets: Any) -> None:
    shape = check_outputs(name, outputs)
    rule = "targets must have the shape of the outputs"
    check_targets(name, shape, shape, targets, rule)


def one_output(
    name: str,
    scale: Scale,
    support: Callable[[ArrayLike], jax.Array],
    log_prob: Callable[[jax.Array, jax.Array], jax.Array],
    variance: Callable[[jax.Array], jax.Array],
    sample: Callable[[jax.Array, jax.Array], jax.Array],
    root: Callable[[jax.Array], jax.Array],
    distance: Callable[[jax.Array, jax.Array], jax.Array],
) -> Likelihood:
    """A `Likelihood` of functions of wide outputs (and wide targets, in the support).

    `root` is the square root of the Fisher information of one output, `distance` that
    of two. The Kullback-Leibler divergence is that of log-probabilities whose
    difference is affine in the target, as in any exponential family of one mean.
    """
    value = on_both(name, log_prob)

    def log_prob_or_nan(outputs: ArrayLike, targets: ArrayLike) -> jax.Array:
        values = value(outputs, targets)
        return nan_outside(support(targets), values)

    def apply_root(outputs: ArrayLike, probes: Any, key: Any = None) -> jax.Array:
        return scaled_probes(outputs, root(arrays.widen(outputs)), probes)

    def mean(outputs: ArrayLike) -> jax.Array:
        return scale.inverse(arrays.widen(outputs))

    def kl(outputs: ArrayLike, other: ArrayLike) -> jax.Array:
        expected = mean(outputs)
        return value(outputs, expected) - value(other, expected)

    return Likelihood(
        name=name,
        log_prob=log_prob_or_nan,
        mean=mean,
        variance=lambda outputs: variance(arrays.widen(outputs)),
        sample=lambda key, outputs: sample(key, arrays.widen(outputs)),
        root=apply_root,
        probe_shape=tuple,
        line=arrays.widen,
        scale=scale,
        support=support,
        check=lambda outputs, targets: _check(name, outputs, targets),
        diagonal=True,
        kl=kl,
        distance=on_wide(distance),
    )
