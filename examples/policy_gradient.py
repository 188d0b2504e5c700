"""A cart that balances its pole: natural policy gradient beside PPO with Adam.

The cart and pole of Barto, Sutton and Anderson, with a limit of 200 steps, in JAX. A
policy's actions are a likelihood's targets, so that its Fisher information, and the
bound on how far a step may move it, are those of any model. Once for each batch of
whole episodes the natural gradient goes as far as the bound allows, and back by halves
until the surrogate rises (TRPO). Beside it: PPO, many clipped steps of Adam on the same
batch. Both have the same network, value network (by Adam), advantages, and a grid of
36 settings: batches of 1, 4, 10 episodes, each with `max_kl` 0.003, 0.01, 0.03, 0.1 by
damping 0.1, 1, 10, or with 5, 10, 20 epochs by rates 0.001, 0.003, 0.01, 0.03, in this
order below. The seeds they are compared on are not those they were tuned on.

Tuned over all, both take one episode to a batch, and PPO wins: 10 episodes (standard
error 1) against 23 (3), where the plain gradient within the same bound takes 12 (1): an
episode's information is too poor a metric. With ten to a batch the natural gradient
takes 56 (2), PPO 60 (2), which 30 seeds do not tell apart, and the plain gradient 116
(5). That is 6 policy steps, and 120 of PPO, of which about sixteen cost as much as one.
The line search never shortens a step there; with the larger bound that single episodes
chose, a hundred episodes once fall to a mean of 107 without it.

    python examples/policy_gradient.py

A minute; with `--full`, which tunes and has thirty seeds, seven. Saves the picture in
`outputs/`. Needs `pip install "fisherflow-jax[examples]"`.

Barto, Sutton, Anderson, "Neuronlike adaptive elements that can solve difficult learning
control problems", 1983. Kakade, "A natural policy gradient", 2001. Schulman, Levine,
Abbeel, Jordan, Moritz, "Trust region policy optimization", 2015. Schulman, Wolski,
Dhariwal, Radford, Klimov, "Proximal policy optimization algorithms", 2017.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import figures
import form
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import fisherflow_jax as ff

LIMIT, SOLVED, WINDOW, BUDGET = 200, 195.0, 100, 300  # steps, mean return, episodes
HIDDEN, DISCOUNT, TRACE, PARTS = 32, 0.99, 0.95, 4  # parts: minibatches of an epoch
MASSES, POLE, HALF, GRAVITY, FORCE = 1.1, 0.1, 0.5, 9.8, 10.0  # cart and pole; pole
SCALES = jnp.array([1.0, 1.0, 5.0, 1.0])


def rates(state: jax.Array, force: jax.Array) -> jax.Array:
    """How place, speed, the pole's angle from upright and its speed change."""
    _, speed, angle, turning = state
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (force + POLE * HALF * turning**2 * sine) / MASSES
    inertia = HALF * (4 / 3 - POLE * cosine**2 / MASSES)
    turn = (GRAVITY * sine - cosine * push) / inertia
    return jnp.stack(
        [speed, push - POLE * HALF * turn * cosine / MASSES, turning, turn]
    )


def network(params: dict, states: jax.Array) -> jax.Array:
    """A state's value; of a policy, the log-odds of a push to the right. `(n,)`."""
    hidden = jnp.tanh(states * SCALES @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


MODEL = network, ff.likelihoods.bernoulli()


def start(key: jax.Array) -> dict:
    keys = jax.random.split(key)
    return {
        "w1": jax.random.normal(keys[0], (4, HIDDEN)) / 2,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN,)) / 100,
        "b2": jnp.zeros(()),
    }


def play(policy: dict, key: jax.Array, episodes: int) -> tuple[jax.Array, ...]:
    """Whole episodes, `(LIMIT, episodes)`: states, pushes, states after, up, stands."""
    first, rest = jax.random.split(key)

    def step(carried: tuple, key: jax.Array) -> tuple:
        states, up = carried
        right = jax.random.bernoulli(key, jax.nn.sigmoid(network(policy, states)))
        change = jax.vmap(rates)(states, jnp.where(right, FORCE, -FORCE))
        after = jnp.where(up[:, None], states + 0.02 * change, states)
        fallen = (abs(after[:, 0]) > 2.4) | (abs(after[:, 2]) > jnp.deg2rad(12))
        stands = up & ~fallen
        return (after, stands), (states, right.astype(float), after, up, stands)

    states = jax.random.uniform(first, (episodes, 4), minval=-0.05, maxval=0.05)
    upright = states, jnp.ones(episodes, bool)
    return jax.lax.scan(step, upright, jax.random.split(rest, LIMIT))[1]


