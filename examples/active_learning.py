"""Which digits to label: a batch chosen by its information, beside simpler rules.

A classifier learns handwritten digits from the few labels that it asks for, twenty a
round. Rows are chosen greedily by the Fisher information, each given those before it;
beside that at random, by the smallest margin, and by k-centre. Then the pool has all
ten digits and the classifier is to tell 3, 8 and 9 apart: there a target helps, the
information of unlabelled rows of these three.

    python examples/active_learning.py

Under two minutes. Saves the curves in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

from pathlib import Path

import figures
import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import fisherflow_jax as ff

NUM_SEEDS, BATCH_SIZE, PRIOR = 3, 20, 1.0
model = (lambda params, x: x @ params["w"] + params["b"]), ff.likelihoods.categorical()
flow = ff.fisher_flow(*model, prior_precision=PRIOR)
selection = ff.selection


def load(num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the images, and the labels."""
    images, labels = load_digits(return_X_y=True)
    x = (images - images.mean(0)) / images.std()
    axes = np.linalg.svd(x, full_matrices=False)[2][:num_components]
    return (x @ axes.T).astype(np.float32), labels


@jax.jit
def learn(x: jax.Array, y: jax.Array, labelled: jax.Array) -> ff.FlowState:
    """From the rows that are labelled; others have weight zero, so that shapes stay."""
    zeros = {"w": jnp.zeros((x.shape[1], 10)), "b": jnp.zeros(10)}
    return flow.update(flow.init(zeros), (x, y, labelled))[0]


# Each rule: (state, pool, which are labelled, unlabelled rows of the target, random
# numbers) -> the rows to label next.


def at_random(state, pool, labelled, target, rng):
    return rng.choice(np.flatnonzero(~labelled), BATCH_SIZE, replace=False)


def smallest_margin(state, pool, labelled, target, rng):
    values = selection.values(state, *model, pool, selection.margin())
    return np.argsort(np.where(labelled, np.inf, -values))[:BATCH_SIZE]


def k_centre(state, pool, labelled, target, rng):
    """The row that is furthest from all labelled ones, again and again."""
    x, chosen = np.asarray(pool), []
    distance = ((x[:, None] - x[None, labelled]) ** 2).sum(-1).min(1)
    for _ in range(BATCH_SIZE):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(-1))
    return chosen


def most_information(state, pool, labelled, target, rng):
    return selection.greedy(state, *model, pool, BATCH_SIZE, excluded=labelled).indices


measure = jax.jit(ff.estimators.exact(*model, ff.structures.full()))


def most_for_the_target(state, pool, labelled, target, rng):
    wanted = selection.variance_reduction(measure(state.mean, (target, None)))
    return selection.greedy(
        state, *model, pool, BATCH_SIZE, acquisition=wanted, excluded=labelled
    ).indices


RULES = {
    "most information": most_information,
    "random": at_random,
    "smallest margin": smallest_margin,
    "k-centre": k_centre,
}
SHIFTED = {
    "most for the target": most_for_the_target,
    "most information": most_information,
    "random": at_random,
}


def curve(rule, data, pool_size: int, rounds: int, wanted: list, seed: int) -> list:
    """Test accuracy after each round."""
    x, y = data
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    pool, rest = order[:pool_size], order[pool_size:]
    rest = rest[np.isin(y[rest], wanted)]
    target, test = rest[:60], rest[60:]
    inputs, labels = jnp.asarray(x[pool]), jnp.asarray(y[pool])
    labelled = np.zeros(pool_size, bool)
    labelled[:BATCH_SIZE] = True
    reached = []
    for number in range(rounds):
        state = learn(inputs, labels, jnp.asarray(labelled, jnp.float32))
        guesses = np.argmax(model[0](state.mean, x[test]), -1)
        reached.append(np.mean(guesses == y[test]))
        if number < rounds - 1:
            chosen = rule(state, inputs, labelled, jnp.asarray(x[target]), rng)
            labelled[np.asarray(chosen)] = True
    return reached


def compare(title: str, rules: dict, data: tuple, *setting) -> dict[str, np.ndarray]:
    """The curves of all rules, `(seeds, rounds)`, printed."""
    curves = {
        name: np.array([curve(rule, data, *setting, s) for s in range(NUM_SEEDS)])
        for name, rule in rules.items()
    }
    num_labels = BATCH_SIZE * np.arange(1, setting[1] + 1)
    print(f"\n{title}\n{'labels':>20}  " + "".join(f"{n:>6}" for n in num_labels))
    for name, values in curves.items():
        print(f"{name:>20}  " + "".join(f"{v:6.1%}" for v in values.mean(0)))
    return curves


def main() -> None:
    everything = list(range(10))
    plain = compare("all ten digits", RULES, load(30), 600, 10, everything)
    shifted = compare(
        "ten digits in the pool, 3, 8 and 9 to be told apart",
        SHIFTED,
        load(20),
        400,
        8,
        [3, 8, 9],
    )
    folder = Path("outputs")
    folder.mkdir(exist_ok=True)
    titles = "all ten digits", "only 3, 8 and 9 to be told apart"
    panels = dict(zip(titles, (plain, shifted), strict=True))
    figures.label_curves(folder / "active_learning.png", BATCH_SIZE, panels)
    print(f"\nFigure: {folder / 'active_learning.png'}")


if __name__ == "__main__":
    main()
