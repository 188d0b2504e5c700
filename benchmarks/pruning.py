"""Pruning and rounding without a gradient step: digits, a perceptron and a convolution.

    python benchmarks/pruning.py [--seeds 3] [--model mlp|cnn] [--small]

A network (64-32-10, relu; or two convolutions and a dense layer) is fitted to 1,100 of
scikit-learn's digits by Adam, with a prior of 0.3, and tested on the other 697. Its
kernels are pruned by one threshold, or rounded, and compared: the test accuracy, and
the rise of the summed training objective (the prior's part included) in nats, measured
and predicted by the Kronecker information. `+ kronecker` and `+ full` say by which
information the kept weights move; `stages` prunes in stages of a tenth, with a new
information in each and no gradient step; `steps` are 150 masked steps of Adam after
magnitude alone. Means over seeds, with their standard errors.
"""

import argparse
import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine
from sklearn.datasets import load_digits

import fisherflow_jax as ff

TRAINED, PRIOR = 1100, 0.3
LIKELIHOOD = ff.likelihoods.categorical()
SPARSITIES, BITS = (0.5, 0.7, 0.8, 0.9, 0.95), (2, 3, 4, 5, 6, 8)


def mlp(params: dict, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def cnn(params: dict, x: jax.Array) -> jax.Array:
    def convolved(z: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return jax.lax.conv_general_dilated(
            z, kernel, strides, "SAME", dimension_numbers=numbers
        )

    z = jax.nn.relu(convolved(x.reshape((-1, 8, 8, 1)), params["w"], 1) + params["b"])
    z = jax.nn.relu(convolved(z, params["u"], 2) + params["d"])
    return z.reshape((len(x), -1)) @ params["v"] + params["c"]


SHAPES = {
    "mlp": {"w": (64, 32), "b": (32,), "v": (32, 10), "c": (10,)},
    "cnn": {
        "w": (3, 3, 1, 8),
        "b": (8,),
        "u": (3, 3, 8, 16),
        "d": (16,),
        "v": (256, 10),
        "c": (10,),
    },
}
MODELS = {"mlp": mlp, "cnn": cnn}


def initial(model: str, key: jax.Array) -> dict:
    keys = jax.random.split(key, len(SHAPES[model]))
    return {
        name: jax.random.normal(own, shape)
        * (len(shape) > 1)
        / np.prod(shape[:-1]) ** 0.5
        for own, (name, shape) in zip(keys, SHAPES[model].items(), strict=True)
    }


def objective(apply_fn: Any, params: dict, data: tuple) -> jax.Array:
    """The summed negative log-density of the training data and of the prior."""
    nll = -jnp.sum(LIKELIHOOD.log_prob(apply_fn(params, data[0]), data[1]))
    return nll + PRIOR / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnames=("apply_fn", "steps"))
def train(apply_fn: Any, params: dict, mask: dict, data: tuple, steps: int) -> dict:
    optimizer = optax.chain(
        optax.adam(optax.cosine_decay_schedule(0.01, steps)),
        ff.compression.keep_zeros(mask),
    )

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        gradient = jax.grad(lambda p: objective(apply_fn, p, data) / TRAINED)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, None, length=steps)[0][0]


class Fit:
    """A fitted network, its informations and what is measured of another."""

    def __init__(self, model: str, seed: int, steps: int):
        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(y))
        x, y = ((x - x.mean()) / x.std()).astype("float32")[order], y[order]
        self.data, self.test = (x[:TRAINED], y[:TRAINED]), (x[TRAINED:], y[TRAINED:])
        self.apply_fn, start = MODELS[model], initial(model, jax.random.key(seed))
        self.ones = jax.tree.map(lambda x: jnp.ones(x.shape, bool), start)
        self.params = train(self.apply_fn, start, self.ones, self.data, steps)
        self.layers = ff.layers.find_layers(self.apply_fn, start, x[:1])
        self.value = self._measure(self.params)

    @functools.cached_property
    def _measure(self) -> Any:
        @jax.jit
        def measure(params: dict) -> tuple[jax.Array, jax.Array]:
            right = self.apply_fn(params, self.test[0]).argmax(1) == self.test[1]
            return right.mean(), objective(self.apply_fn, params, self.data)

        return measure

    def state(self, structure: str, params: dict | None = None) -> Any:
        params = self.params if params is None else params
        estimator = estimators(self.apply_fn, self.layers, structure)
        return ff.posterior(params, estimator(params, self.data), prior_precision=PRIOR)

    def measured(self, params: dict, predicted: Any = np.nan) -> tuple:
        accuracy, value = self._measure(params)
        return float(accuracy), float(value - self.value[1]), float(predicted)


@functools.cache
def estimators(apply_fn: Any, layers: Any, structure: str) -> Any:
    made = {
        "kronecker": ff.structures.kronecker(layers),
        "full": ff.structures.full(),
        "diagonal": ff.structures.diagonal(),
    }[structure]
    return jax.jit(ff.estimators.exact(apply_fn, LIKELIHOOD, made))


