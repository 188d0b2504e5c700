"""Which training images made a network see a test image as it does? On digits.

A small network learns a thousand handwritten digits. For four test images that it gets
wrong, or nearly, the training images that help most and harm most are found without
training again; then it is trained again without them, to see. Last, a tenth of the
labels is made wrong: self-influence finds them, and so does the loss.

    python examples/influence.py

Saves a grid of images in `outputs/`. Needs `pip install "fisherflow-jax[examples]"`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import fisherflow_jax as ff

NUM_TRAIN, NUM_QUERIES, NUM_SHOWN, NUM_REMOVED = 1000, 4, 5, 20
PRIOR_PRECISION, NUM_STEPS = 1.0, 600


def apply_fn(params: dict, images: jax.Array) -> jax.Array:
    hidden = jnp.tanh(images @ params["w"] + params["b"])
    return hidden @ params["head"] + params["c"]


model = apply_fn, ff.likelihoods.categorical()


@jax.jit
def train(x: jax.Array, y: jax.Array, weights: jax.Array) -> dict:
    """The same start for all; rows of weight zero are left out."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w": jax.random.normal(keys[0], (64, 32)) / 8,
        "b": jnp.zeros(32),
        "head": jax.random.normal(keys[1], (32, 10)) / 6,
        "c": jnp.zeros(10),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, NUM_STEPS))
    loss = ff.negative_log_likelihood(*model)

    def objective(params: dict) -> jax.Array:
        squares = optax.tree.norm(params, squared=True)
        penalty = PRIOR_PRECISION / 2 * squares / jnp.sum(weights)
        return loss(params, (x, y, weights)) + penalty

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, None, NUM_STEPS)[0][0]


def posterior(params: dict, rows: tuple) -> ff.Posterior:
    """Kronecker factors of the training data, and the prior of the training."""
    layers = ff.layers.find_layers(apply_fn, params, rows[0])
    estimator = ff.estimators.exact(*model, ff.structures.kronecker(layers))
    return ff.posterior(
        params, estimator(params, rows), prior_precision=PRIOR_PRECISION
    )


def losses(params: dict, batch: tuple) -> np.ndarray:
    return -np.asarray(model[1].log_prob(apply_fn(params, batch[0]), batch[1]))


def show(path: Path, rows: tuple, queries: tuple, top: ff.influence.Top) -> None:
    """A row of images for each query: itself, what helps it and what harms it."""
    columns = 1 + 2 * NUM_SHOWN
    figure, axes = plt.subplots(
        NUM_QUERIES, columns, figsize=(1.1 * columns, 6), layout="constrained"
    )
    for i, line in enumerate(axes):
        images = [(queries[0][i], f"test: a {queries[1][i]}")]
        for values, places in ((top.values, top.indices), top[2:4]):
            images += [
                (rows[0][place], f"a {rows[1][place]}  {value:+.2f}")
                for value, place in zip(values[i], places[i], strict=True)
            ]
        for axis, (image, title) in zip(line, images, strict=True):
            axis.imshow(np.reshape(image, (8, 8)), cmap="gray_r")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.suptitle(
        "test image; training images without which its loss would rise most; fall most "
        "(nats)",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = ((images - images.mean()) / images.std()).astype(np.float32)[order]
    x, y = jnp.asarray(images), jnp.asarray(labels[order])
    rows, test = (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])
    ones = jnp.ones(NUM_TRAIN)
    params = train(*rows, ones)
    state = posterior(params, rows)

    # the rows come in batches, as from a loader; of each query the ends are kept
    worst = np.argsort(-losses(params, test))[:NUM_QUERIES]
    queries = test[0][worst], test[1][worst]
    loader = [(rows[0][i : i + 250], rows[1][i : i + 250]) for i in (0, 250, 500, 750)]
    top = ff.influence.effects(state, *model, loader, queries, top=NUM_REMOVED)
    shown = ff.influence.Top(*(part[:, :NUM_SHOWN] for part in top[:4]), top.num_rows)
    folder = Path("outputs")
    folder.mkdir(exist_ok=True)
    show(folder / "influence.png", rows, queries, shown)

    print(f"Trained again without {NUM_REMOVED} rows; the loss of each test image:")
    before = losses(params, queries)
    for i in range(NUM_QUERIES):
        without = []
        for places in (top.indices[i], top.lowest_indices[i]):
            others = train(*rows, ones.at[places].set(0.0))
            without.append(losses(others, queries)[i])
        print(
            f"  a {queries[1][i]}: {before[i]:.2f}   without the most helpful "
            f"{without[0]:.2f}   without the most harmful {without[1]:.2f}"
        )

    # wrong labels: what self-influence finds, the loss finds as well
    generator = np.random.default_rng(1)
    wrong = generator.random(NUM_TRAIN) < 0.1
    shifts = generator.integers(1, 10, NUM_TRAIN)
    changed = rows[0], jnp.where(wrong, (rows[1] + shifts) % 10, rows[1])
    params = train(*changed, ones)
    own = ff.influence.self_influence(posterior(params, changed), *model, changed)
    print("\nA tenth of the labels is wrong. Area under the curve of finding them:")
    print(f"  self-influence {roc_auc_score(wrong, own):.3f}", end="   ")
    print(f"the loss alone {roc_auc_score(wrong, losses(params, changed)):.3f}")
    print(f"\nFigure: {folder / 'influence.png'}")


if __name__ == "__main__":
    main()
