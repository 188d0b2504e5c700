"""A flax classifier, trained as usual, then calibrated probabilities with intervals.

300 handwritten digits are there to learn from, and a fifth of their labels is wrong:
the network learns these too, and is surer than it is right. 100 more, whose labels were
checked, set the scale of its uncertainty:

    python examples/calibrated_classifier.py

Saves a reliability diagram in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import fisherflow_jax as ff
from fisherflow_jax import metrics

NUM_TRAIN, NUM_CHECKED, SHARE_WRONG = 300, 100, 0.2
NUM_STEPS, BATCH_SIZE = 500, 60

likelihood = ff.likelihoods.categorical()


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10, name="head")(nn.tanh(nn.Dense(50)(x)))


def load() -> tuple[tuple, tuple, tuple]:
    """Training data with wrong labels, checked data, and test data."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(labels))
    x = ((images - images.mean()) / images.std()).astype(np.float32)[order]
    y = labels[order]
    wrong = generator.random(NUM_TRAIN) < SHARE_WRONG
    shifts = generator.integers(1, 10, NUM_TRAIN)
    y[:NUM_TRAIN] = np.where(wrong, (y[:NUM_TRAIN] + shifts) % 10, y[:NUM_TRAIN])
    cuts = [NUM_TRAIN, NUM_TRAIN + NUM_CHECKED]
    x, y = jnp.asarray(x), jnp.asarray(y)
    train, checked, test = zip(jnp.split(x, cuts), jnp.split(y, cuts), strict=True)
    return train, checked, test


def train_as_usual(network: Network, train: tuple) -> dict:
    params = network.init(jax.random.key(0), train[0][:1])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params: dict, state: optax.OptState, x: jax.Array, y: jax.Array) -> tuple:
        def loss(params: dict) -> jax.Array:
            logits = network.apply(params, x)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    generator = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        rows = generator.choice(NUM_TRAIN, BATCH_SIZE, replace=False)
        params, state = step(params, state, train[0][rows], train[1][rows])
    return params


def report(name: str, probabilities: jax.Array, labels: jax.Array) -> None:
    accuracy = metrics.accuracy(probabilities, labels)
    nll = metrics.negative_log_likelihood(probabilities, labels)
    ece = metrics.expected_calibration_error(probabilities, labels)
    print(f"{name:<10}  accuracy {accuracy:.3f}   NLL {nll:.3f}   ECE {ece:.3f}")


def main() -> None:
    train, checked, test = load()
    network = Network()
    params = train_as_usual(network, train)
    before = jax.nn.softmax(network.apply(params, test[0]))

    # the last layer, its posterior from one pass, and the scale from checked data
    found = ff.laplace(
        network.apply,
        likelihood,
        params,
        [train],
        chosen=["params.head"],
        validation=checked,
    )
    print(found.report)
    prediction = ff.predict(
        *found[:3],
        test[0],
        level=0.9,
    )

    report("before", before, test[1])
    report("calibrated", prediction.mean, test[1])
    print("\nFive test images, the likeliest class, and 90 % intervals of its chance:")
    for row in range(5):
        label = int(jnp.argmax(prediction.mean[row]))
        low, high = prediction.lower[row, label], prediction.upper[row, label]
        print(
            f"  {label} (is {test[1][row]}): {prediction.mean[row, label]:.2f}  "
            f"[{low:.2f}, {high:.2f}]   before: {before[row, label]:.2f}"
        )

    folder = Path("outputs")
    folder.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(5, 4.5), layout="constrained")
    binning = metrics.equal_mass(10)
    for name, chances in (("before", before), ("calibrated", prediction.mean)):
        curve = metrics.reliability_curve(chances, test[1], binning=binning)
        ff.plots.reliability_diagram(curve, label=name, ax=axes)
    figure.savefig(folder / "calibrated_classifier.png", dpi=130)
    print(f"\nFigure: {folder / 'calibrated_classifier.png'}")


if __name__ == "__main__":
    main()
