"""Adam's moments beside two factors of each matrix: what Shampoo and SOAP share.

`ff.scale_by_fisher` keeps a factorisation for `inverse_period` steps as a whole. Here
what is divided by must be new at each step, and only roots and bases are old; and a
basis must not have seen the gradient that is taken into it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators
from fisherflow_jax._ground import placement, sharding, trees
from fisherflow_jax.structures import (
    SideFactors,
    SideRoots,
    Sides,
    Structure,
    TwoSided,
)
from fisherflow_jax.transforms.preconditioner import checks
from fisherflow_jax.transforms.preconditioner.state import SecondMoment, settled

PyTree = Any


class TwoSidedState(NamedTuple):
    """What `ff.shampoo` and `ff.soap` keep. Made by `ff.soap`.

    Attributes:
      step: `()` int32, updates that were not skipped.
      momentum: averaged gradients, like the parameters.
      information: averaged squares, a `SecondMoment` of a `TwoSided`.
      matrix_moments: beside each array: averaged squares `(K, I, O)` of its entries, in
        the basis for SOAP; None where there are none.
      factorisation: roots or bases, a tree for each side: the array's, or None.
      num_skipped: `()` int32, updates refused for a non-finite value.
    """

    step: jax.Array
    momentum: PyTree
    information: SecondMoment
    matrix_moments: PyTree
    factorisation: PyTree
    num_skipped: jax.Array


class Average(NamedTuple):
    """Optax's moving average; with a decay of one, the sum and so the mean of all."""

    decay: Any

    @property
    def _is_sum(self) -> bool:
        return isinstance(self.decay, (int, float)) and self.decay == 1

    def plus(self, old: PyTree, new: PyTree) -> PyTree:
        if self._is_sum:
            return jax.tree.map(jnp.add, old, new)
        return optax.tree.update_moment(new, old, self.decay, 1)

    def mean(self, kept: PyTree, count: jax.Array) -> PyTree:
        """The weighted mean of what was taken in, so many times."""
        if self._is_sum:
            return jax.tree.map(lambda x: x / count.astype(x.dtype), kept)
        count = count.astype(jnp.result_type(self.decay))
        return optax.tree.bias_correction(kept, self.decay, count)


class Advanced(NamedTuple):
    """One array's update, and what is kept of it; matrices are `(K, I, O)`."""

    update: jax.Array
    momentum: jax.Array
    moments: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Method:
    """The choices that both share, and the rule of a matrix.

    Attributes:
      rule: a `Roots` or a `Rotation`.
      mu_dtype: type of the momentum; None: that of the parameters.
      store: type of roots and bases; None: that of the factors.
    """

    rule: Any
    structure: Structure
    first: Average
    second: Average
    eps: Any
    inverse_period: int
    mu_dtype: Any
    store: Any
    factor_sharding: placement.Rule | None

    def squared(self, gradient: PyTree) -> TwoSided:
        """The square of a gradient, in the structure."""
        estimator = estimators.squared_gradient(structure=self.structure)
        return estimator.from_gradient(gradient)

    def divided(self, mean: jax.Array, square: jax.Array) -> jax.Array:
        """Adam's quotient."""
        return mean / (jnp.sqrt(square) + self.eps)

    def narrow(self, kept: Any) -> Any:
        """Roots or bases, in the type in which they are kept."""
        return kept if self.store is None else optax.tree.cast(kept, self.store)

    def wide(self, kept: Any, like: jax.Array) -> Any:
        return optax.tree.cast(kept, like.dtype)


