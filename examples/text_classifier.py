"""Estimators of the Fisher information on a text model: about a minute.

A small transformer encoder (flax) learns which library a sentence of documentation
comes from, on the docstrings of the libraries installed beside it. Then estimators of
its diagonal Fisher information are run, compared with the exact one, and drawn:

    python examples/text_classifier.py

The same on the command line, from the folder of this file:

    fisherflow-estimators estimate text_classifier.py:problem --estimators exact \\
        hutchinson monte_carlo empirical --output estimates
    cd estimates
    fisherflow-estimators compare exact.npz hutchinson.npz monte_carlo.npz
    fisherflow-estimators plot exact.npz hutchinson.npz --output estimates.png

Needs `pip install "fisherflow-jax[examples]"`.
"""

import ast
import functools
import importlib.util
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import fisherflow_jax as ff
from fisherflow_jax import comparison

LIBRARIES = "matplotlib", "numpy", "sklearn", "statsmodels"
SENTENCES_A_LIBRARY = 3000
LENGTH, NUM_WORDS = 24, 2000  # of a sentence, of the vocabulary
PADDING, UNKNOWN = 0, 1
BATCH_SIZE, NUM_STEPS, LEARNING_RATE = 64, 600, 2e-3
NUM_FISHER_BATCHES = 8  # of the training sentences


# ---- text


