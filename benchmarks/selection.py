"""Label curves of ways to choose, and optimal designs beside another library's.

    python benchmarks/selection.py [--problems digits shift cancer designs] [--seeds 5]
        [--small]

digits: multinomial regression on 30 principal components (prior 1), a pool of 600, 20
random labels, then 20 a round to 200. shift: 20 components, a pool of 400 with all ten
classes, tested on 3, 8 and 9, of which 60 unlabelled rows are the target. cancer: 30
inputs, a pool of 300, 8 labels, then 4 a round to 60. Every way has the same splits and
starts; a fit is one update of a flow, with weight 0 where there is no label. Printed:
accuracy averaged over the curve after the start, with its standard error over seeds;
accuracy and log-loss at some counts; in how many seeds a level was reached, and with
how many labels in the median.

designs: exact D-optimal designs of a full quadratic in three factors on a grid of 5^3,
by exchange, from greedy choice, and by pyoptex where it is installed; the determinant's
efficiency relative to the approximate optimum, best and worst of the seeds, and the
time of a run after the first.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import describe_machine
from sklearn.datasets import load_breast_cancer, load_digits

import fisherflow_jax as ff

selection = ff.selection
LIKELIHOOD = ff.likelihoods.categorical()


def apply_fn(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


MODEL = apply_fn, LIKELIHOOD
FLOW = ff.fisher_flow(*MODEL, prior_precision=1.0)


class Problem(NamedTuple):
    inputs: np.ndarray
    labels: np.ndarray
    pool: int
    start: int
    batch: int
    rounds: int
    wanted: list[int]  # classes that are tested
    levels: tuple[float, float]


def problem(name: str) -> Problem:
    if name == "cancer":
        data = load_breast_cancer()
        x = (data.data - data.data.mean(0)) / data.data.std(0)
        return Problem(
            x.astype(np.float32), data.target, 300, 8, 4, 14, [0, 1], (0.96, 0.97)
        )
    data = load_digits()
    x = (data.data - data.data.mean(0)) / data.data.std()
    shift = name == "shift"
    axes = np.linalg.svd(x, full_matrices=False)[2][: 20 if shift else 30]
    x = (x @ axes.T).astype(np.float32)
    if shift:
        return Problem(x, data.target, 400, 20, 20, 8, [3, 8, 9], (0.85, 0.9))
    return Problem(x, data.target, 600, 20, 20, 10, list(range(10)), (0.9, 0.95))


class Round(NamedTuple):
    """What a way to choose is given."""

    state: Any
    pool: jax.Array
    labelled: np.ndarray
    target: jax.Array
    rng: np.random.Generator
    batch: int


@functools.partial(jax.jit, static_argnums=3)
def learn(x: jax.Array, y: jax.Array, weights: jax.Array, classes: int) -> Any:
    params = {"w": jnp.zeros((x.shape[1], classes)), "b": jnp.zeros(classes)}
    return FLOW.update(FLOW.init(params), (x, y, weights))[0]


def at_random(given: Round) -> np.ndarray:
    free = np.flatnonzero(~given.labelled)
    return given.rng.choice(free, given.batch, replace=False)


def k_centre(given: Round) -> list[int]:
    x, chosen = np.asarray(given.pool), []
    distance = ((x[:, None] - x[None, given.labelled]) ** 2).sum(-1).min(1)
    for _ in range(given.batch):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(-1))
    return chosen


def top(acquisition: Callable[[Round], Any]) -> Callable[[Round], np.ndarray]:
    """The rows of the largest values."""

    def choose(given: Round) -> np.ndarray:
        values = selection.values(given.state, *MODEL, given.pool, acquisition(given))
        values = np.where(given.labelled, -np.inf, values)
        return np.argsort(-values)[: given.batch]

    return choose


def greedy(structure: str, targeted: bool) -> Callable[[Round], np.ndarray]:
    """With the information in a structure of the choice alone."""

    @functools.cache
    def measures(shapes: tuple) -> tuple[Callable, Callable]:
        params = {k: jnp.zeros(s) for k, s in shapes}
        made = ff.structures.full()
        if structure == "kronecker":
            x = jnp.zeros((1, params["w"].shape[0]))
            layers = ff.layers.find_layers(apply_fn, params, x)
            made = ff.structures.kronecker(layers)
        elif structure == "diagonal":
            made = ff.structures.diagonal()
        estimator = ff.estimators.exact(*MODEL, made)

        @jax.jit
        def believed(params, x, weights):
            information = estimator(params, (x, None, weights))
            return ff.posterior(params, information, prior_precision=1.0)

        return believed, jax.jit(estimator)

    def choose(given: Round) -> np.ndarray:
        params = given.state.mean
        believed, measure = measures(tuple((k, x.shape) for k, x in params.items()))
        weights = jnp.asarray(given.labelled, jnp.float32)
        state = believed(params, given.pool, weights)
        acquisition = selection.information_gain()
        if targeted:
            information = measure(params, (given.target, None))
            acquisition = selection.variance_reduction(information)
        found = selection.greedy(
            state,
            *MODEL,
            given.pool,
            given.batch,
            acquisition=acquisition,
            excluded=given.labelled,
        )
        return np.asarray(found.indices)

    return choose


def key_of(given: Round) -> int:
    return int(given.labelled.sum())


WAYS = {
    "random": at_random,
    "entropy, top": top(lambda given: selection.entropy()),
    "margin, top": top(lambda given: selection.margin()),
    "BALD, top": top(lambda given: selection.disagreement(key_of(given))),
    "EPIG, top": top(
        lambda given: selection.predictive_information(given.target, key_of(given))
    ),
    "k-centre": k_centre,
    "greedy, full": greedy("full", False),
    "greedy, kronecker": greedy("kronecker", False),
    "greedy, diagonal": greedy("diagonal", False),
    "targeted, full": greedy("full", True),
    "targeted, kronecker": greedy("kronecker", True),
    "targeted, diagonal": greedy("diagonal", True),
}


def curve(way: Callable, given: Problem, seed: int) -> np.ndarray:
    """Accuracy and log-loss after each round, `(rounds, 2)`."""
    x, y = given.inputs, given.labels
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    pool, rest = order[: given.pool], order[given.pool :]
    rest = rest[np.isin(y[rest], given.wanted)]
    target, test = rest[:60], rest[60:]
    inputs, labels = jnp.asarray(x[pool]), jnp.asarray(y[pool])
    labelled = np.zeros(given.pool, bool)
    labelled[: given.start] = True
    rng, reached = np.random.default_rng(seed + 100), []
    for number in range(given.rounds):
        weights = jnp.asarray(labelled, jnp.float32)
        state = learn(inputs, labels, weights, int(y.max()) + 1)
        logits = apply_fn(state.mean, jnp.asarray(x[test]))
        log_p = np.asarray(jax.nn.log_softmax(logits))
        right = np.mean(log_p.argmax(1) == y[test])
        reached.append((right, -np.mean(log_p[np.arange(len(test)), y[test]])))
        if number < given.rounds - 1:
            at = jnp.asarray(x[target])
            chosen = way(Round(state, inputs, labelled, at, rng, given.batch))
            labelled[np.asarray(chosen)] = True
    return np.array(reached)


def label_curves(name: str, seeds: int, small: bool) -> None:
    given = problem(name)
    if small:
        given = given._replace(pool=100, rounds=3)
    counts = given.start + given.batch * np.arange(given.rounds)
    shown = sorted({1, given.rounds // 2, given.rounds - 1})
    heads = [f"at {counts[i]}" for i in shown] + ["log-loss"]
    heads += [f"to {level:.0%}" for level in given.levels]
    print(f"\n{name}: {seeds} seeds, {given.pool} rows in the pool")
    print(f"{'':22}{'over the curve':>18}" + "".join(f"{h:>12}" for h in heads))
    for way, choose in WAYS.items():
        found = np.stack([curve(choose, given, seed) for seed in range(seeds)])
        right = found[:, :, 0]
        over = right[:, 1:].mean(1)
        error = over.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
        cells = [f"{right[:, i].mean():.3f}" for i in shown]
        cells.append(f"{found[:, -1, 1].mean():.3f}")
        for level in given.levels:
            hits = right >= level
            first = np.where(hits.any(1), counts[hits.argmax(1)], np.inf)
            half = np.median(first)
            median = f"{half:.0f}" if np.isfinite(half) else "never"
            cells.append(f"{median} ({hits.any(1).sum()}/{seeds})")
        mean = f"{over.mean():.3f} +- {error:.3f}"
        print(f"{way:22}{mean:>18}" + "".join(f"{c:>12}" for c in cells), flush=True)


# ---- designs


def quadratic(params: jax.Array, x: jax.Array) -> jax.Array:
    return terms(x) @ params


def terms(x: Any) -> Any:
    squares = [x[:, i] * x[:, j] for i in range(3) for j in range(i, 3)]
    return jnp.stack([jnp.ones_like(x[:, 0]), *x.T, *squares], 1)


def designs(seeds: int, small: bool) -> None:
    levels = np.linspace(-1, 1, 3 if small else 5, dtype=np.float32)
    grid = np.array(list(itertools.product(levels, repeat=3)))
    model = quadratic, ff.likelihoods.gaussian()
    structure = ff.structures.full()
    state = ff.posterior(jnp.zeros(10), structure, prior_precision=1e-5)
    pool = jnp.asarray(grid)
    best = selection.design(state, *model, pool)
    print(
        f"\ndesigns: a quadratic in 3 factors, {len(grid)} candidates, 10 parameters; "
        f"approximate optimum certified to {best.efficiency:.4f}"
    )

    def efficiency(points: np.ndarray) -> float:
        rows = np.asarray(terms(jnp.asarray(points)), np.float64)
        logdet = np.linalg.slogdet(rows.T @ rows / len(points))[1]
        return float(np.exp((logdet - float(best.value)) / 10))

    ways = {
        "exchange": lambda count, seed: grid[
            np.asarray(selection.exchange(state, *model, pool, seed, count).indices)
        ],
        "greedy, repeated": lambda count, seed: grid[
            np.asarray(
                selection.greedy(state, *model, pool, count, replace=True).indices
            )
        ],
    }
    if importlib.util.find_spec("pyoptex"):
        ways["pyoptex"] = by_pyoptex
    else:
        print("pyoptex is not installed")
    print(f"{'':18}{'count':>6}{'best':>9}{'worst':>9}{'seconds':>10}")
    for count, (name, way) in itertools.product((10, 14, 20), ways.items()):
        way(count, 0)  # compiles
        found, start = [], time.perf_counter()
        for seed in range(seeds):
            found.append(efficiency(way(count, seed)))
        seconds = (time.perf_counter() - start) / seeds
        print(f"{name:18}{count:6}{max(found):9.4f}{min(found):9.4f}{seconds:10.3f}")


def by_pyoptex(count: int, seed: int) -> np.ndarray:
    """Coordinate exchange on the cube, of as many starts; it draws its own seeds."""
    from pyoptex.doe import fixed_structure as peer
    from pyoptex.doe.fixed_structure.metric import Dopt
    from pyoptex.utils.model import model2Y2X, partial_rsm_names

    factors = [peer.Factor(name) for name in "ABC"]
    to_terms = model2Y2X(partial_rsm_names(dict.fromkeys("ABC", "quad")), factors)
    recipe = peer.default_fn(factors, Dopt(), to_terms)
    settings = peer.create_parameters(factors, recipe, count)
    with contextlib.redirect_stderr(io.StringIO()):  # its bar
        found, _ = peer.create_fixed_structure_design(settings, n_tries=10)
    return found.to_numpy(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = ["digits", "shift", "cancer", "designs"]
    parser.add_argument("--problems", nargs="+", default=every, choices=every)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(describe_machine(("jax", "numpy", "scikit-learn")))
    for name in options.problems:
        if name == "designs":
            designs(options.seeds, options.small)
        else:
            label_curves(name, options.seeds, options.small)


if __name__ == "__main__":
    main()
