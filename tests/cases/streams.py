"""A small stream, cached flows over it, and in numpy what they must believe."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import fisherflow_jax as ff

SCALE = 0.5
PRECISION = 0.3  # of the prior, times the identity
ORIGIN = np.array([0.5, -1.0, 2.0])  # the prior mean; the search starts at zero
DECAY = 0.8
WINDOW = 3

_rng = np.random.default_rng(11)
INPUTS = _rng.normal(size=(24, 3)) @ np.array([[1, 0.6, 0], [0, 1, 0.4], [0, 0, 2]])
TARGETS = INPUTS @ np.array([1.0, -0.5, 0.3]) + SCALE * _rng.normal(size=24)
LABELS = (_rng.uniform(size=24) < 1 / (1 + np.exp(-INPUTS[:, 0]))).astype(float)
COUNTS = _rng.poisson(np.exp(0.4 * INPUTS[:, 0])).astype(float)
WEIGHTS = np.array([1, 2, 1, 3, 0, 1, 2, 1] * 3, float)

STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "block": ff.structures.block({"level": "one", "slope": "two"}),
    "units": ff.structures.block(),
    "all": ff.structures.block(lambda path: "all"),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(1),
    "rank_3": ff.structures.low_rank(3),
}
MEMORIES = {
    "stationary": ff.memories.stationary(),
    "exponential": ff.memories.exponential(DECAY),
    "unfloored": ff.memories.exponential(DECAY, floor=False),
    "windowed": ff.memories.windowed(WINDOW),
    "random_walk": ff.memories.random_walk(0.1),
    "adaptive": ff.memories.adaptive(1e9, size=4, guard=1),
}
LIKELIHOODS = {
    "gaussian": (ff.likelihoods.gaussian(SCALE), TARGETS),
    "unknown": (ff.likelihoods.gaussian(scale=None), TARGETS),
    "bernoulli": (ff.likelihoods.bernoulli(), LABELS),
    "poisson": (ff.likelihoods.poisson(), COUNTS),
}


def linear(params: Any, inputs: jax.Array) -> jax.Array:
    return inputs[:, 0] * params["level"] + inputs[:, 1:] @ params["slope"]


def tree(flat: Any) -> Any:
    if not isinstance(flat, jax.Array):
        flat = np.asarray(flat)
    return {"level": jnp.array(flat[0]), "slope": jnp.array(flat[1:])}


def flat(params: Any) -> np.ndarray:
    return np.concatenate([np.ravel(params["level"]), np.ravel(params["slope"])])


@jax.jit
def _dense(information: Any) -> jax.Array:
    return ff.information.to_dense(information, tree(ORIGIN))


def dense(information: Any) -> np.ndarray:
    return np.asarray(_dense(information))


@functools.cache
def flow(
    structure: str = "full",
    memory: str = "stationary",
    likelihood: str = "gaussian",
    **options: Any,
) -> ff.FisherFlow:
    """One flow for each choice, so that tests share its compiled update."""
    options = {"prior_precision": PRECISION, "num_steps": 1} | options
    return ff.fisher_flow(
        linear,
        LIKELIHOODS[likelihood][0],
        structure=STRUCTURES[structure],
        memory=MEMORIES[memory],
        **options,
    )


def start(flow: ff.FisherFlow, key: Any = None) -> ff.FlowState:
    return flow.init(tree(np.zeros(3)), tree(ORIGIN), key)


def start_with(prior_precision: Any, *names: str, **options: Any) -> ff.FlowState:
    """The start of `flow(*names)` under another prior: only `init` knows the prior, so
    that the compiled update of that flow will do."""
    build = flow.__wrapped__
    return start(build(*names, prior_precision=prior_precision, **options))


def batches(
    size: int = 4, likelihood: str = "gaussian", weights: Any = WEIGHTS
) -> list:
    targets = LIKELIHOODS[likelihood][1]
    cuts = [slice(i, i + size) for i in range(0, len(targets), size)]
    return [(INPUTS[c], targets[c], weights[c]) for c in cuts]


def run(flow: ff.FisherFlow, state: ff.FlowState, batches: list) -> list:
    """The states after each batch."""
    states = []
    for batch in batches:
        state, info = flow.update(state, batch)
        assert not info.skipped
        states.append(state)
    return states


@functools.cache
def history(
    memory: str = "stationary", likelihood: str = "gaussian", **options: Any
) -> list:
    """The states of a full flow after each batch of the stream."""
    built = flow("full", memory, likelihood, **options)
    return run(built, start(built), batches(4, likelihood))


def memory_weights(memory: str, last: int, time: int) -> tuple[float, np.ndarray]:
    """The prior's weight and those of batches 0..last, believed at update `time`."""
    age = time - np.arange(last + 1)
    if memory == "windowed":
        return 1.0, (age < WINDOW).astype(float)
    if memory in ("exponential", "unfloored"):
        return (1.0 if memory == "exponential" else DECAY ** (time + 1)), DECAY**age
    return 1.0, np.ones(last + 1)


def fit(
    memory: str, last: int, time: int | None = None, scale: float = SCALE
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares on batches 0..last: mean and information."""
    prior, faded = memory_weights(memory, last, last if time is None else time)
    rows = slice(0, 4 * (last + 1))
    weights = WEIGHTS[rows] * np.repeat(faded, 4)
    inputs, targets = INPUTS[rows], TARGETS[rows]
    information = prior * PRECISION * np.eye(3)
    shift = information @ ORIGIN + inputs.T @ (weights * targets) / scale**2
    information = information + (inputs.T * weights) @ inputs / scale**2
    return np.linalg.solve(information, shift), information


def predict(memory: str, time: int, scale: float = SCALE):
    """The belief before the batch of index `time`."""
    return fit(memory, time - 1, time, scale)


def predictive(
    mean: np.ndarray, information: np.ndarray, rows: slice, scale: float = SCALE
) -> float:
    """The log-density of the rows' targets, each as often as its weight says."""
    often = WEIGHTS[rows].astype(int)
    inputs, targets = (np.repeat(x[rows], often, axis=0) for x in (INPUTS, TARGETS))
    spread = inputs @ np.linalg.solve(information, inputs.T)
    covariance = spread + scale**2 * np.eye(len(targets))
    return stats.multivariate_normal.logpdf(targets, inputs @ mean, covariance)
