"""The expected information of the outputs that make a distribution."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fisherflow_jax import expectations
from fisherflow_jax._ground import arrays, checks, keys, linalg
from fisherflow_jax.expectations import OverTargets
from fisherflow_jax.likelihoods import _likelihood as shared

Make = Callable[[jax.Array], Any]

# The mean score, in units of a score's root mean square, from which a family counts as
# one whose support moves with its parameters; and the probability that points may miss.
_BIASED, _MISSED = 0.05, 0.01
# Outputs of one target that are tried, to see what `make` takes and makes.
_MOST_OUTPUTS = 32
_NUM_DRAWS = 64


class OutputInformation(NamedTuple):
    """The Fisher information of outputs, and whether it can be trusted.

    Made by `ff.likelihoods.output_information`.

    Attributes:
      information: `(n, ..., K, K)`; K = 1 where a target has one output.
      mean_score: `(n, ..., K)`, zero for a regular family; None: not computed.
      mass: `(n, ...)`, the probability of the targets summed over; None: not computed.
      standard_error: like the information, of drawn targets; None: they are not drawn.
    """

    information: jax.Array
    mean_score: jax.Array | None
    mass: jax.Array | None
    standard_error: jax.Array | None = None


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """What a library computes with its own types, however strict the caller is."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---- of one target


def _by_points(make: Make, rule: OverTargets, z: jax.Array, key: Any) -> tuple:
    r"""The moments of the scores of one target: E s s', E s, E 1, standard error."""

    def score(target: jax.Array) -> jax.Array:
        return jax.grad(lambda z: make(z).log_prob(target))(z).reshape(-1)

    targets, weights = rule.points(make(z), z.dtype, key)
    scores = jax.vmap(score)(targets)
    # where a target cannot be, or lies beyond the numbers, its score need not exist
    there = jnp.all(jnp.isfinite(scores), -1) & (weights > 0)
    weights = jnp.where(there, weights, jnp.zeros_like(weights))
    scores = jnp.where(there[:, None], scores, jnp.zeros_like(scores))
    information = linalg.product("m,mi,mj->ij", weights, scores, scores)
    error = None
    if rule.num_draws is not None:
        squares = linalg.product("m,mi,mj->ij", weights, scores**2, scores**2)
        spread = jnp.maximum(squares - information**2, 0)
        error = jnp.sqrt(spread / max(rule.num_draws - 1, 1))
    return information, weights @ scores, jnp.sum(weights), error


def _by_divergence(make: Make, z: jax.Array) -> tuple:
    """The Hessian of a divergence that numpyro knows in closed form."""
    from numpyro.distributions import Distribution, kl_divergence

    here = make(z)
    if not isinstance(here, Distribution):
        raise TypeError(f"no divergence is registered for {type(here).__name__}.")

    def divergence(flat: jax.Array) -> jax.Array:
        return kl_divergence(here, make(flat.reshape(z.shape)))

    return jax.hessian(divergence)(z.reshape(z.size)), None, None, None


