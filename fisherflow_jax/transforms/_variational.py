"""Variational inference by natural gradients: an Optax loop whose weights are drawn."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax import estimators, posteriors, structures
from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, sharding, trees
from fisherflow_jax.accumulation import gathered
from fisherflow_jax.transforms._descent import Descent
from fisherflow_jax.transforms.preconditioner import checks as rules
from fisherflow_jax.transforms.preconditioner import state as states

PyTree = Any

_STATIC = (
    "within optax.inject_hyperparams name it in static_args, as estimator and "
    "num_samples."
)


class VariationalState(NamedTuple):
    """The precision of the Gaussian whose mean are the parameters.

    Attributes:
      step: `()` int32, updates that were not skipped.
      information: I, of all observations and of the prior.
      prior_precision: P, the prior's part of it.
      prior_mean: like the parameters; None: zero.
      momentum: averaged gradients, like the parameters, in float32 or wider.
      num_skipped: `()` int32, updates refused for a non-finite value.
      rows_skipped: `()` int32, bad rows of batches, left out.
      key: key data; None if nothing is drawn from it.
    """

    step: jax.Array
    information: Any
    prior_precision: Any
    prior_mean: PyTree | None
    momentum: PyTree
    num_skipped: jax.Array
    rows_skipped: jax.Array
    key: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """The choices of `variational` that an update reads."""

    estimator: estimators.Estimator | None
    num_samples: int
    num_observations: Any
    b1: Any
    b2: Any
    bad_rows: str

    @property
    def structure(self) -> structures.Structure:
        own = self.estimator
        return structures.diagonal() if own is None else own.structure

    @property
    def indefinite(self) -> bool:
        """Whether what is measured may leave the cone of positive matrices."""
        return self.estimator is None or self.estimator.not_a_curvature is not None


class _Given(NamedTuple):
    """What an update is given, beside the state."""

    gradients: PyTree  # at the draws
    params: PyTree
    drawn: PyTree  # as the gradients are
    model: PyTree | None  # the whole trees drawn
    batch: Any
    key: jax.Array | None


def variational(
    learning_rate: optax.ScalarOrSchedule,
    estimator: estimators.Estimator | None = None,
    num_samples: int = 1,
    *,
    num_observations: Any,
    information: Any,
    prior_precision: Any = 1.0,
    prior_mean: PyTree | None = None,
    b1: Any = 0.9,
    b2: Any = 0.999,
    key: Any = None,
    bad_rows: str = "raise",
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a Gaussian over the weights, `N(m, I^-1)`, by natural gradients.

    .. math:: \min_{m, I}\; N\, \mathrm{E}_q[\bar\ell(\theta)]
       + \mathrm{KL}\big(q \,\|\, \mathcal N(m_0, P^{-1})\big),
       \qquad q = \mathcal N(m, I^{-1})

    with the mean loss of an observation. The parameters of the Optax loop are the mean
    m. Weights are drawn from q, the gradient is taken there, and the update is told
    where: with rates :math:`\rho = 1 - b_2` and :math:`\eta`,

    .. math:: I \leftarrow I + \rho D, \quad D = N \bar F(\theta) + P - I, \qquad
       m \leftarrow m - \eta\, I^{-1} \big(N \hat g + P (m - m_0)\big)

    where g is averaged as Adam's momentum. What F is decides the method:

    - an estimator that is positive (`ff.estimators.exact`, `empirical`, `monte_carlo`,
      the Hutchinson family): VOGN, in any structure;
    - `ff.estimators.observed`, the Hessian: VON (scalar, diagonal, block, full);
    - None: Stein's identity, :math:`\bar F = \bar g\,(\theta - m)\, I` of the diagonal,
      from the gradient at hand: no batch, no pass of the model, the cost of Adam and a
      draw.

    The last two can be negative, and move the precision along the second-order
    retraction, which keeps it positive whatever the rate and the draw:

    .. math:: I \leftarrow I + \rho D + \tfrac{\rho^2}{2} D I^{-1} D
       = \tfrac12 \big(I + (I + \rho D) I^{-1} (I + \rho D)\big)

    At rest `I = P + N E_q[F]` and `P (m - m_0) = -N E_q[g]`, on average over draws:
    with the Hessian or Stein's identity the optimum of the bound, but for the noise of
    draws times the rates; with a Fisher information that of a generalised linear model
    with its canonical link, and elsewhere VOGN's fixed point, near it.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule; 1 is a Newton step of the
        whole data set.
      estimator: from `ff.estimators`, with its model and structure; or None.
      num_samples: S, draws an update; `drawn` and the gradients have leaves `(S, ...)`
        if there are several, and are like the parameters if there is one.
      num_observations: N, the rows of the data set. `N / T` is the temperature T.
      information: where the precision starts, P aside: an information of the N rows at
        the starting parameters, such as `ff.accumulate(estimator, params, batches)`
        (an `Accumulation` is taken as its information); or a number times the identity,
        such as N / 10, of a network that is not trained yet, whose own information
        leaves many weights wide. Little of it means draws of which nothing is learnt.
      prior_precision: P: a positive number, a pytree prefix of numbers, or an
        information.
      prior_mean: :math:`m_0`, like the parameters; None: zero.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the precision's, in [0, 1).
      key: an int or a key, for an estimator that draws; others leave it alone.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`.

    Returns:
      A transformation whose update is `update(gradients, state, params, *, drawn,
      batch=None, key=None)`: gradients of the mean loss on the batch at the draws,
      `drawn = ff.sample(ff.transforms.get_posterior(state, params), key)`. An update
      with a non-finite value returns zeros, keeps the state, and is counted in
      `num_skipped`. Cost of a step: the estimator's passes at each draw, and one solve.
      Memory: the precision, the momentum, the prior.

    Raises:
      ValueError: when built, for options out of range and an estimator of squared mean
        gradients; at init, for parameters that are not real, a start or a prior that
        the structure cannot hold; at update, for missing draws, parameters, batch or
        key, and trees that differ.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.bernoulli()
      >>> x = jax.random.normal(jax.random.key(0), (60, 2))
      >>> batch = x, (x[:, 0] > 0.5).astype(float)
      >>> params, loss = jnp.zeros(2), ff.negative_log_likelihood(*model)
      >>> estimator = ff.estimators.exact(*model, ff.structures.full())
      >>> optimizer = ff.transforms.variational(
      ...     0.2, estimator, num_observations=60, information=estimator(params, batch)
      ... )
      >>> def step(carry, key):
      ...     params, state = carry
      ...     drawn = ff.sample(ff.transforms.get_posterior(state, params), key)
      ...     gradients = jax.grad(loss)(drawn, batch)
      ...     updates, state = optimizer.update(
      ...         gradients, state, params, drawn=drawn, batch=batch
      ...     )
      ...     return (optax.apply_updates(params, updates), state), None
      >>> start = params, optimizer.init(params)
      >>> (params, state), _ = jax.lax.scan(
      ...     step, start, jax.random.split(jax.random.key(1), 200)
      ... )
      >>> posterior = ff.transforms.get_posterior(state, params)
      >>> bool(loss(posterior.mean, batch) < 0.5)
      True

    References:
      Khan, Nielsen, Tangkaratt, Lin, Gal, Srivastava, "Fast and scalable Bayesian deep
      learning by weight-perturbation in Adam", 2018 (VON and VOGN).
      Lin, Schmidt, Khan, "Handling the positive-definite constraint in the Bayesian
      learning rule", 2020 (the retraction).
      Shen, Daheim, Cong, Nickl, Marconi, Bazan, Yokota, Gurevych, Cremers, Khan,
      Moellenhoff, "Variational learning is effective for large deep networks", 2024.
    """
    _check(estimator, num_observations, b1, b2, bad_rows)
    try:
        checks.whole(num_samples, "num_samples", of="draws")
    except ValueError as error:
        raise ValueError(f"{error} Or {_STATIC}") from error
    recipe = _Recipe(estimator, num_samples, num_observations, b1, b2, bad_rows)
    recipe = choices.shared(recipe)
    start = information, prior_precision, prior_mean, keys.key_data(key)
    made = optax.GradientTransformationExtraArgs(
        functools.partial(_init, recipe, start), functools.partial(_update, recipe)
    )
    return Descent(learning_rate, 0.0, None).after(made)


