"""A network that reads digits, pruned and rounded without a gradient step.

    python examples/prune_and_round.py

What is removed or rounded is made up for by what is left, as the Fisher information of
the trained network says: one pass over the data, and no gradient step. Prints test
accuracies and the rise of the training objective, predicted and measured, and saves
them against sparsity and bits in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`. With qwix installed too (`pip install qwix`),
the rounded kernels are multiplied as it packs them.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import fisherflow_jax as ff

try:
    import qwix
except ImportError:
    qwix = None

NUM_TRAIN, NUM_STEPS, PRIOR = 1100, 1200, 0.3
SPARSITIES, BITS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9), (2, 3, 4, 5, 6, 8)
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "0.45"

likelihood = ff.likelihoods.categorical()


def network(params: dict, x: jax.Array, dot=jnp.dot) -> jax.Array:
    hidden = jax.nn.relu(dot(x, params["w1"]) + params["b1"])
    return dot(hidden, params["w2"]) + params["b2"]


# ---- data, training, measures


def load() -> tuple[tuple, tuple]:
    x, y = load_digits(return_X_y=True)
    x, order = (x - x.mean()) / x.std(), np.random.default_rng(0).permutation(len(y))
    x, y = jnp.asarray(x[order], jnp.float32), jnp.asarray(y[order])
    return (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])


def objective(params: dict, data: tuple) -> jax.Array:
    """The summed loss of the data, and the prior's part."""
    loss = -jnp.sum(likelihood.log_prob(network(params, data[0]), data[1]))
    return loss + PRIOR / 2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


@jax.jit
def train(data: tuple) -> dict:
    first, second = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(first, (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(second, (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, NUM_STEPS))

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        gradient = jax.grad(lambda p: objective(p, data) / NUM_TRAIN)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    return jax.lax.scan(step, carry, length=NUM_STEPS)[0][0]


@jax.jit
def accuracy(params: dict, test: tuple) -> jax.Array:
    return jnp.mean(network(params, test[0]).argmax(1) == test[1])


# ---- pruning and rounding


def pruned(state, measure, magnitudes) -> dict[str, list[float]]:
    """Test accuracies at each sparsity."""
    curves: dict = {"magnitude alone": [], "the others moved": [], "in stages": []}
    staged, kept = state, None
    print("sparsity  alone  moved  stages   rise predicted, measured")
    for sparsity in SPARSITIES:
        mask = ff.compression.mask(magnitudes(state), sparsity)
        alone = ff.compression.prune(state, mask, compensate=False)
        moved = ff.compression.prune(state, mask)
        # each stage keeps the zeros of the last, and asks for a new information
        kept = ff.compression.mask(magnitudes(staged), sparsity, mask=kept)
        found = ff.compression.prune(staged, kept)
        staged = measure.state(found.params)
        row = [measure.accuracy(x.params) for x in (alone, moved, found)]
        for curve, value in zip(curves.values(), row, strict=True):
            curve.append(value)
        rises = float(moved.predicted_rise), measure.rise(moved.params, state.mean)
        print(f"{sparsity:8.2f} " + "  ".join(f"{x:.3f}" for x in row), end="")
        print("   {:14.2f}, {:8.2f}".format(*rises))
    return curves


def rounded(state, measure, mask=None) -> dict[str, list[float]]:
    """Test accuracies at each number of bits."""
    curves: dict = {"to nearest": [], "errors pushed on": []}
    print("bits   nearest  pushed on   rise predicted, measured")
    for bits in BITS:
        to_grid = functools.partial(
            ff.compression.round_to_grid, state, bits, mask=mask, dead_inputs="nearest"
        )
        found, alone = to_grid(), nearest(state.mean, bits)
        row = [measure.accuracy(x) for x in (alone, found.params)]
        for curve, value in zip(curves.values(), row, strict=True):
            curve.append(value)
        rises = float(found.predicted_rise), measure.rise(found.params, state.mean)
        print(f"{bits:4d}     {row[0]:.3f}      {row[1]:.3f}", end="")
        print("   {:14.2f}, {:8.2f}".format(*rises))
    return curves


def nearest(params: dict, bits: int) -> dict:
    """What rounding does without an information: scales reach the largest entry."""
    found = dict(params)
    for name in ("w1", "w2"):
        largest = jnp.max(jnp.abs(params[name]), axis=0)
        scale = jnp.where(largest > 0, largest, 1) / (2 ** (bits - 1) - 1)
        found[name] = jnp.round(params[name] / scale) * scale
    return found


def packed(rounded: ff.compression.Rounded) -> dict:
    """The parameters with rounded kernels as qwix holds them."""

    def leaf(x, values, scales):
        return x if values is None else qwix.QArray(values, scales)

    return jax.tree.map(leaf, rounded.params, rounded.values, rounded.scales)


class Measure:
    def __init__(self, params: dict, train: tuple, test: tuple):
        self.train, self.test = train, test
        layers = ff.layers.find_layers(network, params, train[0][:1])
        structure = ff.structures.kronecker(layers)
        self.estimator = jax.jit(ff.estimators.exact(network, likelihood, structure))

    def state(self, params: dict):
        information = self.estimator(params, self.train)
        return ff.posterior(params, information, prior_precision=PRIOR)

    def accuracy(self, params: dict) -> float:
        return float(accuracy(params, self.test))

    def rise(self, params: dict, before: dict) -> float:
        return float(objective(params, self.train) - objective(before, self.train))


def plot(path: Path, panels: list[tuple], base: float) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 3.6), layout="constrained")
    for axis, (title, label, at, curves) in zip(axes, panels, strict=True):
        axis.axhline(base, color=GREY, lw=0.8, ls=":")
        colors = (ORANGE, BLUE, GREY)
        for color, (name, values) in zip(colors, curves.items(), strict=False):
            axis.plot(at, values, "o-", color=color, lw=1.5, ms=4, label=name)
        axis.set(title=title, xlabel=label, ylabel="test accuracy")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    data, test = load()
    params = train(data)
    measure = Measure(params, data, test)
    state, base = measure.state(params), measure.accuracy(params)
    print(f"trained: test accuracy {base:.3f}\n")

    def magnitudes(state) -> dict:
        return jax.tree.map(jnp.abs, state.mean)

    by_sparsity = pruned(state, measure, magnitudes)
    print("\nrounded")
    by_bits = rounded(state, measure)
    print("\nhalf of it pruned, then rounded")
    half = ff.compression.prune(state, ff.compression.mask(magnitudes(state), 0.5))
    both = rounded(measure.state(half.params), measure, half.mask)
    bits = ff.compression.allocate_bits(state, BITS, 3.5, dead_inputs="nearest")
    print(f"\n3.5 bits a weight: {bits.bits}, predicted rise {bits.predicted_rise:.2f}")

    if qwix is not None:
        found = ff.compression.round_to_grid(state, 4, dead_inputs="nearest")
        outputs = network(packed(found), test[0], qwix.dot)
        gap = jnp.max(jnp.abs(outputs - network(found.params, test[0])))
        print(f"packed by qwix: outputs differ by at most {gap:.1g}")

    panels = [
        ("pruned", "share of weights at zero", SPARSITIES, by_sparsity),
        ("rounded", "bits a weight", BITS, by_bits),
        ("half pruned, then rounded", "bits a weight", BITS, both),
    ]
    path = Path("outputs") / "prune_and_round.png"
    plot(path, panels, base)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
