"""The optimisers that are compared, and how each is run: a few steps at a time."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from optimizer_problems import Problem

import fisherflow_jax as ff

ADAM, SGD, DIAGONAL = "optax.adam", "SGD, momentum", "ff diagonal"
KFAC, EKFAC, KFAC_JAX = "ff.kfac", "ff.kfac, EK-FAC", "kfac-jax"
ADAMW, MUON = "optax.adamw", "optax muon"
SHAMPOO, SOAP = "ff.shampoo", "ff.soap"
FIRST_ORDER = ADAM, SGD

DECAY, MOMENTUM = 0.95, 0.9
MAX_KL = inspect.signature(ff.kfac).parameters["max_kl"].default
PERIOD, INVERSE_PERIOD = 2, 10


class Setting(NamedTuple):
    """A point of the grid."""

    learning_rate: float
    damping: float


class Run(Protocol):
    """One optimiser on one problem; what is carried is its own affair."""

    def start(self, setting: Setting, params: Any = None) -> Any:
        """Before the first step, from the problem's parameters or from others."""

    def advance(self, carry: Any, setting: Setting, batches: Any) -> Any:
        """After a step for each of the stacked batches."""

    def params(self, carry: Any) -> Any:
        """The parameters that the model takes."""

    def num_bytes(self) -> int:
        """What the state takes beside the parameters."""


# (problem, layers, learning rate, damping) -> optimiser
Make = Callable[[Problem, Any, Any, Any], optax.GradientTransformation]


def adam(problem, layers, learning_rate, damping):
    del problem, layers
    return optax.adam(learning_rate, b1=MOMENTUM, eps=damping**2)


def sgd(problem, layers, learning_rate, damping):
    """The second axis of the grid, 1e-4 to 1e-2, is read as 0.98 to 0.8."""
    del problem, layers
    return optax.sgd(learning_rate, momentum=1 - 2 * damping**0.5)


def diagonal(problem, layers, learning_rate, damping):
    del layers
    model = problem.apply_fn, problem.likelihood
    estimator = ff.estimators.monte_carlo(*model, ff.structures.diagonal(), groups=16)
    return optax.chain(
        ff.natural_gradient(
            learning_rate,
            estimator,
            memory=ff.memories.exponential(DECAY),
            damping=damping,
            momentum=MOMENTUM,
            period=PERIOD,
            key=0,
        ),
        ff.clip_by_kl(*model, MAX_KL),
    )


def kfac(
    problem, layers, learning_rate, damping, *, period=PERIOD, max_kl=MAX_KL, **options
):
    return ff.kfac(
        learning_rate,
        problem.apply_fn,
        problem.likelihood,
        layers,
        damping=damping,
        decay=DECAY,
        momentum=MOMENTUM,
        max_kl=max_kl,
        key=0,
        **({"period": period, "inverse_period": INVERSE_PERIOD} | options),
    )


def ekfac(problem, layers, learning_rate, damping, **options):
    return kfac(
        problem, layers, learning_rate, damping, eigenvalue_correction=True, **options
    )


def adamw(problem, layers, learning_rate, damping):
    """Without decay, so that it is Adam by another name, and its step can be timed."""
    del problem, layers
    return optax.adamw(learning_rate, b1=MOMENTUM, eps=damping**2, weight_decay=0.0)


def muon(problem, layers, learning_rate, damping):
    """The second axis as SGD reads it; arrays without two axes get Adam."""
    del problem, layers
    beta = 1 - 2 * damping**0.5
    return optax.contrib.muon(learning_rate, beta=beta, adam_b1=MOMENTUM)


def shampoo(problem, layers, learning_rate, damping, **options):
    """Its damping, a share of the mean eigenvalue, is the square of the grid's."""
    del problem, layers
    options = {"graft": "adam", "b1": MOMENTUM, "b2": DECAY} | options
    return ff.shampoo(learning_rate, damping=damping**2, **options)


def soap(problem, layers, learning_rate, damping, **options):
    """Reads the second axis as Adam does."""
    del problem, layers
    options = {"b1": MOMENTUM, "b2": DECAY} | options
    return ff.soap(learning_rate, eps=damping**2, **options)


METHODS: dict[str, Make] = {
    ADAM: adam,
    SGD: sgd,
    DIAGONAL: diagonal,
    KFAC: kfac,
    EKFAC: ekfac,
}


class OptaxRun:
    """Steps of an Optax optimiser, scanned in one compiled function.

    Learning rate and damping are its arguments, so that a grid compiles once.
    """

    def __init__(self, problem: Problem, make: Make) -> None:
        self._problem = problem
        loss = ff.negative_log_likelihood(problem.apply_fn, problem.likelihood)
        layers = ff.layers.find_layers(
            problem.apply_fn, problem.params, problem.data[0][:2]
        )

        def optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
            made = make(problem, layers, setting.learning_rate, setting.damping)
            return optax.with_extra_args_support(made)

        @jax.jit
        def start(setting: Setting, params: Any) -> Any:
            return optimizer(setting).init(params)

        def step(setting: Setting, carry: Any, batch: Any) -> Any:
            params, state = carry
            gradients = jax.grad(loss)(params, batch)
            updates, state = optimizer(setting).update(
                gradients, state, params, batch=batch
            )
            return optax.apply_updates(params, updates), state

        @jax.jit
        def advance(carry: Any, setting: Setting, batches: Any) -> Any:
            return jax.lax.scan(
                lambda c, b: (step(setting, c, b), None), carry, batches
            )[0]

        self._start, self._advance = start, advance
        self.step = jax.jit(step, donate_argnums=1)

    def start(self, setting: Setting, params: Any = None) -> Any:
        # copied, for a step donates what it is given
        params = self._problem.params if params is None else params
        params = jax.tree.map(jnp.copy, params)
        return params, self._start(_as_arrays(setting), params)

    def advance(self, carry: Any, setting: Setting, batches: Any) -> Any:
        return self._advance(carry, _as_arrays(setting), batches)

    def params(self, carry: Any) -> Any:
        return carry[0]

    def num_bytes(self) -> int:
        shapes = jax.eval_shape(self._start, Setting(0.1, 0.1), self._problem.params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def _as_arrays(setting: Setting) -> Setting:
    return Setting(*(jnp.asarray(value, jnp.float32) for value in setting))
