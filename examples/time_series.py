"""Carbon dioxide over Mauna Loa: a Gaussian process in time, fitted and forecast.

Weekly means from 1958 to 2001, with holes. What a quadratic trend and a season leave is
a Gaussian process with Matern's covariance, which here is a flow: its length scale,
variance and noise are found by gradients of the evidence, the smoother says what the
whole series tells of each week, and the forecast is what the memory believes ahead.
Each pass costs the number of weeks; the covariance matrix of the exact process, beside
it, costs its cube.

    python examples/time_series.py

Half a minute. Saves the picture in `outputs/`. Needs
`pip install "fisherflow-jax[examples]"`.
"""

import time
from pathlib import Path

import figures
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize
from statsmodels.datasets import co2

import fisherflow_jax as ff

jax.config.update("jax_enable_x64", True)

AHEAD = 104  # weeks that the fit does not see


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Years, what trend and season leave in ppm, and which weeks are missing."""
    series = co2.load_pandas().data["co2"]
    years = series.index.year + (series.index.day_of_year - 1) / 365.25
    years, values = np.asarray(years, float), series.to_numpy()
    t = years - years.mean()
    columns = [np.ones_like(t), t, t**2]
    for k in (1, 2):
        columns += [np.sin(2 * np.pi * k * years), np.cos(2 * np.pi * k * years)]
    design, missing = np.column_stack(columns), np.isnan(values)
    fitted = ~missing & (np.arange(len(t)) < len(t) - AHEAD)
    weights = np.linalg.lstsq(design[fitted], values[fitted], rcond=None)[0]
    return years, np.where(missing, 0.0, values - design @ weights), missing


def build(logs: jax.Array) -> ff.FisherFlow:
    length, variance, noise = jnp.exp(logs)
    memory, prior, read_out = ff.memories.matern(1.5, length, variance, 1 / 52.18)
    return ff.fisher_flow(
        read_out,
        ff.likelihoods.gaussian(noise),
        memory=memory,
        prior_precision=prior,
        prior_is="predicted",
        num_steps=1,
    )


def filtered(flow: ff.FisherFlow, batches: tuple) -> tuple:
    """The last state, and all of them."""

    def step(state: ff.FlowState, batch: tuple) -> tuple:
        state, _ = flow.update(state, batch)
        return state, state

    return jax.lax.scan(step, flow.init(jnp.zeros(2)), batches)


def fit(batches: tuple) -> tuple[np.ndarray, float]:
    """The logarithms at the highest evidence, and that."""

    @jax.jit
    @jax.value_and_grad
    def loss(logs: jax.Array) -> jax.Array:
        return -filtered(build(logs), batches)[0].log_evidence

    found = minimize(loss, np.log([0.5, 0.5, 0.3]), jac=True, method="BFGS")
    return found.x, -found.fun


def exact_evidence(logs: jax.Array, years: np.ndarray, values: np.ndarray) -> float:
    length, variance, noise = np.exp(np.asarray(logs))
    far = np.sqrt(3) / length * np.abs(years[:, None] - years)
    spread = variance * (1 + far) * np.exp(-far) + noise**2 * np.eye(len(years))
    root = np.linalg.cholesky(spread)
    half = np.linalg.solve(root, values)
    logdet = 2 * np.log(np.diag(root)).sum() + len(years) * np.log(2 * np.pi)
    return -0.5 * (half @ half + logdet)


def draw(years, values, missing, mean, error, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(10, 4.5), layout="constrained")
    seen, split = ~missing, len(years) - AHEAD
    early = years > 1990
    axis.plot(years[seen & early], values[seen & early], ".", ms=3, color=figures.GREY)
    for part, colour, label in (
        (slice(None, split), figures.BLUE, "smoothed"),
        (slice(split, None), figures.ORANGE, "forecast"),
    ):
        axis.plot(years[part], mean[part], color=colour, lw=1.5, label=label)
        reach = 1.96 * error[part]
        axis.fill_between(
            years[part], mean[part] - reach, mean[part] + reach, color=colour, alpha=0.2
        )
    axis.set_xlim(1990, years[-1])
    axis.set(xlabel="year", ylabel="ppm beside trend and season", ylim=(-2.5, 2.5))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def main() -> None:
    years, values, missing = load()
    count = len(years) - AHEAD
    batches = (
        jnp.zeros((len(years), 1, 0)),
        jnp.asarray(values)[:, None],
        jnp.asarray(~missing, float)[:, None],
    )
    seen = tuple(part[:count] for part in batches)
    start = time.perf_counter()
    logs, evidence = fit(seen)
    length, variance, noise = np.exp(np.asarray(logs))
    print(
        f"{count} weeks, {int(missing[:count].sum())} missing; fitted in "
        f"{time.perf_counter() - start:.1f} s: length scale {length:.2f} years, "
        f"standard deviation {np.sqrt(variance):.2f} ppm, noise {noise:.2f} ppm"
    )
    grid = np.arange(count) / 52.18
    used = ~missing[:count]
    exact = exact_evidence(logs, grid[used], values[:count][used])
    print(f"log-evidence {evidence:.4f}, of the exact process {exact:.4f}")

    flow = build(logs)
    last, states = jax.jit(lambda batches: filtered(flow, batches))(seen)
    smoothed = ff.smooth(flow, states)
    ahead = jax.jit(jax.vmap(lambda steps: flow.advance(last, steps=steps)))(
        jnp.arange(1, AHEAD + 1)
    )
    mean, error = (
        np.concatenate([np.asarray(of(x))[:, 0] for x in (smoothed, ahead)])
        for of in (lambda x: x.mean, jax.vmap(ff.standard_error))
    )
    later = ~missing[count:]
    away = (values - mean)[count:][later] / np.hypot(error, noise)[count:][later]
    print(
        f"of {len(away)} later weeks {np.mean(np.abs(away) < 1.645):.0%} lie within "
        "their 90 % interval (which is of the process: the trend that goes on is not "
        "in it)"
    )
    draw(years, values, missing, mean, error, Path("outputs/time_series.png"))


if __name__ == "__main__":
    main()
