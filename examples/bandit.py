"""Which article to show: Thompson sampling and upper bounds by a sparse flow.

Visitors of eight kinds come in groups of fifty, and each is shown one of twelve
articles. Whether they read it depends on the kind, the article, and both together:
crosses of ids, hashed into 2^16 features, of which a row has four. After each group the
flow learns from what was read. Beside each other: at random, what looks best (greedy),
the upper bound of an interval, and a draw from the posterior (Thompson). The regret is
what the best article for each visitor would have had in reads, less what was shown.

    python examples/bandit.py

Half a minute. Saves the regrets in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

from collections.abc import Callable
from pathlib import Path

import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fisherflow_jax as ff

KINDS, ARTICLES, VISITORS, GROUPS, WORLDS = 8, 12, 50, 150, 8
NUM_FEATURES = 2**16
flow = ff.sparse.flow(ff.likelihoods.bernoulli(), NUM_FEATURES, prior_precision=1.0)


def hashed(*parts: jax.Array) -> jax.Array:
    """A feature for each combination of numbers, from 1 on."""
    code = jnp.zeros((), jnp.uint32)
    for part in parts:
        code = (code * jnp.uint32(1_000_003) + part.astype(jnp.uint32)) * jnp.uint32(
            2_654_435_761
        )
        code = code ^ (code >> 15)
    return (code % (NUM_FEATURES - 1) + 1).astype(jnp.int32)


def rows(kinds: jax.Array, articles: jax.Array) -> ff.sparse.Rows:
    """An intercept, the kind, the article, and both; `(n, 4)`."""
    tag = jnp.zeros_like(kinds)
    indices = jnp.stack(
        [
            tag,
            hashed(tag, kinds),
            hashed(tag + 1, articles),
            hashed(kinds + 2, articles),
        ],
        axis=1,
    )
    return ff.sparse.Rows(indices, jnp.ones(indices.shape))


# Each rule: (state, rows of all visitors with all articles, key) -> a value for each.


def at_random(state, rows, key):
    return jax.random.uniform(key, (len(rows.indices),))


def greedy(state, rows, key):
    return flow.predict(state, rows).mean


def upper_bound(state, rows, key):
    return flow.predict(state, rows, level=0.8).upper


def thompson(state, rows, key):
    return flow.sample(state, rows, key)


def regret(rule: Callable, key: jax.Array) -> jax.Array:
    """Of each group, summed, in one world; `(GROUPS,)`."""
    parts = jax.random.split(key, 4)
    sizes = (KINDS, 1), (1, ARTICLES), (KINDS, ARTICLES)
    spreads = 0.5, 0.5, 1.0
    logits = -2.0 + sum(
        spread * jax.random.normal(part, size)
        for part, size, spread in zip(parts, sizes, spreads, strict=False)
    )

    def group(state, key):
        of_kinds, of_rule, of_reads = jax.random.split(key, 3)
        kinds = jax.random.randint(of_kinds, (VISITORS,), 0, KINDS)
        pairs = jnp.repeat(kinds, ARTICLES), jnp.tile(jnp.arange(ARTICLES), VISITORS)
        values = rule(state, rows(*pairs), of_rule)
        shown = jnp.argmax(values.reshape(VISITORS, ARTICLES), 1)
        chances = jax.nn.sigmoid(logits[kinds])
        chance = chances[jnp.arange(VISITORS), shown]
        read = jax.random.bernoulli(of_reads, chance).astype(float)
        state, _ = flow.update(state, (rows(kinds, shown), read))
        return state, jnp.sum(jnp.max(chances, 1) - chance)

    return jnp.cumsum(
        jax.lax.scan(group, flow.init(), jax.random.split(parts[3], GROUPS))[1]
    )


def main() -> None:
    rules = {
        "random": at_random,
        "greedy": greedy,
        "upper bound": upper_bound,
        "Thompson": thompson,
    }
    keys = jax.random.split(jax.random.key(0), WORLDS)
    shown = np.arange(1, GROUPS + 1) * VISITORS
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = figures.GREY, figures.ORANGE, figures.BLUE, "#1b7837"
    print(f"{WORLDS} worlds; regret in reads after {shown[-1]:,} visitors")
    for (name, rule), colour in zip(rules.items(), colours, strict=True):
        each = jax.jit(
            lambda keys, rule=rule: jax.lax.map(lambda k: regret(rule, k), keys)
        )
        found = np.asarray(each(keys))
        error = found[:, -1].std(ddof=1) / np.sqrt(WORLDS)
        half = found[:, GROUPS // 2].mean()
        print(
            f"{name:12s} {found[:, -1].mean():7.0f} ({error:.0f}), at half {half:7.0f}"
        )
        middle, spread = found.mean(0), found.std(0, ddof=1) / np.sqrt(WORLDS)
        axis.plot(shown, middle, color=colour, lw=1.5, label=name)
        axis.fill_between(
            shown, middle - spread, middle + spread, color=colour, alpha=0.2
        )
    axis.set(xlabel="visitors", ylabel="regret, in reads")
    axis.set_ylim(0, 900)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    path = Path("outputs/bandit.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


if __name__ == "__main__":
    main()
