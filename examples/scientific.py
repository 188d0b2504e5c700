"""Foxes and hares: rates from a noisy series, and what the series cannot tell.

Lotka and Volterra's equations, solved by diffrax inside the model; logarithms of rates
and first numbers are the parameters, and one series is one example, so that a solve
serves all its times. Hares are counted in traps, which catch an unknown share of them.
Then no data tell the hares' number from that share and from how well hares feed foxes:
scaling all three leaves every count as it is. The information has a null direction, and
the package names it; what it leaves untouched has intervals, whose coverage is counted
over simulated series. From starts that are far off a search may end in another optimum,
which its residuals show. A survey of the traps, another model of the same parameters,
goes on from the same state and settles the rest.

    python examples/scientific.py

One to two minutes, most of it compiling; with `--full`, of 600 series, two. Saves the
picture in `outputs/`. Needs `pip install "fisherflow-jax[examples]"`.

Lotka, "Elements of physical biology", 1925. Raue and others, "Structural and practical
identifiability analysis of partially observed dynamical models by exploiting the
profile likelihood", 2009.
"""

from pathlib import Path

import diffrax
import figures
import form
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fisherflow_jax as ff

jax.config.update("jax_enable_x64", True)

TRUTH = {
    "growth": 1.0,  # of hares
    "hunting": 0.5,  # hares lost for each fox
    "death": 1.5,  # of foxes
    "feeding": 0.4,  # foxes gained for each hare
    "hares": 3.0,  # at first
    "foxes": 1.0,
    "caught": 0.1,  # the traps' share of the hares
}
NOISE = 0.1
TIMES = jnp.linspace(0.5, 10.0, 20)
LOGS = {name: jnp.log(value) for name, value in TRUTH.items()}


def series(logs: dict, times: jax.Array) -> jax.Array:
    """Logarithms of hares caught and foxes seen, `(series, times, 2)`."""
    of = {name: jnp.exp(value) for name, value in logs.items()}

    def rates(time: jax.Array, state: jax.Array, args: None) -> jax.Array:
        hares, foxes = jnp.exp(state)
        return jnp.stack(
            [of["growth"] - of["hunting"] * foxes, of["feeding"] * hares - of["death"]]
        )

    def one(times: jax.Array) -> jax.Array:
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            diffrax.Tsit5(),
            0.0,
            times[-1],
            0.25,
            jnp.stack([logs["hares"], logs["foxes"]]),
            saveat=diffrax.SaveAt(ts=times),
            max_steps=64,
        )
        return found.ys + jnp.stack([logs["caught"], jnp.zeros(())])

    return jax.vmap(one)(times)


MODEL = series, ff.likelihoods.gaussian(NOISE)


def known(logs: dict) -> dict:
    """What scaling hares, their catch and their worth leaves as it is."""
    return {
        **{name: logs[name] for name in ("growth", "hunting", "death", "foxes")},
        "caught hares": logs["caught"] + logs["hares"],
        "feeding by all": logs["feeding"] + logs["hares"],
    }


