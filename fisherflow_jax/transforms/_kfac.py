"""K-FAC with its defaults: layers found, steps bounded, one program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from fisherflow_jax import estimators, likelihoods, memories, structures
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, choices, keys, sharding, trees
from fisherflow_jax.layers import Layers, find_layers
from fisherflow_jax.model import once
from fisherflow_jax.transforms import _clip_by_kl as trust
from fisherflow_jax.transforms._descent import Descent
from fisherflow_jax.transforms._scale_by_fisher import IDENTITY, transformation
from fisherflow_jax.transforms.preconditioner import checks as rules
from fisherflow_jax.transforms.preconditioner import factorise as factorisations
from fisherflow_jax.transforms.preconditioner import step as steps
from fisherflow_jax.transforms.preconditioner.state import Damping, Recipe

PyTree = Any


@checks.called_as(
    "kfac(learning_rate, apply_fn, likelihood, inputs=inputs, key=key): "
    "learning_rate comes first"
)
def kfac(
    learning_rate: optax.ScalarOrSchedule,
    apply_fn: Callable,
    likelihood: likelihoods.Likelihood,
    layers: Layers | None = None,
    *,
    inputs: PyTree = None,
    estimator: Any = estimators.monte_carlo,
    damping: Damping = 1e-3,
    decay: float = 0.95,
    momentum: float | None = 0.9,
    max_kl: float | None = 0.1,
    period: int | None = None,
    inverse_period: int | None = None,
    spread_inverses: bool = False,
    eigenvalue_correction: bool = False,
    widest: int | None = None,
    store: Any = None,
    weight_decay: float = 0.0,
    mask: Any = None,
    factorise: Callable[..., Any] | None = None,
    key: Any = None,
    bad_rows: str = "raise",
    factor_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Natural gradient descent with Kronecker-factored curvature.

    .. math:: \theta_t = \theta_{t-1} - \eta\, m_t, \qquad
       m_t = \mu\, m_{t-1}
       + \bigl(A_t + \pi \sqrt\lambda\bigr)^{-1} g_t
         \bigl(G_t + \sqrt\lambda / \pi\bigr)^{-1}

    with the factors A and G of each linear layer averaged over about `1 / (1 - decay)`
    batches: `ff.natural_gradient` with the structure `kronecker(layers)`. A step is
    shortened as by `ff.clip_by_kl` where it would change the predictions by more than
    `max_kl`, and m with it, so that momentum remembers steps as they were taken.

    Args:
      learning_rate: a number or a schedule.
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`; the gradients are those of
        `ff.negative_log_likelihood(apply_fn, likelihood)`.
      layers: `ff.layers.find_layers(apply_fn, params, inputs)`, computed once; print it
        to see how each parameter is treated. None: found by `init` for `inputs`, and
        kept in the state.
      inputs: in place of a table: inputs like those of the batches, or their shapes.
      estimator: from `ff.estimators`, without a model, such as `ff.estimators.exact` or
        `ff.estimators.monte_carlo(groups=8)`; sampled labels by default, which need a
        key.
      damping: as in `ff.scale_by_fisher`.
      decay: of the factors' moving average, a batch.
      momentum: of the multiplied gradients; None: none.
      max_kl: the largest mean divergence of the predictions that one step may make
        (nats an example, on its batch); None: no bound, with which a learning rate of
        0.1 and little damping can diverge.
      period: steps between two curvatures; None: 1.
      inverse_period: steps between two renewals of inverses or eigenbases; None: 10.
      spread_inverses: renews layers by turns, each once in `inverse_period` steps.
      eigenvalue_correction: EK-FAC: in the factors' eigenbasis the exact second
        moments take the place of the product of eigenvalues, and damping is exact.
      widest: as in `ff.structures.kronecker`: sides of more than so many units keep the
        diagonal of their factor. None: its default.
      store: type in which inverses are kept, such as "bfloat16"; None: that of the
        factors, float32 or wider, which are not narrowed. With a type factors are kept
        as one triangle each, half their bytes and equal to the last bit;
        `ff.get_information` gives them whole.
      weight_decay: as in `ff.natural_gradient`.
      mask: which parameters decay, as there.
      factorise: as in `ff.scale_by_fisher`; None: `ff.transforms.factored_damping`, or
        with a correction `ff.transforms.factorise`, whose damping is exact in the
        eigenbasis.
      key: an int or a key, for an estimator (or a likelihood's root) that draws; others
        leave it alone. An update's own key takes its place.
      bad_rows: "raise" or "drop", as in `ff.scale_by_fisher`.
      factor_sharding: where factors, inverses and bases lie on a mesh, and among whom
        the work on them is divided, such as "data"; as in `ff.scale_by_fisher`.

    Returns:
      A transformation whose update is `update(updates, state, params, *, batch,
      key=None, model_params=None, curvature=None)`, as of `ff.scale_by_fisher`. With
      a bound the last part of its state is a `ClipByKLState`. Cost of a step: a
      gradient, the estimator's passes, and the products with the inverses; every
      `inverse_period` steps the inverses, I^3 + O^3 a layer; with a bound, a tangent
      pass of the batch (two forward passes of a model with a `jax.custom_vjp`).

    Raises:
      ValueError: as `ff.scale_by_fisher`; for layers of another model, for an estimator
        that has another model, and with neither or both of layers and inputs. Without
        a table, options are checked by `init`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import fisherflow_jax as ff
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["w"]) @ params["v"]
      >>> likelihood = ff.likelihoods.categorical()
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> batch = x, jnp.argmax(x[:, :3], axis=1)
      >>> keys = jax.random.split(jax.random.key(1))
      >>> params = {
      ...     "w": jax.random.normal(keys[0], (4, 8)) / 2,
      ...     "v": jax.random.normal(keys[1], (8, 3)) / 3,
      ... }
      >>> optimizer = ff.kfac(0.3, apply_fn, likelihood, inputs=x, key=2)
      >>> loss = ff.negative_log_likelihood(apply_fn, likelihood)
      >>> @jax.jit
      ... def step(params, state):
      ...     gradients = jax.grad(loss)(params, batch)
      ...     updates, state = optimizer.update(gradients, state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), state
      >>> state = optimizer.init(params)
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> bool(loss(params, batch) < 0.1)
      True

    References:
      Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate
      curvature", 2015.
      Schulman, Levine, Abbeel, Jordan, Moritz, "Trust region policy optimization",
      2015.
      George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient
      descent in a Kronecker-factored eigenbasis", 2018.
    """
    if (layers is None) == (inputs is None):
        raise ValueError(
            "give ff.kfac the layers that ff.layers.find_layers(apply_fn, params, "
            "inputs) returns, or inputs=, of which shapes suffice, to have them found "
            f"by init; got {'neither' if layers is None else 'both'}."
        )
    key = keys.key_data(key)  # which is kept, and `init` may be traced
    region = None if max_kl is None else trust.region(apply_fn, likelihood, max_kl)
    descent = Descent(learning_rate, weight_decay, mask, momentum)
    if factorise is None:
        exact = eigenvalue_correction
        factorise = (
            factorisations.factorise if exact else factorisations.factored_damping
        )
    if checks.floating(store, "store") is not None:
        if eigenvalue_correction:
            raise ValueError(
                "store is for inverses, and eigenvalue_correction=True keeps bases in "
                f"which factors are summed up: they are not narrowed; got {store!r}."
            )
        factorise = factorisations.Narrowed(factorise, checks.floating(store, "store"))
    options = {
        "memory": memories.exponential(decay),
        "damping": damping,
        "period": 1 if period is None else period,
        "inverse_period": 10 if inverse_period is None else inverse_period,
        "staggered": spread_inverses,
        "corrected": eigenvalue_correction,
        "packed": store is not None,
        "momentum": IDENTITY,
        "power": -1,
        "root_damping": 0.0,
        "factorise": factorise,
        "bad_rows": bad_rows,
        "factor_sharding": factor_sharding,
    }

    width: dict[str, Any] = {} if widest is None else {"widest": widest}

    def with_layers(layers: Layers) -> optax.GradientTransformationExtraArgs:
        structure = structures.kronecker(layers, **width)
        own = estimators.bind(estimator, apply_fn, likelihood, structure)
        fisher = Recipe(estimator=own, **options)
        draws = own.random or (region is not None and region.random)
        given = key if draws else None
        if region is None:
            return descent.after(transformation(fisher, given))
        return _bounded(_Bounded(fisher, descent, region), given)

    if layers is None:
        return _found_at_init(with_layers, apply_fn, inputs)
    return with_layers(layers)