def get_posterior(opt_state: Any, params: PyTree) -> posteriors.Posterior:
    """The Gaussian that `ff.transforms.variational` trains, as a state.

    Args:
      opt_state: that of any chain or wrapper of Optax that holds one `variational`.
      params: the parameters of the loop, its mean.

    Returns:
      A `Posterior`, for `ff.sample`, `ff.predict`, `ff.confidence_interval` and all
      else that takes a state. Within `optax.masked` or `optax.partition` it is about
      the parameters that were shown. Cost: none.

    Raises:
      ValueError: where there is no `variational`, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> optimizer = ff.transforms.variational(
      ...     0.1, num_observations=100, information=99.0
      ... )
      >>> params = jnp.ones(2)
      >>> posterior = ff.transforms.get_posterior(optimizer.init(params), params)
      >>> ff.standard_error(posterior)
      Array([0.1, 0.1], dtype=float32)
    """
    state = states.only_state(opt_state, VariationalState, "ff.transforms.variational")
    return posteriors.Posterior(
        mean=_shown(params, state.momentum),
        information=state.information,
        temperature=jnp.ones((), trees.float_dtype(state.momentum)),
        prior_precision=state.prior_precision,
    )


def _check(
    estimator: Any, num_observations: Any, b1: Any, b2: Any, bad_rows: str
) -> None:
    if estimator is not None:
        rules.check_estimator(estimator)
        if estimator.from_gradient is not None:
            raise ValueError(
                f"estimators.{estimator.name} squares mean gradients, which are no "
                "curvature: give the estimator None, for Stein's identity, which needs "
                "no pass of the model either."
            )
    checks.positive(num_observations, "num_observations")
    checks.decay(b1, "b1", one=False)
    checks.decay(b2, "b2", one=False)
    rules.check_option(bad_rows)


