"""An A/B test that may be looked at at any time, and stopped when it pleases.

Visitors are shown page A or B, and order or not; a flow takes them in by the hundred.
After each hundred one looks. The usual interval is right at one time chosen before, and
wrong for who looks until it pleases; the always-valid interval holds at all times at
once, and the test may stop at the first e-value of twenty. First one test, drawn; then
500 in which there is no effect, and 500 in which there is: how often each rule stops,
and when.

    python examples/ab_test.py

A minute. Saves the picture in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

from pathlib import Path

import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fisherflow_jax as ff

LOOKS, ROWS, TESTS = 100, 100, 500
# Orders per visitor, the effect on their log-odds, and the one that is hoped for, which
# is chosen before the test.
BASE, EFFECT, HOPED = -2.0, 0.25, 0.3

flow = ff.fisher_flow(
    lambda params, x: x @ params, ff.likelihoods.bernoulli(), prior_precision=1e-2
)
ARM = jnp.array([0.0, 1.0, 0.0])  # of an intercept, the page, and who came before


def visitors(key: jax.Array, effect: float) -> tuple[jax.Array, jax.Array]:
    """The page, whether one came before, and whether one orders."""
    of_page, of_past, of_order = jax.random.split(key, 3)
    page = jax.random.bernoulli(of_page, 0.5, (LOOKS, ROWS)).astype(float)
    past = jax.random.bernoulli(of_past, 0.3, (LOOKS, ROWS)).astype(float)
    logit = BASE + effect * page + 1.0 * past
    orders = jax.random.bernoulli(of_order, jax.nn.sigmoid(logit)).astype(float)
    return jnp.stack([jnp.ones_like(page), page, past], -1), orders


def looks(key: jax.Array, effect: float) -> tuple:
    """At each look: the estimate, both intervals, and the log of the e-value."""

    def look(state: ff.FlowState, batch: tuple) -> tuple:
        state, _ = flow.update(state, batch)
        usual = ff.confidence_interval(state)
        lower, upper = ff.intervals.anytime(state, HOPED)
        found = ff.intervals.e_value(state, ARM, HOPED)
        ends = usual[0][1], usual[1][1], lower[1], upper[1]
        return state, (state.mean[1], *ends, found.log_e_value)

    return jax.lax.scan(look, flow.init(jnp.zeros(3)), visitors(key, effect))[1]


def stops(refuted: np.ndarray) -> tuple[float, float, float]:
    """The share of tests that stop, its standard error, and their median visitors."""
    stopped = refuted.any(1)
    first = (refuted.argmax(1)[stopped] + 1) * ROWS
    share = stopped.mean()
    error = np.sqrt(share * (1 - share) / len(stopped))
    return share, error, np.median(first) if len(first) else np.nan


def draw(found: tuple, path: Path) -> None:
    estimate, low, high, lower, upper, log_e = map(np.asarray, found)
    seen = ROWS * np.arange(1, LOOKS + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, layout="constrained", height_ratios=(2, 1)
    )
    top.fill_between(seen, lower, upper, color=figures.BLUE, alpha=0.15, lw=0)
    top.plot(seen, lower, color=figures.BLUE, lw=0.8, label="at all times at once")
    top.plot(seen, upper, color=figures.BLUE, lw=0.8)
    top.fill_between(seen, low, high, color=figures.ORANGE, alpha=0.25, lw=0)
    top.plot(seen, low, color=figures.ORANGE, lw=0.8, label="at one time")
    top.plot(seen, high, color=figures.ORANGE, lw=0.8)
    top.plot(seen, estimate, color="black", lw=1.2, label="estimate")
    top.axhline(EFFECT, color=figures.GREY, lw=0.8, ls="--", label="truth")
    top.axhline(0, color=figures.GREY, lw=0.8, ls=":")
    top.set(ylabel="effect, log-odds", ylim=(-0.8, 1.2))
    top.legend(frameon=False, ncols=2)
    bottom.plot(seen, np.exp(np.minimum(log_e, 20)), color=figures.BLUE, lw=1.2)
    bottom.axhline(20, color=figures.GREY, lw=0.8, ls="--")
    bottom.set(yscale="log", xlabel="visitors", ylabel="e-value")
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def main() -> None:
    one = jax.jit(looks)(jax.random.key(7), EFFECT)
    lower, upper, log_e = (np.asarray(one[i]) for i in (3, 4, 5))
    refuted = np.flatnonzero(log_e > np.log(20))
    stopped = refuted[0] if len(refuted) else LOOKS - 1
    print(
        f"one test, stopped after {(stopped + 1) * ROWS:,} visitors: effect between "
        f"{lower[stopped]:.2f} and {upper[stopped]:.2f}, e-value "
        f"{np.exp(log_e[stopped]):.0f} (truth {EFFECT})\n"
    )
    many = jax.jit(lambda keys, effect: jax.vmap(lambda k: looks(k, effect))(keys))
    print("stops with         no effect        an effect of .25, median visitors")
    found = [
        [
            np.asarray(x)
            for x in many(jax.random.split(jax.random.key(seed), TESTS), size)
        ]
        for seed, size in ((1, 0.0), (2, EFFECT))
    ]
    rules = {
        "z at each look": lambda f: (f[1] > 0) | (f[2] < 0),
        "z at the end": lambda f: ((f[1] > 0) | (f[2] < 0))[:, -1:],
        "e-value of 20": lambda f: f[5] > np.log(20),
    }
    for name, rule in rules.items():
        none, some = (stops(rule(each)) for each in found)
        at = some[2] if name != "z at the end" else LOOKS * ROWS
        print(
            f"{name:16s} {none[0]:6.3f} ({none[1]:.3f})   {some[0]:6.3f} "
            f"({some[1]:.3f}), {at:,.0f}"
        )
    ratio = (found[1][4] - found[1][3])[:, -1] / (found[1][2] - found[1][1])[:, -1]
    print(f"width at the end: {ratio.mean():.2f} times that of the usual interval")
    draw(one, Path("outputs/ab_test.png"))


if __name__ == "__main__":
    main()