# ---- within a trust region


@dataclasses.dataclass(frozen=True)
class _Bounded:
    """A descent and the region that its steps stay in, one program."""

    fisher: Recipe
    descent: Descent
    region: trust.Region


def _bounded(recipe: _Bounded, key: Any) -> optax.GradientTransformationExtraArgs:
    recipe, region = choices.shared(recipe), recipe.region
    start = recipe.descent.after(transformation(recipe.fisher, key)).init

    def init(params: PyTree) -> tuple:
        rules.check_key(f"the root of {region.likelihood.name}", region.random, key)
        return (*start(params), trust.begin(params))

    update = functools.partial(_update, recipe)
    return optax.GradientTransformationExtraArgs(init, update)


def _update(
    recipe: _Bounded,
    updates: PyTree,
    state: tuple,
    params: PyTree | None = None,
    *,
    batch: Any = None,
    key: Any = None,
    model_params: PyTree | None = None,
    curvature: Any = None,
    adapts_damping: Any = None,
    **extra: Any,
) -> tuple[PyTree, tuple]:
    """A step of the descent, within the region."""
    del extra
    fisher = recipe.fisher
    if adapts_damping is not None:
        rules.check_adapted(fisher, curvature)
    model = params if model_params is None else model_params
    before = state[0]
    model, _ = rules.needs_of_model(fisher.estimator, model, batch, key, before.key)
    rows = batches.as_batch(batch, values=False)
    arguments = updates, state, params, model, rows, keys.key_data(key)
    result, after = choices.run(recipe, _step, *arguments, curvature)
    steps.refuse_bad_rows(fisher, (before, after[0]), model, batch)
    return result, after