# ---- what make takes, and what can be done with what it makes


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """What `make` takes and makes, and how its information is taken.

    Attributes:
      make: the outputs of one target -> its distribution.
      several: whether it takes those of the last axis, or one number.
      made: a distribution, at shapes alone.
      shape: of the outputs that it was made of.
      rule: None: a registered divergence.
    """

    make: Make
    several: bool
    made: Any
    shape: shared.Shape
    rule: OverTargets | None = None

    @property
    def random(self) -> bool:
        return self.rule is not None and self.rule.num_draws is not None

    def targets(self, outputs: Any) -> shared.Shape:
        """The shape of the targets, without an event's, given that of the outputs."""
        return outputs.shape[:-1] if self.several else outputs.shape

    def each(self, function: Callable, outputs: jax.Array, *more: jax.Array) -> Any:
        """`function` of the outputs of one target (and more), over all targets."""

        def one(*given: Any) -> Any:
            with usual_promotion():
                return function(*given)

        for _ in self.targets(outputs):
            one = jax.vmap(one)
        return one(outputs, *more)

    def keys(self, key: jax.Array, outputs: jax.Array) -> jax.Array:
        """One a target."""
        shape = self.targets(outputs)
        return jax.random.split(key, math.prod(shape)).reshape(shape)

    def moments(self, z: jax.Array, key: Any) -> tuple:
        """Of the scores of one target."""
        if self.rule is None:
            return _by_divergence(self.make, z)
        return _by_points(self.make, self.rule, z, key)

    def divergence(self, z: jax.Array, other: jax.Array) -> jax.Array:
        """The Kullback-Leibler divergence from one target's distribution to another."""
        here, there = self.make(z), self.make(other)
        if self.rule is None:
            from numpyro.distributions import kl_divergence

            return arrays.like(kl_divergence(here, there), z)
        targets, weights = self.rule.points(here, z.dtype, None)

        def log_ratio(target: jax.Array) -> jax.Array:
            return arrays.like(here.log_prob(target) - there.log_prob(target), z)

        ratios = jnp.where(weights > 0, jax.vmap(log_ratio)(targets), 0)
        return linalg.product("m,m->", weights, ratios)

    def measured(self, outputs: jax.Array, key: Any = None) -> OutputInformation:
        if not self.random:
            found = self.each(lambda z: self.moments(z, None), outputs)
        else:
            found = self.each(self.moments, outputs, self.keys(key, outputs))
        return OutputInformation(*found)

    def wrong(self, found: OutputInformation) -> jax.Array:
        """Of each target, whether its information is none."""
        if found.mean_score is None or found.mass is None:
            return jnp.zeros(found.information.shape[:-2], bool)
        allowed = _BIASED
        if self.rule is not None and self.rule.num_draws is not None:
            allowed = max(allowed, 6 * self.rule.num_draws**-0.5)
        size = arrays.safe_sqrt(linalg.diagonal(found.information))
        biased = jnp.any(jnp.abs(found.mean_score) > allowed * size, -1)
        return biased | (jnp.abs(found.mass - 1) > _MISSED)

    def check_regular(self) -> None:
        """Raises where the mean score is not zero at any outputs that make sense."""
        if self.random or self.rule is None:
            return
        rng, shape = np.random.default_rng(0), (3, *self.shape)
        some = np.zeros(shape), rng.normal(size=shape), rng.uniform(0.2, 0.8, shape)
        outputs = jnp.asarray(np.concatenate(some), jnp.result_type(float))
        found = jax.jit(self.measured)(outputs)
        if not checks.is_concrete(found):  # make closes over what is traced
            return
        sizes = np.diagonal(np.asarray(found.information), axis1=1, axis2=2)
        sound = np.all(np.isfinite(sizes) & (sizes > 0), 1)
        sound &= np.abs(np.asarray(found.mass) - 1) <= _MISSED
        wrong = np.asarray(self.wrong(found)) & sound
        if np.any(sound) and np.all(wrong[sound]):
            raise ValueError(
                f"from_distribution: of outputs like 0 or 1, {told(found, wrong)}"
            )


def told(found: OutputInformation, wrong: np.ndarray) -> str:
    """What is wrong with the first target of which anything is."""
    place = tuple(int(x) for x in np.argwhere(wrong)[0])
    mass, score = np.asarray(found.mass)[place], np.asarray(found.mean_score)[place]
    if abs(mass - 1) > _MISSED:
        return (
            f"the targets of output {place} that were summed over have probability "
            f"{mass:.3g}: give a rule with more points, or draws(n)."
        )
    return (
        f"the mean score of output {place} is {score}, and not zero: the family is not "
        "regular there (its support moves with an output, as of Uniform(0, z)): it has "
        "no Fisher information."
    )


