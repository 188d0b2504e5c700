"""What a memory is, and the sums that pass through it.

A memory says what is believed before a batch (`predict`) and what is kept of it
(`remember`). It handles weighted sums and knows no structure; a flow's sums come with
a Gaussian (`Belief`), a preconditioner's alone (`Sum`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import information as ops
from fisherflow_jax._ground import linalg, trees

PyTree = Any


class Sum(NamedTuple):
    """A weighted sum over batches: of what one adds (a site), or of all remembered.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> one = ff.memories.Sum(ff.structures.Scalar(jnp.array(2.0)), jnp.ones(()))
      >>> both = one.faded(0.5).plus(one)
      >>> print(both.curvature.value, both.weight)
      3.0 1.5
    """

    curvature: Any  # an information
    weight: jax.Array  # () effective number of observations
    linear: PyTree = ()  # what else fades like the information
    quadratic: tuple = ()  # informations that carry the weight twice
    scores: PyTree = ()  # sums of scores, which fade like the weight

    def plus(self, site: "Sum") -> "Sum":
        return Sum(
            curvature=ops.add(site.curvature, self.curvature),
            weight=self.weight + site.weight,
            linear=optax.tree.add(self.linear, site.linear),
            quadratic=tuple(map(ops.add, site.quadratic, self.quadratic)),
            scores=optax.tree.add(self.scores, site.scores),
        )

    def faded(self, factor: jax.Array) -> "Sum":
        return Sum(
            curvature=ops.scale(self.curvature, factor),
            weight=self.weight * factor,
            linear=jax.tree.map(lambda x: x * factor, self.linear),
            quadratic=tuple(ops.scale(x, jnp.square(factor)) for x in self.quadratic),
            scores=jax.tree.map(lambda x: x * factor, self.scores),
        )

    def faded_to_prior(self, factor: jax.Array) -> "Sum":
        return self.faded(factor)  # a sum alone has no prior

    @property
    def mean(self) -> tuple:
        return ()  # nor has it a mean

    @property
    def rest(self) -> tuple:
        return ()

    def referred(self, site: "Sum", way: PyTree) -> "Sum":
        return site

    def replaced_by(self, sites: "Sum", reference: PyTree) -> "Sum":
        return Sum(ops.conform(self.curvature, sites.curvature), sites.weight)

    def moved(self, noise: Any, transition: Any) -> "Sum":
        curvature = ops.propagate(self.curvature, noise, transition)
        return self._replace(curvature=curvature)


class Shift(NamedTuple):
    """The linear part of a flow's site: what it says of the mean.

    Relative to a reference: at first the mean of the belief with the site in it.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> ff.memories.Shift(jnp.array([1.0, 2.0])).squares is None
      True
    """

    vector: PyTree  # half the slope of what it adds, at the reference, downhill
    squares: PyTree = None  # () its own sum of squares there, where that is kept


class Squares(NamedTuple):
    """Sums of squares at the mean, where the dispersion is unknown; each `()`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> squares = ff.memories.Squares(penalised=jnp.array(3.0), own=jnp.array(2.0))
      >>> squares.penalised - squares.own  # the prior's share
      Array(1., dtype=float32, weak_type=True)
    """

    penalised: jax.Array  # the prior's share included: what the mean is the least of
    own: jax.Array  # the data's alone


class Prior(NamedTuple):
    """What is left of the Gaussian before any data: `N(origin, precision^-1)`.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> prior = ff.memories.Prior(jnp.zeros(2), ff.structures.Scalar(jnp.array(2.0)))
      >>> prior.precision.value
      Array(2., dtype=float32, weak_type=True)
    """

    origin: PyTree
    precision: Any  # an information; a number is kept as a Scalar


class Belief(NamedTuple):
    """What a flow believes: a Gaussian, and the sums that go with it.

    Attributes:
      mean: like the parameters.
      sums: the curvature with the prior included; linear: `Squares`, where they are
        kept; quadratic: the sum of squared scores, where it is kept, without the prior.
      prior: what is left of it.
      rest: what rounding took from the mean; None: not kept.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Scalar(jnp.array(2.0))
      >>> sums = ff.memories.Sum(information, jnp.ones(()))
      >>> belief = ff.memories.Belief(
      ...     jnp.zeros(2), sums, ff.memories.Prior(jnp.zeros(2), information)
      ... )
      >>> belief.sums.curvature.value
      Array(2., dtype=float32, weak_type=True)
    """

    mean: PyTree
    sums: Sum
    prior: Prior
    rest: PyTree = None

    def to(self, mean: PyTree, rest: PyTree = None) -> PyTree:
        """The way from the mean to another, and what rounding took from that."""
        move = optax.tree.sub(mean, self.mean)
        if self.rest is None:
            return move
        if rest is None:
            return optax.tree.sub(move, self.rest)
        return optax.tree.add(move, optax.tree.sub(rest, self.rest))

    def own_squares(self, mean: PyTree, rest: PyTree = None) -> jax.Array:
        """The data's own sum of squares at another mean, `()`."""
        own, (origin, precision) = self.sums.linear.own, self.prior
        information = ops.plain(self.sums.curvature)
        move = self.to(mean, rest)
        # half the slope of the data's sum is the prior's pull
        slope = ops.matvec(precision, optax.tree.sub(self.mean, origin))
        # one difference of vectors: under a prior alone it is zero, however far the
        # move, where two squares of the move would leave their rounding
        bend = optax.tree.sub(
            ops.matvec(information, move), ops.matvec(precision, move)
        )
        return _squares_along(own, slope, move, bend, information)

    def faded(self, factor: jax.Array) -> "Belief":
        precision = ops.scale(self.prior.precision, factor)
        return self._replace(
            sums=self.sums.faded(factor), prior=self.prior._replace(precision=precision)
        )

    def faded_to_prior(self, factor: jax.Array) -> "Belief":
        """Faded, the prior taking the place of what is forgotten."""
        faded, (origin, precision) = self.faded(factor), self.prior
        rest = ops.scale(precision, 1 - factor)
        information = ops.add(faded.sums.curvature, rest)
        # the mean moves by an increment: I theta is never carried, it loses digits
        offset = optax.tree.scale(-1, self.to(origin))
        solver = ops.regularised(information, offset).divide
        step = solver(ops.matvec(rest, offset))
        mean, lost = linalg.moved(self.mean, self.rest, optax.tree.scale(-1, step))
        squares = faded.sums.linear
        if squares is not None:
            offset = optax.tree.sub(mean, origin)
            grown = ops.quadratic_form(faded.sums.curvature, step)
            grown = grown + ops.quadratic_form(rest, offset)
            squares = Squares(squares.penalised + grown, faded.own_squares(mean, lost))
        sums = faded.sums._replace(curvature=information, linear=squares)
        return Belief(mean, sums, self.prior, lost)

    def referred(self, site: Sum, way: PyTree) -> Sum:
        """The site relative to another reference, the present one `way` beyond it."""
        if way is None:
            return site
        vector, squares = site.linear
        pull = ops.matvec(site.curvature, way)
        if squares is not None:
            back = optax.tree.scale(-1, vector)
            squares = _squares_along(squares, back, way, pull, site.curvature)
        return site._replace(linear=Shift(optax.tree.add(vector, pull), squares))

    def replaced_by(self, sites: Sum, reference: PyTree) -> "Belief":
        """The belief that the prior and a sum of sites make, kept as this one is.

        The sites' shifts are relative to `reference`.
        """
        origin, precision = self.prior
        shift = sites.linear
        information = ops.add(sites.curvature, precision)
        pull = ops.matvec(precision, optax.tree.sub(origin, reference))
        # what rounding hides stays: nothing is lost, the sites tell it again
        filled, _ = ops.resolved(information, reference)
        step = ops.solve(filled, optax.tree.add(shift.vector, pull))
        lost = None if self.rest is None else optax.tree.zeros_like(step)
        mean, lost = linalg.moved(reference, lost, step)
        squares = None
        if self.sums.linear is not None:
            bend = ops.matvec(sites.curvature, step)
            given = shift.squares, shift.vector, step, bend, sites.curvature
            own = _squares_along(*given)
            offset = optax.tree.sub(mean, origin)
            squares = Squares(own + ops.quadratic_form(precision, offset), own)
        # as rich as the information, where the prior is richer than the structure
        quadratic = [ops.add(x, ops.scale(precision, 0.0)) for x in sites.quadratic]
        sums = Sum(
            curvature=ops.conform(self.sums.curvature, information),
            weight=sites.weight,
            linear=squares,
            quadratic=tuple(map(ops.conform, self.sums.quadratic, quadratic)),
            scores=sites.scores,
        )
        return self._replace(mean=mean, sums=sums, rest=lost)

    def moved(self, noise: Any, transition: Any) -> "Belief":
        """After a step `theta -> A theta + N(0, Q)`; A is None for the identity."""
        mean, rest = self.mean, self.rest
        if transition is not None and rest is not None:
            rest = optax.tree.zeros_like(rest)
        if hasattr(transition, "ndim"):
            mean = trees.unravel(transition @ trees.ravel(mean), mean)
        elif transition is not None:
            mean = ops.matvec(transition, mean)
        sums = self.sums.moved(noise, transition)
        return self._replace(mean=mean, sums=sums, rest=rest)