# ---- the state


def _init(recipe: _Recipe, start: tuple, params: PyTree) -> VariationalState:
    information, prior_precision, prior_mean, key = start
    if recipe.estimator is not None:
        name = f"estimators.{recipe.estimator.name}"
        rules.check_key(name, recipe.estimator.random, key)
    rules.check_real(params)
    like = jax.tree.map(jnp.zeros_like, params)  # params may be shapes
    if jax.tree.leaves(like):
        prior_mean = _anchor(prior_mean, like)
        about = _start(recipe.structure, gathered(information), like)
        believed = posteriors.posterior(like, about, prior_precision=prior_precision)
        about, precision = believed.information, believed.prior_precision
    else:  # as optax.tree.map_params has it, to see what is like the parameters
        about, precision = recipe.structure.empty(like), prior_precision
        prior_mean = None if prior_mean is None else like
        if not ops.is_information(precision):
            number = trees.is_leaf(precision)
            precision = (
                structures.Scalar(jnp.zeros(()))
                if number
                else structures.Diagonal(like)
            )
    if recipe.estimator is None and not ops.facts(about).elementwise:
        raise ValueError(
            "without an estimator the precision is diagonal, and the prior_precision "
            "is a number, a pytree prefix of numbers or a diagonal information."
        )
    count = jnp.zeros((), jnp.int32)
    state = VariationalState(
        step=count,
        information=about,
        prior_precision=precision,
        prior_mean=prior_mean,
        momentum=trees.widen(like),
        num_skipped=count,
        rows_skipped=count,
        key=key,
    )
    return states.settled(state)


def _anchor(prior_mean: PyTree | None, like: PyTree) -> PyTree | None:
    if prior_mean is None:
        return None
    prior_mean = _shown(trees.real_arrays(prior_mean, "prior_mean"), like)
    trees.check_shapes(prior_mean, like, "prior_mean must be like the parameters")
    return trees.widen(prior_mean)


def _shown(whole: PyTree, params: PyTree) -> PyTree:
    """What the parameters show of a tree, which wrappers of Optax give them alone."""
    if not trees.has_holes(params) or trees.has_holes(whole):
        return whole
    return trees.punch(whole, params)


