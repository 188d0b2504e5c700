"""What calibrated posteriors are worth: held-out likelihood, detection, intervals."""

import functools
import statistics
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from laplace_methods import KRONECKER, STRUCTURES, Part, compiled_estimator, part_of
from laplace_problem import (
    CATEGORICAL,
    PRIOR_PRECISION,
    Data,
    apply_fn,
    maximise,
    start,
)
from measuring import table
from sklearn.datasets import load_diabetes, make_friedman1

import fisherflow_jax as ff
from fisherflow_jax import metrics

EVIDENCE = "all, Kronecker, by evidence"
BARE, COOLED = "mean alone", "mean, one temperature"
LEVEL = 0.9
Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


def float32(tree: Any) -> Any:
    """Parameters and inputs in single precision, labels as they are."""
    return jax.tree.map(
        lambda x: (
            jnp.asarray(x, jnp.float32)
            if np.issubdtype(np.asarray(x).dtype, np.floating)
            else jnp.asarray(x)
        ),
        tree,
    )


class Fitted(NamedTuple):
    """The part of the model that a row is about, and its posterior."""

    part: Part
    information: Any  # without the prior
    state: ff.Posterior

    def calibrate(
        self, validation: tuple, likelihood: Any, link: Any = None
    ) -> ff.Calibration:
        held = self.part.inputs(validation[0]), validation[1]
        return ff.calibrate(self.state, self.part.apply, likelihood, held, link=link)

    def outputs(self, state: ff.Posterior, inputs: Any) -> ff.predictions.Outputs:
        rows = self.part.inputs(inputs)
        return ff.predictions.linearized_outputs(state, self.part.apply, rows)

    def probabilities(
        self, state: ff.Posterior, inputs: Any, link: Any = None
    ) -> jax.Array:
        rows = self.part.inputs(inputs)
        return ff.predict(state, self.part.apply, CATEGORICAL, rows, link=link).mean


def fitted(
    params: Any, structure: str, batch: tuple, likelihood: Any = CATEGORICAL
) -> Fitted:
    """From one pass over the training data."""
    part = part_of(params, structure)
    batch = part.inputs(batch[0]), batch[1]
    estimator = compiled_estimator(part, structure, likelihood, batch[0])
    information = estimator(part.params, batch)
    state = ff.posterior(part.params, information, prior_precision=PRIOR_PRECISION)
    return Fitted(part, information, state)


def scores(chances: jax.Array, labels: jax.Array) -> tuple[float, float, float]:
    """Accuracy, mean negative log-likelihood, expected calibration error."""
    return (
        float(metrics.accuracy(chances, labels)),
        float(metrics.negative_log_likelihood(chances, labels)),
        float(metrics.expected_calibration_error(chances, labels)),
    )


def detection(inside: jax.Array, outside: jax.Array) -> float:
    """How well the entropy of the probabilities tells outside from inside."""
    entropies = metrics.entropy(jnp.concatenate([inside, outside]))
    return float(metrics.auroc(entropies, jnp.arange(len(entropies)) >= len(inside)))


# ---- classes


def classify(
    params: Any, train: tuple, validation: tuple, test: tuple
) -> dict[str, tuple[float, float, float]]:
    """Scores on the test data of the mean, with a temperature, and calibrated."""
    logits = apply_fn(params, validation[0])
    scaling = ff.calibration.temperature_scaling(logits, validation[1])
    logits = apply_fn(params, test[0])
    found = {
        BARE: scores(jax.nn.softmax(logits), test[1]),
        COOLED: scores(jax.nn.softmax(logits / scaling.temperature), test[1]),
    }
    for structure in STRUCTURES:
        fit = fitted(params, structure, train)
        calibrated = fit.calibrate(validation, CATEGORICAL).posterior
        found[structure] = scores(fit.probabilities(calibrated, test[0]), test[1])
        if structure == KRONECKER:
            found[EVIDENCE] = scores(_by_evidence(fit, train, test[0]), test[1])
    return found