@dataclasses.dataclass(frozen=True)
class Roots:
    """Shampoo: roots of both factors on the two sides of the momentum."""

    exponent: float
    damping: Any
    graft: str | None
    kind = SideRoots

    def start(self, factors: TwoSided) -> SideRoots:
        return factors.roots(self.exponent, self.damping)

    @property
    def keeps_squares(self) -> bool:
        return self.graft == "adam"

    def renewed(
        self, method: Method, step: jax.Array, factors: TwoSided, kept: SideRoots
    ) -> SideRoots:
        """The roots that this step is made with."""
        # the first factors have a low rank: they are not kept long
        due = (step % method.inverse_period == 0) | (step < method.inverse_period)
        return jax.lax.cond(
            due, lambda: method.narrow(self.start(factors)), lambda: kept
        )

    def advance(
        self,
        method: Method,
        step: jax.Array,
        gradient: jax.Array,
        roots: SideRoots,
        old: Advanced,
    ) -> Advanced:
        momentum = method.first.plus(old.momentum, gradient)
        mean, moments = method.first.mean(momentum, step + 1), old.moments
        update = target = roots.times(mean)
        if self.graft == "sgd":
            target = mean
        elif self.graft == "adam":
            moments = method.second.plus(moments, jnp.square(gradient))
            target = method.divided(mean, method.second.mean(moments, step + 1))
        if self.graft is not None:
            size = _norm(update)
            there = size > 0
            share = _norm(target) / jnp.where(there, size, jnp.ones_like(size))
            update = jnp.where(there, share, jnp.zeros_like(share)) * update
        return Advanced(update, momentum, moments)

    def after(
        self,
        method: Method,
        step: jax.Array,
        factors: TwoSided,
        kept: SideRoots,
        moments: PyTree,
    ) -> tuple[SideRoots, PyTree]:
        """Nothing is renewed after a step."""
        del method, step, factors
        return kept, moments


@dataclasses.dataclass(frozen=True)
class Rotation:
    """SOAP: Adam in the eigenbasis of both factors.

    The basis is zero until the first gradient has made one, and so is the step.
    """

    decomposition: bool
    keeps_squares = True
    kind = Sides

    def start(self, factors: TwoSided) -> Sides:
        return factors.decomposed()

    def renewed(
        self, method: Method, step: jax.Array, factors: TwoSided, kept: Sides
    ) -> Sides:
        """A step is made with the bases of past gradients."""
        del method, step, factors
        return kept

    def advance(
        self,
        method: Method,
        step: jax.Array,
        gradient: jax.Array,
        bases: Sides,
        old: Advanced,
    ) -> Advanced:
        is_first, nothing = step == 0, jnp.zeros_like(gradient)
        bases = method.wide(bases, gradient)
        square = jnp.square(bases.into(gradient))
        momentum = method.first.plus(
            old.momentum, jnp.where(is_first, nothing, gradient)
        )
        moments = method.second.plus(old.moments, square)
        count = jnp.maximum(step, 1)
        mean = bases.into(method.first.mean(momentum, count))
        update = method.divided(mean, method.second.mean(moments, count))
        update = jnp.where(is_first, nothing, bases.out_of(update))
        return Advanced(update, momentum, moments)

    def after(
        self,
        method: Method,
        step: jax.Array,
        factors: TwoSided,
        kept: Sides,
        moments: PyTree,
    ) -> tuple[Sides, PyTree]:
        """The bases of the next step, and second moments as seen from them."""

        def renew() -> tuple[Sides, PyTree]:
            if self.decomposition:
                fresh, seen = factors.moved(kept, moments)
                return method.narrow(fresh), seen
            fresh = jax.lax.cond(
                step == 0,
                lambda: self.start(factors),
                lambda: factors.iterated(kept),
            )
            return method.narrow(fresh), moments

        due = step % method.inverse_period == 0
        return jax.lax.cond(due, renew, lambda: (kept, moments))


def _norm(matrices: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrices), axis=(1, 2), keepdims=True))