def family_of(make: Make, rule: OverTargets | None) -> Family:
    """By the rule; None: by the first that the distribution can do."""
    family = _tried(_off_zero(make))
    if rule is not None:
        checks.made(rule, OverTargets, "rule", "ff.expectations.quantiles()")
        return dataclasses.replace(family, rule=rule)
    z = jax.ShapeDtypeStruct(family.shape, jnp.result_type(float))
    chosen = family
    for each in (
        expectations.enumeration(),
        None,
        expectations.quantiles(),
        expectations.draws(_NUM_DRAWS),
    ):
        chosen = dataclasses.replace(family, rule=each)
        with (
            contextlib.suppress(
                AttributeError, ImportError, NotImplementedError, TypeError
            ),
            usual_promotion(),
        ):
            moments = chosen.moments
            jax.eval_shape(lambda z, of=moments: of(z, jax.random.key(0)), z)
            break
    return chosen


def _off_zero(make: Make) -> Make:
    """Of outputs that are nowhere exactly zero.

    There log-probabilities are bent that are written with |z| or max(z, 0), as numpyro
    does of logits: their derivatives are those of one side for one part and of the
    other side for another.
    """

    @functools.wraps(make, updated=())
    def made(z: jax.Array) -> Any:
        tiny = jnp.full_like(z, jnp.finfo(z.dtype).tiny ** 0.5)
        return make(z + jnp.where(z == 0, tiny, jnp.zeros_like(z)))

    return made


def _tried(make: Make) -> Family:
    """From shapes: one number a target, or the first length of outputs that fits."""

    def tried(shape: shared.Shape) -> tuple[Any, Any]:
        kept: list[Any] = []

        def probability(z: jax.Array) -> jax.Array:
            with usual_promotion():
                kept.append(make(z))
                return kept[0].log_prob(kept[0].sample(jax.random.key(0)))

        like = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
        try:
            return jax.eval_shape(probability, like).shape, kept[0]
        except Exception as error:
            return error, None

    one, made = tried(())
    first = one
    # one last, which broadcasts with others
    for size in (*range(2, _MOST_OUTPUTS + 1), 1):
        shape, several = tried((size,))
        if shape == ():
            return Family(make, True, several, (size,))
        if one == () and shape == (size,):
            break
        first = shape if several is not None else first
    if one == ():
        return Family(make, False, made, ())
    if isinstance(first, Exception):
        raise ValueError(
            "from_distribution: make takes the outputs of one target, a number or a "
            f"vector of up to {_MOST_OUTPUTS}, and returns a distribution with "
            f"log_prob and sample; of zeros it raised {type(first).__name__}: {first}"
        ) from first
    raise ValueError(
        "from_distribution: make must return the distribution of one target; it "
        f"returns a batch of shape {first}. Targets that belong together are one "
        "event: make(...).to_event(1)."
    )


# ---- public


def output_information(
    make: Make,
    outputs: ArrayLike,
    rule: OverTargets | None = None,
    key: Any = None,
) -> OutputInformation:
    r"""The Fisher information of outputs about the distribution that they make.

    .. math:: I(z) = \mathrm E_{y \sim p(\cdot | z)}\, s s^\top, \qquad
       s = \nabla_z \log p(y | z), \qquad \mathrm E\, s = 0

    The last holds for a regular family alone, and is what tells one whose support moves
    with its parameters: there the expected square of the score is no information.

    Args:
      make: as `from_distribution` takes it.
      outputs: `(n, ...)`, the parameters of the distributions.
      rule: as there.
      key: for `draws`.

    Returns:
      An `OutputInformation`. Cost: a score for each target of the rule.

    Raises:
      ValueError: for a drawing rule without a key.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpyro.distributions as dist
      >>> from fisherflow_jax import likelihoods
      >>> make = lambda z: dist.Gumbel(z[0], z[1])
      >>> found = likelihoods.output_information(make, jnp.array([[0.0, 2.0]]))
      >>> [round(float(4 * x), 3) for x in found.information[0, 1]]
      [-0.423, 1.824]
      >>> bool(abs(found.mean_score).max() < 1e-3)
      True
    """
    family = family_of(make, rule)
    if family.random and key is None:
        raise ValueError(f"{family.rule} draws targets: give a key.")
    typed = None if key is None else keys.typed_key(key)
    return family.measured(arrays.widen(outputs), typed)
