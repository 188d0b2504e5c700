"""What a row of a pool is worth: the gain of an information, or a value of draws."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, keys, linalg, trees
from fisherflow_jax.posteriors import check_like

PyTree = Any


class Gain:
    r"""A gain in closed form, from which a batch can be chosen.

    With the kernels :math:`K = V I^{-1} V^\top` and, where there is a target M,
    :math:`Q = V I^{-1} M I^{-1} V^\top` of a row, given all that was chosen before it.
    """

    def gain(self, kernel: jax.Array, spread: Any = None) -> jax.Array:
        """Of kernels `(..., r, r)`."""
        raise NotImplementedError

    def middle(self, mean: PyTree) -> Callable[[PyTree], PyTree] | None:
        """`v -> M v` of vectors like the mean; None: there is no target."""
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InformationGain(Gain):
    """Half the log-determinant that a row adds."""

    def gain(self, kernel: jax.Array, spread: Any = None) -> jax.Array:
        identity = jnp.eye(kernel.shape[-1], dtype=kernel.dtype)
        whole = kernel + jnp.broadcast_to(identity, kernel.shape)
        return -jnp.sum(jnp.log(linalg.diagonal(linalg.inverse_factor(whole))), -1)

    def __repr__(self) -> str:
        return "information_gain()"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VarianceReduction(Gain):
    """What a row takes off the trace of target times covariance."""

    target: PyTree = None

    def gain(self, kernel: jax.Array, spread: Any = None) -> jax.Array:
        # tr[(1 + K)^-1 Q], the derivative of log det(1 + K) along Q
        return 2 * jax.jvp(InformationGain().gain, (kernel,), (spread,))[1]

    def middle(self, mean: PyTree) -> Callable[[PyTree], PyTree]:
        target = self.target
        if target is None:
            return lambda vector: vector
        if ops.is_information(target):
            check_like(jax.eval_shape(ops.diagonal, target, mean), mean)
            return functools.partial(ops.matvec, target)
        trees.check_shapes(target, mean, "a target is an information, or like the mean")
        contrast = jax.tree.map(jnp.asarray, target)

        def along(vector: PyTree) -> PyTree:
            share = trees.dot(vector, contrast)
            return jax.tree.map(lambda c: c.astype(share.dtype) * share, contrast)

        return along


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Value:
    """A value of class probabilities, at the mean or of draws of the parameters.

    Attributes:
      of: `(p (S, c, T, C), p at inputs (S, m, T', C) or None) -> (c,)`, S draws of c
        rows' probabilities; S = 1, at the mean, without draws. Named as its factory.
      num_samples: S; None: at the mean.
      key: what draws them.
      inputs: of the target distribution, leading axis m, or None.
    """

    of: Callable = dataclasses.field(metadata={"static": True})
    num_samples: int | None = dataclasses.field(default=None, metadata={"static": True})
    key: Any = None
    inputs: PyTree = None


def information_gain() -> Gain:
    r"""What the labels of rows tell of the parameters, in nats: D-optimality.

    .. math:: \tfrac12 \log\det(1 + V I^{-1} V^\top)
       = \tfrac12 \log\det(I + F) - \tfrac12 \log\det I

    with :math:`V = L^\top J` the row's root of the output Fisher pulled back and
    :math:`F = V^\top V` its information. It is the mutual information of parameters and
    targets for normal errors; for classes that of the linearised Gaussian model, which
    has no bound where a label's has (log C). Gains of a batch sum to that of the batch,
    whatever the order, and a batch chosen greedily has at least 1 - 1/e of the best
    batch's gain.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> state = ff.posterior(jnp.zeros(2), ff.structures.full(), prior_precision=1.0)
      >>> pool = jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> print(
      ...     ff.selection.values(
      ...         state, *model, pool, ff.selection.information_gain()
      ...     ).round(3)
      ... )
      [0.347      0.80500007]

    References:
      MacKay, "Information-based objective functions for active data selection", 1992.
      Nemhauser, Wolsey, Fisher, "An analysis of approximations for maximizing
      submodular set functions", 1978.
    """
    return InformationGain()


def variance_reduction(target: PyTree = None) -> Gain:
    r"""What rows take off a variance, :math:`\mathrm{tr}(M I^{-1})`.

    .. math:: \mathrm{tr}(M I^{-1}) - \mathrm{tr}(M (I + F)^{-1})
       = \mathrm{tr}\big[(1 + V I^{-1} V^\top)^{-1} V I^{-1} M I^{-1} V^\top\big]

    The target says of what:

    - None: of the parameters, M = 1 (A-optimality).
    - an information, in any structure: of the outputs that it is about. That of
      unlabelled inputs, `ff.estimators.exact(...)(params, (inputs, None))`, asks for
      the rows that help to predict *there*: V- or I-optimality, and the objective of
      batch active learning by the Fisher information.
    - a tree c like the parameters: of :math:`c^\top \theta`, M = c c^T (c-optimality).

    No bound holds for a batch chosen greedily. Where the state estimates a dispersion
    it multiplies the gains, and with them the variances that they are taken from.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> state = ff.posterior(jnp.zeros(2), ff.structures.full(), prior_precision=1.0)
      >>> pool = jnp.array([[1.0, 0.0], [2.0, 0.0]])
      >>> print(
      ...     ff.selection.values(
      ...         state, *model, pool, ff.selection.variance_reduction()
      ...     ).round(3)
      ... )
      [0.5 0.8]

    References:
      Ash, Goel, Krishnamurthy, Kakade, "Gone fishing: neural active learning with
      Fisher embeddings", 2021.
      Pukelsheim, "Optimal Design of Experiments", 2006.
    """
    return VarianceReduction(target)


def disagreement(key: Any, num_samples: int = 100) -> Value:
    r"""The mutual information of a row's class and the parameters (BALD), in nats.

    .. math:: H\big(\mathrm{E}_\theta\, p\big) - \mathrm{E}_\theta\, H(p)

    over draws of the parameters, the model linearised at the mean. Of several targets
    of a row the sum.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.bernoulli()
      >>> state = ff.posterior(
      ...     jnp.array(1.0), ff.structures.full(), prior_precision=1.0
      ... )
      >>> told = ff.selection.disagreement(key=0, num_samples=1000)
      >>> worth = ff.selection.values(state, *model, jnp.array([0.0, 2.0]), told)
      >>> bool(worth[1] > worth[0])  # at 0 all draws agree: a half
      True

    References:
      Houlsby, Huszar, Ghahramani, Lengyel, "Bayesian active learning for classification
      and preference learning", 2011.
    """
    checks.whole(num_samples, "num_samples", least=2)
    key = keys.key_data(key)
    return Value(_disagreement, num_samples, key)


def predictive_information(inputs: PyTree, key: Any, num_samples: int = 100) -> Value:
    r"""The mutual information of a row's class and those at other inputs (EPIG).

    .. math:: \mathrm{E}_{x'} \sum_{y y'} p(y, y') \log \frac{p(y, y')}{p(y)\, p(y')},
       \qquad p(y, y') = \mathrm{E}_\theta\, p(y \mid x)\, p(y' \mid x')

    over draws of the parameters, the model linearised at the mean, and the mean over
    `inputs` of the distribution that is to be predicted. Of S draws it is too large by
    about :math:`(C - 1)^2 / 2S`, the same for all rows.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.bernoulli()
      >>> state = ff.posterior(jnp.zeros(2), ff.structures.full(), prior_precision=1.0)
      >>> wanted = jnp.array([[3.0, 0.0]])
      >>> told = ff.selection.predictive_information(wanted, key=0, num_samples=500)
      >>> worth = ff.selection.values(state, *model, 3 * jnp.eye(2), told)
      >>> bool(worth[0] > worth[1])  # the second row says nothing of what is wanted
      True

    References:
      Bickford Smith, Kirsch, Farquhar, Gal, Foster, Rainforth, "Prediction-oriented
      Bayesian active learning", 2023.
    """
    checks.whole(num_samples, "num_samples", least=2)
    key = keys.key_data(key)
    return Value(_predictive_information, num_samples, key, inputs)


def entropy() -> Value:
    """The entropy of the class probabilities at the mean, in nats: a baseline.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.bernoulli()
      >>> state = ff.posterior(
      ...     jnp.array(1.0), ff.structures.full(), prior_precision=1.0
      ... )
      >>> x = jnp.array([0.0, 4.0])
      >>> print(ff.selection.values(state, *model, x, ff.selection.entropy()).round(3))
      [0.693 0.09 ]
    """
    return Value(_entropy)


def margin() -> Value:
    """Minus the two largest class probabilities' difference, at the mean: a baseline.

    It is largest, 0, where the two likeliest classes are equally so.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.bernoulli()
      >>> state = ff.posterior(
      ...     jnp.array(1.0), ff.structures.full(), prior_precision=1.0
      ... )
      >>> x = jnp.array([0.0, 4.0])
      >>> print(ff.selection.values(state, *model, x, ff.selection.margin()).round(3))
      [ 0.         -0.96400005]
    """
    return Value(_margin)


def _entropy(p: jax.Array, at: Any) -> jax.Array:
    return jnp.sum(jnp.mean(entr(p), 0), (1, 2))


def _margin(p: jax.Array, at: Any) -> jax.Array:
    best = jax.lax.top_k(p[0], min(2, p.shape[-1]))[0]
    return jnp.sum(jnp.sum(best[..., 1:], -1) - best[..., 0], -1)


def _disagreement(p: jax.Array, at: Any) -> jax.Array:
    whole = entr(jnp.mean(p, 0)) - jnp.mean(entr(p), 0)
    return jnp.sum(whole, (1, 2))


def _predictive_information(p: jax.Array, at: jax.Array) -> jax.Array:
    together = linalg.product("sctk,smul->ctkmul", p, at) / p.shape[0]
    apart = linalg.product("ctk,mul->ctkmul", jnp.mean(p, 0), jnp.mean(at, 0))
    ratio = jnp.where(together > 0, together / apart, 1)
    terms = jnp.sum(together * jnp.log(ratio), (2, 5))  # (c, T, m, T')
    return jnp.sum(jnp.mean(terms, (2, 3)), 1)