def transformation(method: Method) -> optax.GradientTransformationExtraArgs:
    """Momentum divided by what `method` keeps of squares."""

    def init(params: PyTree) -> TwoSidedState:
        checks.check_real(params)
        start = functools.partial(_nothing, method)
        with placement.holding(method.factor_sharding, params):
            squares, moments, kept = placement.made(start, params)
        count = jnp.zeros((), jnp.int32)
        momentum = jax.tree.map(
            lambda x: jnp.zeros_like(x, method.mu_dtype or x.dtype), params
        )
        state = TwoSidedState(
            step=count,
            momentum=momentum,
            information=SecondMoment(squares),
            matrix_moments=moments,
            factorisation=kept,
            num_skipped=count,
        )
        return settled(state)

    def update(
        updates: PyTree,
        state: TwoSidedState,
        params: PyTree | None = None,
        **extra: Any,
    ) -> tuple[PyTree, TwoSidedState]:
        del extra
        if params is not None:
            checks.check_same(updates, params, "updates and params must be one tree")
        checks.check_same(
            updates,
            state.momentum,
            "the state was initialised with another tree than params",
        )

        def run(state: TwoSidedState, updates: PyTree) -> Any:
            with placement.holding(method.factor_sharding, (updates, state)):
                return _advance(method, updates, state)

        return sharding.in_auto_mode(run, (updates, state), state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _nothing(method: Method, params: PyTree) -> tuple[TwoSided, PyTree, PyTree]:
    """Factors, second moments and what is kept of the factors, before any gradient."""
    nothing = method.structure.isotropic(params, 0.0)

    def squares(part: SideFactors) -> jax.Array | None:
        if not method.rule.keeps_squares:
            return None
        shape = *part.left.shape[:2], part.right.shape[1]
        return jnp.zeros(shape, part.left.dtype)

    kept = jax.eval_shape(lambda x: method.narrow(method.rule.start(x)), nothing)
    kept = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), kept)
    return nothing, nothing.beside_matrices(squares), kept


def _advance(
    method: Method, updates: PyTree, state: TwoSidedState
) -> tuple[PyTree, TwoSidedState]:
    rule, step = method.rule, state.step
    squares = method.squared(updates)
    squares = placement.placed(method.second.plus(state.information.squares, squares))
    mean = method.second.mean(squares, step + 1)
    kept = rule.renewed(method, step, mean, state.factorisation)
    made = jax.tree.map(
        functools.partial(_advance_leaf, method, step),
        updates,
        mean.parts,
        state.momentum,
        state.matrix_moments,
        trees.zipped(rule.kind, *kept),
    )
    whole = jax.tree.structure(updates)
    rows = jax.tree.leaves(made, is_leaf=lambda node: isinstance(node, Advanced))
    columns = list(zip(*rows, strict=True)) or [()] * 3
    result, momentum, moments = (jax.tree.unflatten(whole, x) for x in columns)
    kept, moments = rule.after(method, step, mean, kept, moments)
    after = state._replace(
        momentum=momentum,
        information=SecondMoment(squares),
        matrix_moments=moments,
        factorisation=kept,
    )
    sound = trees.all_finite((updates, result, after))
    after = trees.where(sound, after, state)._replace(
        step=state.step + sound.astype(jnp.int32),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
    )
    own = "information", "matrix_moments", "factorisation"
    after = after._replace(**{x: placement.placed(getattr(after, x)) for x in own})
    return trees.zero_unless(sound, result), after


def _advance_leaf(
    method: Method,
    step: jax.Array,
    gradient: jax.Array,
    square: Any,
    momentum: jax.Array,
    moments: jax.Array | None,
    kept: Any,
) -> Advanced:
    """One array's update, like it, and what is kept of it."""
    dtype = jax.tree.leaves(square)[0].dtype
    wide, before = gradient.astype(dtype), momentum.astype(dtype)
    old = Advanced(gradient, before, moments)
    if kept is not None:
        old = old._replace(momentum=square.matrices(before))
        after = method.rule.advance(method, step, square.matrices(wide), kept, old)
    else:
        moved = method.first.plus(before, wide)
        update = method.divided(method.first.mean(moved, step + 1), square)
        after = old._replace(update=update, momentum=moved)
    shape = gradient.shape
    return after._replace(
        update=after.update.reshape(shape).astype(gradient.dtype),
        momentum=after.momentum.reshape(shape).astype(momentum.dtype),
    )