def _step(
    recipe: _Bounded,
    updates: PyTree,
    state: tuple,
    params: PyTree | None,
    model: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
    curvature: Any,
) -> tuple[PyTree, tuple]:
    before, *stages, measured = state
    apply_fn = once(recipe.region.apply_fn)
    fisher = steps.traced_once(recipe.fisher, apply_fn)
    steps.check_trees(fisher, updates, before, params)
    # among explicit axes the model runs, if only for shapes, within each part alone
    apart, count = sharding.has_explicit_axes(), None
    if not apart:
        batch, count = fisher.estimator.screen(model, batch)(batch)
    given = {"batch": batch, "key": key, "model_params": model}
    given |= {"screened": count, "curvature": curvature}
    scaled, after = steps.update(fisher, updates, before, params, **given)
    follow = optax.chain(*recipe.descent.stages()).update
    moved, stages = follow(scaled, tuple(stages), params)
    region = dataclasses.replace(recipe.region, apply_fn=apply_fn, screens=apart)
    root_key = None
    if region.random:
        root_key = keys.typed_key(before.key if key is None else key)
        root_key = jax.random.fold_in(jax.random.fold_in(root_key, before.step), 1)
    inertia = [node for node in stages if isinstance(node, optax.TraceState)]
    (moved, inertia), measured = trust.shorten(
        region, moved, inertia, measured, model, batch, root_key
    )
    return moved, (after, *inertia, *stages[len(inertia) :], measured)


# ---- layers that are found by `init`


def _found_at_init(
    make: Callable[[Layers], optax.GradientTransformationExtraArgs],
    apply_fn: Callable,
    inputs: PyTree,
) -> optax.GradientTransformationExtraArgs:
    """The table is in the state, where an update finds it."""
    inputs = jax.tree.map(trees.shape_of, inputs)
    make = functools.lru_cache(maxsize=8)(make)
    latest: list[Layers] = []  # for optax.tree.map_params, whose tree has no leaves

    def table(params: PyTree) -> Layers:
        if trees.has_holes(params):
            raise ValueError(
                "the parameters have holes, which optax.masked and optax.partition "
                "make, and the layers are those of the whole model: give ff.kfac "
                "layers=ff.layers.find_layers(apply_fn, params, inputs)."
            )
        if not jax.tree.leaves(params) and latest:
            return latest[0]
        if sharding.has_explicit_axes():  # which layers there are is for no mesh to say
            params = jax.tree.map(trees.shape_of, params)
        latest[:] = [find_layers(apply_fn, params, inputs)]
        return latest[0]

    def init(params: PyTree) -> Any:
        return make(table(params)).init(params)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        nodes = jax.tree.leaves(state, is_leaf=_is_table)
        layers = next((node for node in nodes if _is_table(node)), None)
        if layers is None:
            raise ValueError("this state has no layers: it is of another optimiser.")
        return make(layers).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_table(node: Any) -> bool:
    return isinstance(node, Layers)
