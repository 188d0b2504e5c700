"""Causal effects as sums: instruments, and a doubly robust mean, with their sandwiches.

1. Instruments. Price and demand share causes that nobody recorded, so that least
   squares of one on the other is wrong. One flow streams the regression of *both* on
   the instruments; two-stage least squares is a function of its state, and its robust
   standard error the delta method's. Equal to the closed form, and covered as it should
   be in a simulation, where the standard error of a right variance is not. With weak
   instruments the interval fails, and a Wald test of the same state (Anderson and
   Rubin's) does not.
2. A mean effect. Who is treated depends on covariates. Each row's score uses what two
   flows predicted *before* they learnt from it, which is the sample splitting that the
   theory asks for, at no cost; the mean of the scores is a third flow. It is right if
   one of the two models is, and not if both are wrong. Early predictions are poor:
   where the treatment's model alone is right, the mean is off by a fifth of its
   standard deviation.

    python examples/causal.py

Three quarters of a minute; with `--full`, of 1,000 runs, a minute. Saves the picture in
`outputs/`. Needs `pip install "fisherflow-jax[examples]"`.

Wright, "The tariff on animal and vegetable oils", 1928. Anderson, Rubin, "Estimation of
the parameters of a single equation in a complete system of stochastic equations", 1949.
Robins, Rotnitzky, Zhao, "Estimation of regression coefficients when some regressors are
not always observed", 1994. Chernozhukov and others, "Double/debiased machine learning
for treatment and structural parameters", 2018.
"""

from collections.abc import Callable
from pathlib import Path

import figures
import form
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fisherflow_jax as ff

jax.config.update("jax_enable_x64", True)

EFFECT, BATCHES, ROWS = 0.5, 10, 100
STRONG, WEAK = np.array([0.6, 0.4]), np.array([0.06, 0.04])


def linear(params: jax.Array, x: jax.Array) -> jax.Array:
    return x @ params


# ---- instruments

REDUCED = ff.fisher_flow(
    linear, ff.likelihoods.gaussian(), prior_precision=1e-8, num_steps=1, robust=True
)