def _by_evidence(fit: Fitted, train: tuple, inputs: jax.Array) -> jax.Array:
    """Probabilities under the prior precision of the largest marginal likelihood."""
    logits = fit.part.apply(fit.part.params, fit.part.inputs(train[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is wrong for classes
        search = ff.calibration.maximize_marginal_likelihood(
            CATEGORICAL,
            fit.part.params,
            fit.information,
            jnp.sum(CATEGORICAL.log_prob(logits, train[1])),
        )
    state = ff.posterior(
        fit.part.params, fit.information, prior_precision=search.prior_precision
    )
    return fit.probabilities(state, inputs)


def clean(data: Data, seed: int) -> dict[str, tuple[float, float, float]]:
    """100 examples are held out to calibrate, the others trained on to convergence."""
    order = np.random.default_rng(seed).permutation(len(data.train[1]))
    train, validation = (
        tuple(part[rows] for part in data.train) for rows in (order[100:], order[:100])
    )
    params, _ = maximise(start(seed), train)
    return classify(*float32((params, train, validation, data.test)))


def noisy(data: Data, seed: int) -> dict[str, tuple[float, float, float]]:
    """300 examples, every fifth label wrong, Adam without decay; 100 to calibrate."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(data.train[1]))
    train, validation = (
        tuple(part[rows] for part in data.train)
        for rows in (order[:300], order[300:400])
    )
    wrong = generator.permutation(300) < 60
    others = (train[1] + generator.integers(1, 10, 300)) % 10
    train = train[0], np.where(wrong, others, train[1])
    params, train, validation, test = float32(
        (start(seed), train, validation, data.test)
    )
    params = _adam(params, train, seed)
    return classify(params, train, validation, test)


@functools.partial(jax.jit, static_argnums=2)
def _adam(params: Any, batch: tuple, seed: int) -> Any:
    """100 epochs in batches of 60, at a rate of 1e-2: wrong labels are learnt too."""
    loss = ff.negative_log_likelihood(apply_fn, CATEGORICAL)
    optimizer = optax.adam(1e-2)

    def step(carry: Any, rows: jax.Array) -> tuple:
        params, state = carry
        part = jax.tree.map(lambda x: x[rows], batch)
        updates, state = optimizer.update(jax.grad(loss)(params, part), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed), 100)
    rows = jax.vmap(lambda key: jax.random.permutation(key, 300))(keys)
    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, rows.reshape(-1, 60))[0][0]


def print_scores(runs: list[dict[str, tuple[float, float, float]]]) -> dict:
    """Means over seeds, and how NLL differs from that of the mean alone."""
    rows, kept = [], {}
    for name in runs[0]:
        accuracy, nll, ece = np.mean([run[name] for run in runs], axis=0)
        gains = [run[name][1] - run[BARE][1] for run in runs]
        error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        gain = f"{np.mean(gains):+.3f} +- {error:.3f}" if name != BARE else ""
        rows.append((name, f"{accuracy:.4f}", f"{nll:.4f}", f"{ece:.4f}", gain))
        kept[name] = {"accuracy": accuracy, "nll": nll, "ece": ece}
    header = ("", "accuracy", "NLL", "ECE", "NLL - mean alone's")
    print(table(header, rows), "\n")
    return kept


# ---- out of distribution


def detect(params: Any, data: Data, num_permutations: int) -> dict[str, tuple]:
    """AUROC of each structure at the training prior and calibrated, by permutation.

    The scale is found on half of the test images; all are then scored, by probit as in
    the table of the libraries.
    """
    probit = ff.predictions.probit()
    params, train, test = float32((params, data.train, data.test))
    half = tuple(part[::2] for part in test)
    outsides = [
        test[0][:, np.random.default_rng(seed).permutation(test[0].shape[1])]
        for seed in range(num_permutations)
    ]
    inside = jax.nn.softmax(apply_fn(params, test[0]))
    bare = [detection(inside, jax.nn.softmax(apply_fn(params, x))) for x in outsides]
    found: dict[str, tuple] = {BARE: (bare, bare, 0.0)}
    for structure in STRUCTURES:
        fit = fitted(params, structure, train)
        calibration = fit.calibrate(half, CATEGORICAL, probit)
        columns = []
        for each in (fit.state, calibration.posterior):
            inside, *strange = (
                fit.probabilities(each, x, probit) for x in (test[0], *outsides)
            )
            columns.append([detection(inside, x) for x in strange])
        found[structure] = (*columns, float(calibration.scale))
    return found


def print_detection(found: dict[str, tuple]) -> None:
    rows = []
    for name, (before, after, scale) in found.items():
        low, high = min(before), max(before)
        rows.append(
            (
                name,
                f"{statistics.mean(before):.4f}",
                f"{low:.4f}-{high:.4f}",
                f"{statistics.mean(after):.4f}" if name != BARE else "",
                f"{scale:.4f}" if name != BARE else "",
            )
        )
    header = ("", "training prior", "range", "calibrated", "scale of covariance")
    print(table(header, rows), "\n")


# ---- intervals


def regression_data(name: str, seed: int) -> list[tuple]:
    """Train, validation and test rows (60, 20, 20 %), all standardised on the first."""
    if name == "diabetes":
        x, y = load_diabetes(return_X_y=True)
    else:
        x, y = make_friedman1(n_samples=334, noise=1.0, random_state=seed)
    order = np.random.default_rng(seed).permutation(len(y))
    cuts = np.array_split(order, [int(0.6 * len(y)), int(0.8 * len(y))])
    first = cuts[0]
    x = (x - x[first].mean(0)) / x[first].std(0)
    y = (y - y[first].mean()) / y[first].std()
    return [(x[rows], y[rows, None]) for rows in cuts]


REGRESSION_NOISE = 0.5  # assumed while training, in standard deviations of the targets


def intervals(name: str, seed: int) -> dict[str, tuple[float, float, float]]:
    """Coverage and mean width of 90 % intervals, and NLL, of one split."""
    train, validation, test = regression_data(name, seed)
    likelihood = ff.likelihoods.gaussian(REGRESSION_NOISE)
    first = start(seed, (train[0].shape[1], 50, 1))
    params, _ = maximise(first, train, likelihood, max_steps=300)
    params, train, validation, test = float32((params, train, validation, test))
    found = {}
    for structure in STRUCTURES:
        fit = fitted(params, structure, train, likelihood)
        calibration = fit.calibrate(validation, likelihood)
        for suffix, each, noise in (
            ("", fit.state, REGRESSION_NOISE),
            (", calibrated", calibration.posterior, calibration.noise),
        ):
            outputs = fit.outputs(each, test[0])
            std = jnp.sqrt(outputs.variance + jnp.float32(noise) ** 2)
            lower, upper = outputs.mean - Z * std, outputs.mean + Z * std
            found[structure + suffix] = (
                float(metrics.interval_coverage(lower, upper, test[1])),
                float(metrics.interval_width(lower, upper)),
                float(
                    metrics.gaussian_negative_log_likelihood(outputs.mean, std, test[1])
                ),
            )
    return found


def print_intervals(runs: list[dict[str, tuple[float, float, float]]]) -> dict:
    rows, kept = [], {}
    for structure in STRUCTURES:
        cells = []
        for suffix in ("", ", calibrated"):
            values = np.array([run[structure + suffix] for run in runs])
            coverage, width, nll = values.mean(0)
            error = values[:, 0].std(ddof=1) / len(runs) ** 0.5
            cells += [f"{coverage:.3f} +- {error:.3f}", f"{width:.2f}", f"{nll:.3f}"]
            kept[structure + suffix] = {
                "coverage": coverage,
                "width": width,
                "nll": nll,
            }
        inside = 0.86 <= kept[structure + ", calibrated"]["coverage"] <= 0.94
        rows.append((structure, *cells, "met" if inside else "missed"))
    header = ("", "as trained", "width", "NLL", "calibrated", "width", "NLL", "")
    print(table(header, rows), "\n")
    return kept