def _start(structure: structures.Structure, information: Any, like: PyTree) -> Any:
    """What the precision starts from, in the structure."""
    nothing = structure.empty(like)
    if not ops.is_information(information):
        checks.positive(information, "information, where it is a number,")
        if jnp.shape(information) != ():
            raise ValueError(
                "information is one of this library, of the num_observations rows, or "
                f"a number; got {checks.described(information)}."
            )
        return structure.isotropic(like, information)
    if trees.has_holes(like) and not trees.has_holes(ops.diagonal(information, like)):
        information = structure.restrict(information, like)
    total = ops.add(nothing, information)
    if type(total) is not type(nothing):
        raise ValueError(
            f"information is a {type(information).__name__}, which the structure "
            f"{structure.name} cannot hold: give one of its own, such as "
            "estimator(params, batch)."
        )
    return total


# ---- the step


def _update(
    recipe: _Recipe,
    updates: PyTree,
    state: VariationalState,
    params: PyTree | None = None,
    *,
    drawn: PyTree | None = None,
    batch: Any = None,
    key: Any = None,
    **extra: Any,
) -> tuple[PyTree, VariationalState]:
    del extra
    if params is None or drawn is None:
        raise ValueError(
            "ff.transforms.variational needs the parameters and where the gradients "
            "were taken: drawn = ff.sample(ff.transforms.get_posterior(state, params), "
            "key), and update(gradients, state, params, drawn=drawn)."
        )
    rules.check_same(
        params,
        state.momentum,
        "the state was initialised with another tree than params",
    )
    shown = _shown(drawn, params)
    many = () if recipe.num_samples == 1 else (recipe.num_samples,)
    expected = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*many, *x.shape), x.dtype), params
    )
    axis = f", with a leading axis of num_samples={many[0]}" if many else ""
    rules.check_same(shown, expected, f"drawn must be like params{axis}")
    rules.check_same(updates, shown, "gradients are taken at the draws, one tree")
    model, rows = None, None
    if recipe.estimator is not None:
        model, key = rules.needs_of_model(
            recipe.estimator, drawn, batch, key, state.key
        )
        rows = batches.as_batch(batch, values=False)
    given = _Given(updates, params, shown, model, rows, key)

    def run(state: VariationalState, given: _Given) -> Any:
        if given.batch is None:
            return choices.run(recipe, _advance, state, given)
        assert recipe.estimator is not None
        return recipe.estimator.deciding(
            lambda: choices.run(recipe, _advance, state, given),
            lambda: (_first(recipe, given.model), given.batch.inputs),
        )

    result, after = sharding.in_auto_mode(run, (params, state), state, given)
    counts = after.rows_skipped, state.rows_skipped
    if recipe.bad_rows == "raise" and recipe.estimator is not None and rows is not None:
        refused = after.num_skipped != state.num_skipped
        if not checks.is_traced((counts, rows)) and (counts[0] != counts[1] or refused):
            model = _first(recipe, model)
            recipe.estimator.screen(model, rows).refuse(batch)
    return result, after


def _first(recipe: _Recipe, drawn: PyTree) -> PyTree:
    if recipe.num_samples == 1:
        return drawn
    return jax.tree.map(lambda x: x[0], drawn)