def market(key: jax.Array, strength: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Instruments with a column of ones, and (x, y): in batches."""
    hidden, ours, noise = jax.random.normal(key, (3, BATCHES, ROWS))
    z = jax.random.normal(jax.random.fold_in(key, 1), (BATCHES, ROWS, 2))
    x = z @ strength + 1.2 * hidden + 0.5 * ours
    y = EFFECT * x + hidden * jnp.sqrt(0.5 + z[..., 0] ** 2) + 0.3 * noise
    ones = jnp.ones((BATCHES, ROWS, 1))
    return jnp.concatenate([ones, z], -1), jnp.stack([x, y], -1)


def slope(state: ff.FlowState) -> Callable:
    """Two-stage least squares: of fitted y on fitted x, as a function of both fits."""
    squares = ff.information.to_dense(state.information)[::2, ::2]  # those of x alone
    means = squares[0] / squares[0, 0]
    middle = squares - squares[0, 0] * jnp.outer(means, means)

    def function(params: jax.Array) -> jax.Array:
        first, second = params[:, 0], params[:, 1]
        return (first @ middle @ second) / (first @ middle @ first)

    return function


def by_state(z: jax.Array, both: jax.Array) -> tuple[ff.FlowState, ff.Estimate]:
    start = REDUCED.init(jnp.zeros((3, 2)))
    state, _ = jax.lax.scan(REDUCED.update, start, (z, both))
    return state, ff.delta_method(state, slope(state), robust=True)


def closed(z: jax.Array, both: jax.Array) -> tuple[jax.Array, ...]:
    """The textbook's: estimate, its sandwich and plain errors, least squares, F."""
    z, x, y = z.reshape(-1, 3), both[..., 0].ravel(), both[..., 1].ravel()
    x, y = x - x.mean(), y - y.mean()
    fitted = z @ jnp.linalg.lstsq(z, x)[0]
    estimate = fitted @ y / (fitted @ fitted)
    left = y - estimate * x
    sandwich = jnp.linalg.norm(fitted * left) / (fitted @ fitted)
    plain = jnp.std(left) / jnp.linalg.norm(fitted)
    strength = fitted @ fitted / 2 / jnp.var(x - fitted)  # of two instruments
    return estimate, sandwich, plain, x @ y / (x @ x), strength


def structural(params: jax.Array) -> jax.Array:
    """What the instruments say of y beside the true effect of x: nothing, (2,)."""
    return (params[:, 1] - EFFECT * params[:, 0])[1:]


def share(inside: np.ndarray) -> str:
    """A share of runs, with its binomial standard error."""
    found = np.mean(inside)
    return f"{found:.3f} ({np.sqrt(found * (1 - found) / len(inside)):.3f})"


def within(estimate: np.ndarray, error: np.ndarray, truth: float) -> np.ndarray:
    return np.abs(np.asarray(estimate) - truth) < 1.96 * np.asarray(error)


def instruments(axis: plt.Axes, runs: int) -> None:
    z, both = market(jax.random.key(0), STRONG)
    state, _ = by_state(z, both)
    state = ff.refine(REDUCED, state, (z, both))  # every score at the same estimate
    found, expected = ff.delta_method(state, slope(state), robust=True), closed(z, both)
    print(
        f"1. Instruments, {BATCHES * ROWS} rows: the state's estimate "
        f"{found.estimate:.6f} ({found.standard_error:.6f}), "
        f"the closed form's {expected[0]:.6f} ({expected[1]:.6f})"
    )
    np.testing.assert_allclose(found.estimate, expected[0], rtol=1e-6)
    np.testing.assert_allclose(found.standard_error, expected[1], rtol=0.01)
    print(f"   {runs} runs, true effect {EFFECT}; medians, coverage at 95 % (errors)")
    many, keys = jax.jit(jax.vmap(by_state)), jax.random.split(jax.random.key(1), runs)
    for name, strength in (("strong", STRONG), ("weak", WEAK)):
        data = jax.vmap(market, (0, None))(keys, strength)
        states, found = many(*data)
        estimate, _, plain, least, first = jax.vmap(closed)(*data)
        print(
            f"   {name:6s} ones, first-stage F {np.median(first):.3g}: "
            f"{np.median(found.estimate):.3f}, least squares {np.median(least):.3f}\n"
            f"          coverage by the sandwich "
            f"{share(within(found.estimate, found.standard_error, EFFECT))}, "
            f"one variance {share(within(estimate, plain, EFFECT))}"
        )
        bins = np.linspace(-0.5, 2.0, 80)
        colour = figures.BLUE if name == "strong" else figures.ORANGE
        axis.hist(found.estimate, bins, color=colour, alpha=0.6, label=f"{name} ones")
    states = jax.device_get(states)
    accepted = [
        ff.wald_test(one, structural, robust=True).p_value > 0.05
        for one in (jax.tree.map(lambda x, k=k: x[k], states) for k in range(runs))
    ]
    print(f"   Anderson and Rubin's test, weak or strong: {share(np.array(accepted))}")
    axis.axvline(EFFECT, color="black", lw=1)
    axis.axvline(
        np.mean(least), color=figures.GREY, ls="--", lw=1, label="least squares"
    )
    axis.set(title="Estimates by instruments", xlabel="effect", yticks=[])


# ---- a mean effect

OUTCOME = ff.fisher_flow(linear, ff.likelihoods.gaussian(), prior_precision=0.01)
CHANCE = ff.fisher_flow(linear, ff.likelihoods.bernoulli(), prior_precision=0.01)
MEAN = ff.fisher_flow(
    linear, ff.likelihoods.gaussian(), prior_precision=1e-8, robust=True
)


def trial(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Covariates, who is treated, outcomes: in batches. The mean effect is 1."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (BATCHES, ROWS, 2))
    treated = jax.random.bernoulli(keys[1], jax.nn.sigmoid(x @ jnp.array([0.8, -0.5])))
    effect = 1 + 0.5 * x[..., 0]
    y = x @ jnp.array([1.0, 0.5]) + effect * treated
    return x, treated.astype(float), y + jax.random.normal(keys[2], y.shape)


def features(x: jax.Array, right: bool) -> jax.Array:
    """With a column of ones; the wrong ones know of the covariates only their size."""
    x = jnp.where(right, x, x**2)
    return jnp.concatenate([jnp.ones((len(x), 1)), x], 1)


def score(
    y: jax.Array, treated: jax.Array, arms: tuple, chance: jax.Array
) -> jax.Array:
    """Each row's efficient score of the mean effect, `(n,)`."""
    off, on = arms
    pulled = treated * (y - on) / chance - (1 - treated) * (y - off) / (1 - chance)
    return on - off + pulled


def streamed(key: jax.Array, outcome_right: bool, chance_right: bool) -> jax.Array:
    """Estimate and standard error of the mean effect, (2,)."""

    def step(states: tuple, batch: tuple) -> tuple[tuple, None]:
        of_outcome, of_chance, mean = states
        x, treated, y, weight = batch
        seen, given = features(x, outcome_right), features(x, chance_right)
        design = jnp.concatenate([seen, treated[:, None] * seen], 1)
        half = seen.shape[1]  # before they learn from it: a prediction of new rows
        off = seen @ of_outcome.mean[:half]
        on = off + seen @ of_outcome.mean[half:]
        chance = jax.nn.sigmoid(given @ of_chance.mean).clip(0.02, 0.98)
        scores = score(y, treated, (off, on), chance)
        ones = jnp.ones((len(y), 1))
        return (
            OUTCOME.update(of_outcome, (design, y))[0],
            CHANCE.update(of_chance, (given, treated))[0],
            MEAN.update(mean, (ones, scores, jnp.full(len(y), weight)))[0],
        ), None

    start = (
        OUTCOME.init(jnp.zeros(6)),
        CHANCE.init(jnp.zeros(3)),
        MEAN.init(jnp.zeros(1)),
    )
    learnt_only = jnp.arange(BATCHES) > 0  # the first batch has no scores: weight 0
    batches = *trial(key), learnt_only.astype(float)
    (_, _, mean), _ = jax.lax.scan(step, start, batches)
    return jnp.stack([mean.mean[0], ff.standard_error(mean, robust=True)[0]])


def oracle(key: jax.Array) -> jax.Array:
    """The same by the true models."""
    x, treated, y = (part[1:].reshape(-1, *part.shape[2:]) for part in trial(key))
    off = x @ jnp.array([1.0, 0.5])
    arms = off, off + 1 + 0.5 * x[:, 0]
    scores = score(y, treated, arms, jax.nn.sigmoid(x @ jnp.array([0.8, -0.5])))
    return jnp.stack([scores.mean(), scores.std() / jnp.sqrt(len(y))])


def mean_effect(axis: plt.Axes, runs: int) -> None:
    keys = jax.random.split(jax.random.key(2), runs)
    print(f"2. A mean effect of 1: {runs} runs; the first batch is only learnt from")
    print("                    mean (error)   deviation  mean error  coverage (error)")
    bins = np.linspace(0.5, 2.0, 80)
    many = jax.jit(jax.vmap(streamed, (0, None, None)))
    for name, way in (
        ("true models", None),
        ("both right", (True, True)),
        ("outcomes wrong", (False, True)),
        ("treatment wrong", (True, False)),
        ("both wrong", (False, False)),
    ):
        found = jax.vmap(oracle)(keys) if way is None else many(keys, *way)
        estimate, error = np.asarray(found).T
        deviation = estimate.std(ddof=1)
        print(
            f"   {name:16s} {estimate.mean():.3f} ({deviation / np.sqrt(runs):.3f})  "
            f"{deviation:9.3f}  {error.mean():10.3f}  "
            f"{share(within(estimate, error, 1.0))}"
        )
        if way is not None:
            axis.hist(estimate, bins, histtype="step", lw=1.5, label=name)
            assert (abs(estimate.mean() - 1) < 0.1) == any(way)
    axis.axvline(1.0, color="black", lw=1)
    axis.set(title="Mean effects, doubly robust", xlabel="effect", yticks=[])


def main(full: bool) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for part, axis in zip((instruments, mean_effect), axes, strict=True):
        part(axis, 1000 if full else 400)
        axis.legend(frameon=False)
        axis.spines[["top", "right", "left"]].set_visible(False)
    path = Path("outputs/causal.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


if __name__ == "__main__":
    main(form.full(__doc__))