def magnitudes(params: dict) -> dict:
    return jax.tree.map(jnp.abs, params)


def pruned(fit: Fit, sparsities: tuple, table: dict, full: bool) -> None:
    compression = ff.compression
    names = ["kronecker", "diagonal", *(["full"] if full else [])]
    states = {name: fit.state(name) for name in names}
    kronecker, scores = states["kronecker"], {"magnitude": magnitudes(fit.params)}
    scores["diagonal, conditional"] = compression.saliency(
        states["diagonal"], rule="conditional"
    )
    scores["kronecker, marginal"] = compression.saliency(kronecker)
    for sparsity in sparsities:
        for name, score in scores.items():
            kept = compression.mask(score, sparsity, layers=fit.layers)

            for label, state in [("", kronecker), *states.items()]:
                if label == "diagonal":  # nothing would move
                    continue
                found = compression.prune(state, kept, compensate=bool(label))
                row = fit.measured(found.params, found.predicted_rise)
                table[sparsity, f"{name} + {label}".rstrip(" +")].append(row)
        kept = compression.mask(scores["magnitude"], sparsity, layers=fit.layers)
        zeroed = jax.tree.map(jnp.multiply, fit.params, kept)
        tuned = train(fit.apply_fn, zeroed, kept, fit.data, 150)
        table[sparsity, "magnitude, 150 steps"].append(fit.measured(tuned))
    params, kept = fit.params, fit.ones
    for sparsity in sorted({*np.round(np.arange(1, 10) / 10, 1), *sparsities}):
        kept = compression.mask(
            magnitudes(params), float(sparsity), layers=fit.layers, mask=kept
        )
        params = compression.prune(fit.state("kronecker", params), kept).params
        if sparsity in sparsities:
            label = "magnitude + kronecker, stages"
            table[float(sparsity), label].append(fit.measured(params))
    for pattern in ("2:4", "1:4"):
        kept = compression.mask(scores["magnitude"], pattern, layers=fit.layers)
        for label, compensate in (("", False), (" + kronecker", True)):
            found = compression.prune(kronecker, kept, compensate=compensate)
            row = fit.measured(found.params, found.predicted_rise)
            table[pattern, f"magnitude{label}"].append(row)


def rounded(fit: Fit, table: dict) -> None:
    state = fit.state("kronecker")
    # units that never fire are rounded, too
    to_grid = functools.partial(
        ff.compression.round_to_grid, state, dead_inputs="nearest"
    )
    for bits in BITS:
        found = to_grid(bits)
        near = nearest(fit, bits)
        table[bits, "nearest, largest entry"].append(
            fit.measured(near, found.nearest_rise)
        )
        alone = to_grid(bits, compensate=False)
        table[bits, "nearest, best scale"].append(
            fit.measured(alone.params, alone.predicted_rise)
        )
        table[bits, "pushed on"].append(
            fit.measured(found.params, found.predicted_rise)
        )
    for budget in (3.0, 4.0):
        found = ff.compression.allocate_bits(state, BITS, budget, dead_inputs="nearest")
        params = to_grid(found.bits).params
        table[budget, "allocated"].append(fit.measured(params, found.predicted_rise))


def nearest(fit: Fit, bits: int) -> dict:
    """On the grids that reach the largest entry of each output."""

    def leaf(x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return x
        axes = tuple(range(x.ndim - 1))
        scale = jnp.max(jnp.abs(x), axes, keepdims=True) / (2 ** (bits - 1) - 1)
        return jnp.round(x / scale) * scale

    return jax.tree.map(leaf, fit.params)


def show(title: str, table: dict, base: float) -> None:
    print(f"\n{title}; without, accuracy {base:.3f}")
    print(f"{'':8} {'':36} {'accuracy':>15} {'rise':>18} {'predicted':>10}")
    for (level, name), rows in table.items():
        values = np.array(rows)
        mean = values.mean(0)
        error = (
            values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else mean * 0
        )
        print(
            f"{level!s:8} {name:36} {mean[0]:.3f} +- {error[0]:.3f} "
            f"{mean[1]:9.4g} +- {error[1]:7.2g} {mean[2]:10.4g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument("--small", action="store_true", help="one seed, few steps")
    options = parser.parse_args()
    steps = 1200 if options.model == "mlp" else 400
    seeds, steps = (1, 300) if options.small else (options.seeds, steps)
    sparsities = SPARSITIES[1:3] if options.small else SPARSITIES
    print(describe_machine(["jax", "optax", "numpy"]))
    prunings: dict = collections.defaultdict(list)
    roundings: dict = collections.defaultdict(list)
    accuracies = []
    for seed in range(seeds):
        fit = Fit(options.model, seed, steps)
        accuracies.append(float(fit.value[0]))
        full = options.model == "mlp" and not options.small
        pruned(fit, sparsities, prunings, full)
        rounded(fit, roundings)
    show("pruned", prunings, np.mean(accuracies))
    show("rounded", roundings, np.mean(accuracies))


if __name__ == "__main__":
    main()