def _squares_along(
    squares: jax.Array, slope: PyTree, move: PyTree, bend: PyTree, information: Any
) -> jax.Array:
    """A sum of squares after a move, `()`: what it falls by twice `slope . move`.

    `bend` is its curvature times the move. Along what the data do not determine a move
    may be of any length, and leaves only rounding, of the size that `information` has.
    """
    sizes = trees.ravel(ops.diagonal(information, move))
    most = jnp.sum(sizes * jnp.square(trees.ravel(move)))
    rounding = 8 * float(jnp.finfo(squares.dtype).eps) * most
    curved = trees.dot(move, bend)
    curved = jnp.where(curved > rounding, curved, jnp.zeros_like(curved))
    # no sum of squares is negative anywhere on the line
    steepest = jnp.sqrt(squares * curved)
    return squares + curved - 2 * jnp.clip(trees.dot(move, slope), -steepest, steepest)


class MovingAverage(NamedTuple):
    """How a preconditioner averages batches, where it does not add them up.

    The remembered value starts at zero, as Optax's moving averages do.

    Attributes:
      gain: the weight of a batch's mean, `1 - decay`.
      debias: `(an elementwise information, batches taken in) -> its mean`, to the last
        bit.
    """

    gain: Any
    debias: Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """Made by the factories of `ff.memories`; equal choices are one object.

    One is made by `ff.memories.stationary`.

    Attributes:
      name: what errors call it.
      init: `(a site of zeros) -> storage`.
      predict: `(storage, believed, batch, like) -> believed`: a `Belief` or a `Sum`
        before the batch; `like` is a tree of the parameters' shapes.
      remember: `(storage, believed with the site, site) -> (storage, believed,
        report)`.
      needs: capabilities asked of the structure, with the reason for each.
      average: in a preconditioner only; None: sums are kept.
      call: how it was made, for printing.
    """

    name: str
    init: Callable[[Sum], Any]
    predict: Callable[[Any, Any, Any, PyTree], Any]
    remember: Callable[[Any, Any, Sum], tuple[Any, Any, Any]]
    needs: dict[str, str] = dataclasses.field(default_factory=dict)
    average: MovingAverage | None = None
    call: str = ""

    def __repr__(self) -> str:
        return self.call or self.name