def _advance(
    recipe: _Recipe, state: VariationalState, given: _Given
) -> tuple[PyTree, VariationalState]:
    dtype = trees.float_dtype(state.momentum)
    count = jnp.asarray(recipe.num_observations, dtype)
    b1, b2 = jnp.asarray(recipe.b1, dtype), jnp.asarray(recipe.b2, dtype)
    skipped, seen = state.rows_skipped, jnp.array(True)
    if recipe.estimator is None:
        measured = _stein(recipe, state, given, count)
    else:
        screen = recipe.estimator.screen(_first(recipe, given.model), given.batch)
        batch, bad = screen(given.batch)
        skipped = skipped + bad
        weight = batches.num_observations(batch, each_target=False).astype(dtype)
        seen = weight > 0  # a batch without an observation says nothing
        factor = count / jnp.where(seen, weight, 1)
        measured = _measured(recipe, given._replace(batch=batch), state.step, factor)
    information = _moved(recipe, state, measured, 1 - b2)
    information = trees.where(seen, information, state.information)
    gradient = trees.widen(given.gradients)
    if recipe.num_samples > 1:
        gradient = jax.tree.map(lambda x: jnp.mean(x, 0), gradient)
    momentum = jax.tree.map(
        lambda old, new: b1 * old + (1 - b1) * new.astype(dtype),
        state.momentum,
        gradient,
    )
    debiased = count / (1 - b1 ** (state.step + 1).astype(dtype))
    away = trees.widen(given.params)
    if state.prior_mean is not None:
        away = jax.tree.map(jnp.subtract, away, state.prior_mean)
    pull = jax.tree.map(
        lambda g, p: debiased * g + p,
        momentum,
        ops.matvec(state.prior_precision, away),
    )
    step = optax.tree.cast_like(ops.solve(information, pull), given.params)
    sound = trees.all_finite((given.gradients, given.drawn, step, information))
    after = state._replace(information=information, momentum=momentum)
    after = trees.where(sound, after, state)._replace(
        step=state.step + sound.astype(jnp.int32),
        num_skipped=state.num_skipped + (~sound).astype(jnp.int32),
        rows_skipped=skipped,
    )
    return trees.zero_unless(sound, step), after


def _stein(
    recipe: _Recipe, state: VariationalState, given: _Given, count: jax.Array
) -> structures.Diagonal:
    """The Hessian's diagonal by parts: the draws' offsets times their gradients."""
    precision = ops.diagonal(state.information, given.params)

    def leaf(entry: jax.Array, g: jax.Array, x: jax.Array, m: jax.Array) -> jax.Array:
        product = g.astype(entry.dtype) * (
            x.astype(entry.dtype) - m.astype(entry.dtype)
        )
        if recipe.num_samples > 1:
            product = jnp.mean(product, 0)
        return count * entry * product

    entries = jax.tree.map(leaf, precision, given.gradients, given.drawn, given.params)
    return structures.Diagonal(entries)


def _measured(
    recipe: _Recipe, given: _Given, step: jax.Array, factor: jax.Array
) -> Any:
    """A factor times the estimator's information of the batch, averaged over draws."""
    estimator = recipe.estimator
    assert estimator is not None
    key = given.key
    if key is not None:
        key = jax.random.fold_in(keys.typed_key(key), step)

    def at(model: PyTree, key: jax.Array | None) -> Any:
        found = estimator.compute(model, given.batch, key)
        if not trees.has_holes(given.params):
            return found
        return estimator.structure.restrict(found, given.params, model)

    if recipe.num_samples == 1:
        return ops.scale(at(given.model, key), factor)
    many = None if key is None else jax.random.split(key, recipe.num_samples)
    each = jax.lax.map(lambda drawn: at(*drawn), (given.model, many))
    weights = jnp.full((recipe.num_samples,), factor / recipe.num_samples)
    return ops.total(each, weights)


def _moved(
    recipe: _Recipe, state: VariationalState, measured: Any, rate: jax.Array
) -> Any:
    """The precision after a step of a rate towards what was measured, and the prior."""
    old = state.information
    target = ops.add(measured, state.prior_precision)
    moved = ops.add(ops.scale(target, rate), ops.scale(old, 1 - rate))
    if not recipe.indefinite:
        return ops.conform(old, moved)
    if ops.facts(old).elementwise:
        return jax.tree.map(lambda i, m: 0.5 * (i + m * (m / i)), old, moved)
    # of full and block: the columns of a root of I^-1, times I + rate D, and squared
    white, like = ops.whitener(old), jax.eval_shape(ops.diagonal, old)
    units = trees.unravel(jnp.eye(trees.size(like), dtype=rate.dtype), like)
    units = jax.vmap(white.laid_out)(units)
    columns = jax.vmap(lambda unit: ops.matvec(moved, white.color(unit)))(units)
    return ops.scale(ops.add(old, recipe.structure.reduce(columns)), 0.5)