def counted(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A batch: one series with its noise."""
    times = TIMES[None]
    means = series(LOGS, times)
    return times, means + NOISE * jax.random.normal(key, means.shape)


FLOW = ff.fisher_flow(*MODEL, prior_precision=9.0, num_steps=30)
# Another model of the same parameters goes on from the same state.
SURVEY = ff.fisher_flow(
    lambda logs, ones: ones * logs["caught"], ff.likelihoods.gaussian(0.05)
)


@jax.jit
def fits(keys: jax.Array) -> tuple[ff.FlowState, jax.Array]:
    """States of simulated series, and how far each is from its counts: chi squared.

    Logarithms are known to a third beforehand, and each centre is off so much.
    """

    def fit(key: jax.Array) -> tuple[ff.FlowState, jax.Array]:
        of_series, of_centre = jax.random.split(key)
        off = jax.random.normal(of_centre, (len(LOGS),)) / 3
        centre = {name: LOGS[name] + off[k] for k, name in enumerate(sorted(LOGS))}
        times, counts = counted(of_series)
        state, _ = FLOW.update(FLOW.init(centre), (times, counts))
        away = (counts - series(state.mean, times)) / NOISE
        return state, jnp.sum(away**2)

    return jax.lax.map(fit, keys)


def report(squares: np.ndarray, found: ff.Estimate) -> None:
    """How intervals cover what is known, over the series."""
    done = squares < 80  # chi squared of 40: two in ten thousand are larger
    print(f"{len(squares)} series, from centres off by a third:")
    print(f"{done.sum()} searches end where the counts are explained, the others at")
    print("optima that do not. Of the first:")
    for name, truth in known(LOGS).items():
        inside = (found.lower[name] < truth) & (truth < found.upper[name])
        share = np.mean(inside[done])
        error = np.sqrt(share * (1 - share) / done.sum())
        away = (found.estimate[name] - truth) / found.standard_error[name]
        print(
            f"  {name:15s} 95 % intervals cover {share:.3f} ({error:.3f}), "
            f"standard deviation of z {np.std(away[done]):.2f} "
            f"({np.std(away[done]) / np.sqrt(2 * done.sum()):.2f})"
        )


def draw(state: ff.FlowState, batch: tuple, surveyed: ff.FlowState, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    times = jnp.linspace(0.1, 15.0, 100)
    found = ff.predict(state, *MODEL, times[None])
    pairs = ("hares caught", figures.BLUE), ("foxes seen", figures.ORANGE)
    for k, (name, colour) in enumerate(pairs):
        lower, mean, upper = (
            np.exp(part[0, :, k]) for part in (found.lower, found.mean, found.upper)
        )
        axes[0].plot(times, mean, color=colour, label=name)
        axes[0].fill_between(times, lower, upper, color=colour, alpha=0.2, lw=0)
        axes[0].plot(batch[0][0], np.exp(batch[1][0, :, k]), ".", color=colour)
    axes[0].axvline(TIMES[-1], color=figures.GREY, lw=1, ls=":")
    axes[0].set(yscale="log", xlabel="years", title="Its mean, 95 %, and five years on")
    names = sorted(LOGS)
    for shift, one, colour, label in (
        (-0.15, state, figures.GREY, "counts alone"),
        (0.15, surveyed, figures.BLUE, "and a survey of the traps"),
    ):
        errors = ff.standard_error(one)
        axes[1].barh(
            np.arange(len(names)) + shift,
            [float(errors[name]) for name in names],
            0.3,
            color=colour,
            label=label,
        )
    axes[1].set_yticks(np.arange(len(names)), names)
    axes[1].set(xscale="log", xlabel="standard error of the logarithm")
    axes[1].axvline(1 / 3, color="black", lw=1, ls="--", label="the prior")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"saved {path}")


def main(full: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 600 if full else 200)
    states, squares = jax.device_get(fits(keys))
    found = jax.vmap(lambda state: ff.delta_method(state, known))(states)
    state = jax.tree.map(lambda x: x[0], states)  # of the first series
    print(ff.summary(state))
    direction, *_ = ff.diagnostics.undetermined(state)  # the largest share is first
    along = [float(direction.vector[name]) for name in ("caught", "feeding", "hares")]
    np.testing.assert_allclose(along, [1, 1, -1], atol=0.02)
    print(f"not told by the counts: {direction}")
    print("told all the same, in 95 % intervals:")
    for name, truth in known(LOGS).items():
        lower, upper = (np.exp(part[name][0]) for part in (found.lower, found.upper))
        print(f"  {name:15s} {lower:.3f} to {upper:.3f}, true {np.exp(truth):.3f}")
    report(np.asarray(squares), found)
    surveyed, _ = SURVEY.update(state, (jnp.ones(1), LOGS["caught"][None]))
    left = [found.reason for found in ff.diagnostics.undetermined(surveyed)]
    assert "collinear" not in left
    before, after = (ff.standard_error(one)["hares"] for one in (state, surveyed))
    print(
        f"a survey of the traps, to 5 %: hares' error was {before:.3f}, is {after:.3f}"
    )
    batch = counted(jax.random.split(keys[0])[0])
    draw(state, batch, surveyed, Path("outputs/scientific.png"))


if __name__ == "__main__":
    main(form.full(__doc__))