def total(sites: Sum, weights: jax.Array) -> Sum:
    """The weighted sum of a stack of sites, leaves `(k, ...)`."""

    def plain(tree: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1), tree
        )

    return Sum(
        curvature=ops.total(sites.curvature, weights),
        weight=plain(sites.weight),
        linear=plain(sites.linear),
        quadratic=tuple(ops.total(x, weights) for x in sites.quadratic),
        scores=plain(sites.scores),
    )


def keep(storage: Any, believed: Any, site: Sum) -> tuple[Any, Any, tuple]:
    """Remembers what is believed and nothing else."""
    del site
    return storage, believed, ()


def age(storage: Any, belief: Belief, steps: jax.Array) -> Belief:
    """The belief after `steps` updates without data, for merging workers.

    A storage whose states merge has a method `aged(belief, steps)`.

    Raises:
      TypeError: for memories whose states do not merge.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda p, x: x @ p, ff.likelihoods.gaussian())
      >>> state = flow.init(jnp.zeros(1))
      >>> sums = ff.memories.Sum(state.information, jnp.ones(()))
      >>> belief = ff.memories.Belief(state.mean, sums, state.prior)
      >>> ff.memories.age(state.memory, belief, jnp.array(2)) is belief  # nothing fades
      True
    """
    if not hasattr(storage, "aged"):
        raise TypeError(
            "windowed, adaptive and random_walk states do not merge (this one keeps a "
            f"{type(storage).__name__}): only sums of sites do, which stationary and "
            "exponential memories keep."
        )
    return storage.aged(belief, steps)


def remembers_all(storage: Any) -> bool:
    """Whether every batch keeps its full weight, as the storage declares.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda p, x: x @ p, ff.likelihoods.gaussian()
      >>> for memory in ff.memories.stationary(), ff.memories.exponential(0.9):
      ...     state = ff.fisher_flow(*model, memory=memory).init(jnp.zeros(1))
      ...     print(ff.memories.remembers_all(state.memory))
      True
      False
    """
    return getattr(storage, "remembers_all", False)


def keeps_prior(storage: Any) -> bool:
    """Whether what is left of the prior is a part of the information.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(lambda p, x: x @ p, ff.likelihoods.gaussian())
      >>> ff.memories.keeps_prior(flow.init(jnp.zeros(1)).memory)
      True
    """
    return getattr(storage, "keeps_prior", True)