def docstrings(path: Path) -> list[str]:
    """All docstrings of a source file, which is read and not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def sentences(text: str) -> list[tuple[str, ...]]:
    """Lower-case words of each sentence of prose, six at least."""
    prose = [
        " ".join(paragraph.split())
        for paragraph in re.split(r"\n\s*\n", text)
        if not re.search(r">>>|---|===|\.\. |\s:\s", paragraph)
    ]
    parts = [part for p in prose for part in re.split(r"(?<=[.!?])\s+", p)]
    words = [tuple(re.findall(r"[a-z]+", part.lower())) for part in parts]
    return [sentence for sentence in words if len(sentence) >= 6]


def names_it(sentence: tuple[str, ...]) -> bool:
    """Whether a sentence gives its library away by name."""
    names = {*LIBRARIES, "scikit", "learn", "pyplot", "np", "plt", "mpl", "sm"}
    return not names.isdisjoint(sentence)


class Split(NamedTuple):
    words: np.ndarray  # (n, LENGTH)
    labels: np.ndarray  # (n,)


@functools.cache
def load() -> tuple[Split, Split]:
    """Sentences to learn from and to test on, from different source files."""
    rng = np.random.default_rng(0)
    learned, tested, seen = [], [], set()
    for label, library in enumerate(LIBRARIES):
        folder = Path(importlib.util.find_spec(library).origin).parent
        files = sorted(f for f in folder.rglob("*.py") if "tests" not in f.parts)
        chosen: list[list] = [[], []]
        for index in rng.permutation(len(files)):
            part = chosen[rng.random() < 0.2]  # a file is wholly on one side
            for text in docstrings(files[index]):
                for sentence in sentences(text):
                    if sentence not in seen and not names_it(sentence):
                        seen.add(sentence)
                        part.append((sentence, label))
            if sum(map(len, chosen)) >= SENTENCES_A_LIBRARY:
                break
        learned += chosen[0]
        tested += chosen[1]
    counts = Counter(word for sentence, _ in learned for word in sentence)
    frequent = counts.most_common(NUM_WORDS - 2)
    vocabulary = {word: i for i, (word, _) in enumerate(frequent, UNKNOWN + 1)}

    def encoded(examples: list) -> Split:
        words = np.full((len(examples), LENGTH), PADDING, np.int32)
        for row, (sentence, _) in zip(words, examples, strict=True):
            ids = [vocabulary.get(word, UNKNOWN) for word in sentence[:LENGTH]]
            row[: len(ids)] = ids
        labels = np.array([label for _, label in examples], np.int32)
        order = rng.permutation(len(labels))
        return Split(words[order], labels[order])

    return encoded(learned), encoded(tested)


# ---- model


class Encoder(nn.Module):
    """A transformer encoder; the mean over words is classified."""

    width: int = 32
    num_heads: int = 2
    num_blocks: int = 1

    @nn.compact
    def __call__(self, words, dropout: bool = False):
        used = words != PADDING
        x = nn.Embed(NUM_WORDS, self.width, name="words")(words)
        x = x + nn.Embed(LENGTH, self.width, name="positions")(jnp.arange(LENGTH))[None]
        x = nn.Dropout(0.3, deterministic=not dropout)(x)
        mask = used[:, None, None, :]  # (n, heads, queries, keys)
        for number in range(self.num_blocks):
            y = nn.LayerNorm(name=f"norm_{number}a")(x)
            attention = nn.MultiHeadDotProductAttention(
                self.num_heads, name=f"attention_{number}"
            )
            x = x + attention(y, mask=mask)
            y = nn.LayerNorm(name=f"norm_{number}b")(x)
            y = nn.gelu(nn.Dense(2 * self.width, name=f"wide_{number}")(y))
            x = x + nn.Dense(self.width, name=f"narrow_{number}")(y)
        x = nn.LayerNorm(name="norm")(x) * used[..., None]
        mean = x.sum(1) / jnp.maximum(used.sum(1), 1)[:, None]
        return nn.Dense(len(LIBRARIES), name="head")(mean)


network, likelihood = Encoder(), ff.likelihoods.categorical()


def apply_fn(params, words):
    return network.apply({"params": params}, words)


# ---- learning


@functools.cache
def train():
    """Trained parameters: Adam on the mean negative log-likelihood."""
    data, _ = load()
    key = jax.random.key(0)
    params = network.init(key, data.words[:1])["params"]
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS)
    optimizer = optax.adamw(schedule, weight_decay=0.1)

    @jax.jit
    def step(params, opt_state, batch, key):
        def loss(params):
            logits = network.apply(
                {"params": params}, batch.words, True, rngs={"dropout": key}
            )
            return -likelihood.log_prob(logits, batch.labels).mean()

        gradients = jax.grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, rng = optimizer.init(params), np.random.default_rng(1)
    for number in tqdm(range(NUM_STEPS), "training", unit="step", disable=None):
        rows = rng.integers(len(data.labels), size=BATCH_SIZE)
        batch = Split(data.words[rows], data.labels[rows])
        step_key = jax.random.fold_in(key, number)
        params, opt_state = step(params, opt_state, batch, step_key)
    return jax.block_until_ready(params)


def accuracy(params, data: Split) -> float:
    logits = jax.jit(apply_fn)(params, data.words)
    return float(np.mean(np.argmax(logits, 1) == data.labels))


def problem() -> comparison.Problem:
    """What `fisherflow-estimators estimate text_classifier.py:problem` runs on."""
    data, _ = load()
    batches = [
        (data.words[i : i + BATCH_SIZE], data.labels[i : i + BATCH_SIZE])
        for i in range(0, NUM_FISHER_BATCHES * BATCH_SIZE, BATCH_SIZE)
    ]
    return comparison.Problem(apply_fn, likelihood, train(), batches)


# ---- estimators


RUNS = [
    (ff.estimators.hutchinson, {"groups": 16}),
    (ff.estimators.hutchinson_rank1, {"groups": 16}),
    (ff.estimators.monte_carlo, {"groups": 16}),
    (ff.estimators.empirical, {}),
]


def main() -> None:
    began = time.perf_counter()
    learned, tested = load()
    print(
        f"{len(learned.labels)} sentences of {', '.join(LIBRARIES)} to learn from, "
        f"{len(tested.labels)} of other files to test on",
        flush=True,
    )
    params = train()
    most = np.bincount(tested.labels).max() / len(tested.labels)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(
        f"{sizes} parameters; accuracy {accuracy(params, tested):.3f} on the test "
        f"sentences ({accuracy(params, learned):.3f} where it learned; always naming "
        f"one library: {most:.3f})\n",
        flush=True,
    )
    task = problem()
    truth = comparison.estimate(ff.estimators.exact, task)
    others = [comparison.estimate(run, task, **options) for run, options in RUNS]
    folder = Path("estimates")
    folder.mkdir(exist_ok=True)
    for measurement in (truth, *others):
        comparison.save(folder / f"{measurement.stem}.npz", measurement)
    print(comparison.table(comparison.compare(truth, others)))
    figure = comparison.plot(truth, others)
    figure.savefig("estimates.png", dpi=100)
    print(f"\nDone in {time.perf_counter() - began:.0f} s: {folder}/, estimates.png")


if __name__ == "__main__":
    main()