# ---- what both learn from: rows of (states, pushes, weights, advantages, returns)


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1)


def rows_of(value: dict, played: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Generalised advantages, standardised. The limit is no fall: it has a value."""
    states, pushes, after, up, stands = played
    now, then = network(value, states), network(value, after)
    surprises = 1 + DISCOUNT * then * stands - now

    def back(later: jax.Array, step: tuple) -> tuple[jax.Array, jax.Array]:
        later = step[0] + DISCOUNT * TRACE * step[1] * later
        return later, later

    zeros, weights = jnp.zeros(up.shape[1]), up.astype(float)
    _, found = jax.lax.scan(back, zeros, (surprises, stands), reverse=True)
    centred = found - mean(found, weights)
    advantages = centred / (jnp.sqrt(mean(centred**2, weights)) + 1e-6)
    rows = states, pushes, weights, advantages, found + now
    return tuple(x.reshape(-1, *x.shape[2:]) for x in rows)


def descend(optimizer, loss, params, state, rows, key, epochs: int) -> tuple:
    """Epochs of minibatches: the parameters and the optimiser's state after them."""

    def step(carried: tuple, part: jax.Array) -> tuple:
        params, state = carried
        gradients = jax.grad(loss)(params, *(x[part] for x in rows))
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carried: tuple, key: jax.Array) -> tuple:
        parts = jax.random.permutation(key, len(rows[0])).reshape(PARTS, -1)
        return jax.lax.scan(step, carried, parts)

    return jax.lax.scan(epoch, (params, state), jax.random.split(key, epochs))[0]


def value_loss(value, states, pushes, weights, advantages, returns) -> jax.Array:
    return mean((network(value, states) - returns) ** 2, weights)


def log_probs(policy: dict, states: jax.Array, pushes: jax.Array) -> jax.Array:
    return MODEL[1].log_prob(network(policy, states), pushes)


# ---- two ways to learn: (numbers, epochs) -> an optimiser, and what a batch changes


def natural(numbers: jax.Array, epochs: int) -> tuple[Any, Callable]:
    """Natural gradient; `epochs` is 1: one step for a batch."""
    max_kl, damping, searched = numbers
    exact = ff.estimators.exact(*MODEL, ff.structures.full())
    memory = ff.memories.exponential(1e-3)  # this batch alone
    optimizer = optax.chain(
        ff.natural_gradient(1e3, exact, memory=memory, damping=damping),
        ff.clip_by_kl(*MODEL, max_kl),  # what sets the length of a step
    )

    def improve(policy, state, rows, key) -> tuple:
        states, pushes, weights, advantages, _ = rows
        before, odds = log_probs(policy, states, pushes), network(policy, states)

        def surrogate(policy: dict) -> jax.Array:
            ratios = jnp.exp(log_probs(policy, states, pushes) - before)
            return mean(ratios * advantages, weights)

        gradients = jax.grad(lambda policy: -surrogate(policy))(policy)
        batch = ff.Batch(states, pushes, weights)
        updates, state = optimizer.update(gradients, state, policy, batch=batch)

        def moved(share: jax.Array) -> dict:
            return jax.tree.map(lambda p, u: p + share * u, policy, updates)

        def accepted(share: jax.Array) -> jax.Array:
            new = network(moved(share), states)
            kl = jax.nn.softplus(new) - jax.nn.softplus(odds)
            kl = mean(kl - jax.nn.sigmoid(odds) * (new - odds), weights)
            return (surrogate(moved(share)) > surrogate(policy)) & (kl < 1.5 * max_kl)

        shares = 0.5 ** jnp.arange(8)
        good = jax.vmap(accepted)(shares)
        found = jnp.where(good.any(), shares[jnp.argmax(good)], 0.0)
        return moved(jnp.where(searched > 0, found, 1.0)), state

    return optimizer, improve


def clipped(numbers: jax.Array, epochs: int) -> tuple[Any, Callable]:
    """PPO with Adam; ratios of probabilities are clipped at a fifth."""
    optimizer = optax.adam(numbers[0])

    def loss(policy, states, pushes, weights, advantages, _, before) -> jax.Array:
        ratios = jnp.exp(log_probs(policy, states, pushes) - before)
        least = jnp.minimum(ratios * advantages, ratios.clip(0.8, 1.2) * advantages)
        return -mean(least, weights)

    def improve(policy, state, rows, key) -> tuple:
        rows = *rows, log_probs(policy, *rows[:2])
        return descend(optimizer, loss, policy, state, rows, key, epochs)

    return optimizer, improve


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(way: Callable, batch: int, epochs: int, budget: int, numbers, keys):
    """Returns of the episodes, `(numbers, keys, budget)`."""
    of_value = optax.adam(0.01)

    def one(numbers: jax.Array, key: jax.Array) -> jax.Array:
        optimizer, improve = way(numbers, epochs)

        def iteration(carried: tuple, key: jax.Array) -> tuple:
            policy, state, *value = carried
            keys = jax.random.split(key, 3)
            played = play(policy, keys[0], batch)
            rows = rows_of(value[0], played)
            policy, state = improve(policy, state, rows, keys[1])
            value = descend(of_value, value_loss, *value, rows, keys[2], 10)
            return (policy, state, *value), jnp.sum(played[3], 0)

        keys = jax.random.split(key, 3)
        policy, value = start(keys[0]), start(keys[1])
        carried = policy, optimizer.init(policy), value, of_value.init(value)
        keys = jax.random.split(keys[2], budget // batch)
        return jax.lax.scan(iteration, carried, keys)[1].ravel()

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(numbers, keys)


# ---- beside each other

BATCHES = 1, 4, 10  # episodes
BOUNDS, DAMPINGS = (0.003, 0.01, 0.03, 0.1), (0.1, 1.0, 10.0)
EPOCHS, RATES = (5, 10, 20), (0.001, 0.003, 0.01, 0.03)
GRIDS = {  # of each way: its epochs, its numbers, and what these are
    natural: ((1,), [*itertools.product(BOUNDS, DAMPINGS, [1.0])], "max_kl, damping"),
    clipped: (EPOCHS, [(rate,) for rate in RATES], "rate"),
}
# Batch, epochs, numbers that the full form chose: of all, and of the largest batches.
CHOSEN = {
    natural: [(1, 1, (0.1, 1.0, 1.0)), (10, 1, (0.01, 0.1, 1.0))],
    clipped: [(1, 10, (0.003,)), (10, 5, (0.003,))],
}


def until(returns: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Episodes before the first hundred that solves it; the least mean from there on.

    Hundreds begin with a batch. Where none does: all episodes but the last hundred.
    """
    sums = np.cumsum(np.insert(returns, 0, 0, -1), -1)
    means = ((sums[..., WINDOW:] - sums[..., :-WINDOW]) / WINDOW)[..., ::batch]
    never = ~np.any(means >= SOLVED, -1)
    first = np.where(never, means.shape[-1] - 1, np.argmax(means >= SOLVED, -1))
    later = np.arange(means.shape[-1]) >= first[..., None]
    return first * batch, np.where(later, means, np.inf).min(-1)


def tune(way: Callable, keys: jax.Array) -> list[tuple[int, int, tuple]]:
    """The settings whose means are least: of all, and of the largest batches."""
    many_epochs, rows, names = GRIDS[way]
    found = {}
    print(f"{way.__doc__.partition(';')[0]}: mean episodes of {len(keys)} seeds")
    for batch, epochs in itertools.product(BATCHES, many_epochs):
        returns = np.asarray(train(way, batch, epochs, 200, jnp.array(rows), keys))
        means = until(returns, batch)[0].mean(-1)
        found |= {(batch, epochs, row): m for row, m in zip(rows, means, strict=True)}
        cells = " ".join(f"{m:3.0f}" for m in means)
        print(
            f"  batch {batch:2d}, epochs {epochs:2d}, by {names}: {cells}", flush=True
        )
    large = [setting for setting in found if setting[0] == BATCHES[-1]]
    return [min(settings, key=found.get) for settings in (found, large)]


def report(name: str, returns: np.ndarray, batch: int, steps: float) -> np.ndarray:
    """A line of the table: steps are those of the policy for an episode."""
    episodes, least = until(returns, batch)
    error = episodes.std(ddof=1) / np.sqrt(len(episodes))
    print(
        f"{name:26s} {episodes.mean():5.1f} ({error:4.1f})  "
        f"{episodes.min():3d} to {episodes.max():3d}  "
        f"{episodes.mean() * steps:6.1f} ({error * steps:5.1f})  "
        f"{least.min():11.0f}  {np.mean(episodes == BUDGET - WINDOW):8.2f}"
    )
    return episodes


def draw(both: list[dict], path: Path) -> None:
    """Mean returns of twenty episodes, over seeds: by episodes and by policy steps."""
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.8), sharey=True, layout="constrained"
    )
    panels = (both[0], False), (both[1], False), (both[1], True)
    titles = "the best setting of all", f"the best with batches of {BATCHES[-1]}", ""
    for axis, title, (curves, by_steps) in zip(axes, titles, panels, strict=True):
        colours = figures.BLUE, figures.GREY, figures.ORANGE
        for colour, (name, (returns, steps)) in zip(
            colours, curves.items(), strict=True
        ):
            sums = np.cumsum(returns, -1)[:, :220]
            means = (sums[:, 20:] - sums[:, :-20]) / 20
            middle, error = means.mean(0), means.std(0, ddof=1) / np.sqrt(len(means))
            x = np.arange(20, 20 + len(middle)) * (steps if by_steps else 1)
            axis.plot(x, middle, color=colour, lw=1.5, label=name)
            band = middle - error, np.minimum(middle + error, LIMIT)
            axis.fill_between(x, *band, color=colour, alpha=0.2, lw=0)
        axis.axhline(SOLVED, color="black", lw=0.8, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlabel="policy steps" if by_steps else "episodes")
        axis.set_title(title or titles[1], fontsize=10)
    axes[0].set(ylabel="return, mean of the last 20")
    axes[0].legend(frameon=False, loc="lower right")
    axes[2].set(xscale="log")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


def compare(ours: tuple, theirs: tuple, keys: jax.Array) -> dict:
    """A table, and its curves: (returns, policy steps for an episode)."""
    batch, _, (bound, damping, _) = ours
    ways = {
        "natural gradient": (bound, damping, 1.0),
        "  without the line search": (bound, damping, 0.0),
        "  gradient, the same bound": (bound, 1000.0, 1.0),
    }
    print(
        f"natural: batch {batch}, max_kl {bound}, damping {damping}; "
        f"PPO: batch {theirs[0]}, epochs {theirs[1]}, rate {theirs[2][0]}\n"
        f"{'':26s} episodes       range      policy steps  least later  unsolved"
    )
    found = np.asarray(
        train(natural, batch, 1, BUDGET, jnp.array([*ways.values()]), keys)
    )
    adam = train(clipped, *theirs[:2], BUDGET, jnp.array(theirs[2:]), keys)[0]
    steps, of_adam = 1 / batch, theirs[1] * PARTS / theirs[0]
    lines = zip(ways, found, strict=True)
    episodes, *_ = [report(name, returns, batch, steps) for name, returns in lines]
    apart = episodes - report("PPO with Adam", np.asarray(adam), theirs[0], of_adam)
    error = apart.std(ddof=1) / np.sqrt(len(keys))
    print(f"natural gradient less PPO, by seeds: {apart.mean():.1f} ({error:.1f})")
    return {
        "natural gradient": (found[0], steps),
        "gradient, the same bound": (found[2], steps),
        "PPO with Adam": (np.asarray(adam), of_adam),
    }


def main(full: bool) -> None:
    chosen, tuned_on = CHOSEN, jax.random.split(jax.random.key(0), 6)
    if full:
        chosen = {way: tune(way, tuned_on) for way in GRIDS}
    keys = jax.random.split(jax.random.key(1), 30 if full else 3)
    print(
        f"{len(keys)} other seeds, before {WINDOW} episodes of mean {SOLVED:g}: "
        "means (errors)"
    )
    both = [compare(*settings, keys) for settings in zip(*chosen.values(), strict=True)]
    draw(both, Path("outputs/policy_gradient.png"))


if __name__ == "__main__":
    main(form.full(__doc__))
