"""Fisher Flow on real data, in about a minute: `python examples/quickstart.py`.

1. A logistic regression that sees its data once, in batches of 20, beside the batch
   fit of statsmodels.
2. A small flax network that sees 1024 handwritten digits once, trained by SGD, Adam,
   Fisher Flow and variational Bayes (in `digits.py`).

Figures are saved in `outputs/`. Needs `pip install "fisherflow-jax[examples]"`.
"""

import time
from pathlib import Path

import digits
import figures
import jax
import jax.numpy as jnp
import numpy as np
import statsmodels.api as sm
from tqdm import tqdm

import fisherflow_jax as ff

BATCH_SIZE = 20


def load_affairs() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Fair's survey of 6366 wives: names, standardised predictors, affair or not."""
    survey = sm.datasets.fair.load_pandas()
    predictors = survey.exog
    x = (predictors - predictors.mean()) / predictors.std(ddof=0)
    x.insert(0, "intercept", 1.0)
    y = survey.endog > 0
    # The file lists every affair first. The order of a stream must say nothing of the
    # outcome, so the rows are shuffled once.
    order = np.random.default_rng(0).permutation(len(y))
    return list(x.columns), x.to_numpy()[order], y.to_numpy(float)[order]


def batches_of(x: np.ndarray, y: np.ndarray) -> list[tuple]:
    """Batches `(x, y, weights)`, all of one size: the last is padded by weight 0."""
    padding = -len(y) % BATCH_SIZE
    rows = (
        np.pad(x, ((0, padding), (0, 0))),
        np.pad(y, (0, padding)),
        np.pad(np.ones_like(y), (0, padding)),
    )
    starts = range(0, len(y), BATCH_SIZE)
    return [tuple(part[i : i + BATCH_SIZE] for part in rows) for i in starts]


def logit(params: jax.Array, x: jax.Array) -> jax.Array:
    """The model: any function from parameters and inputs to outputs."""
    return x @ params


def stream_regression(folder: Path) -> None:
    names, x, y = load_affairs()
    print(
        f"1. Logistic regression: {len(y)} rows, seen once in batches of {BATCH_SIZE}"
    )
    print(flush=True)
    data = x.astype(np.float32), y.astype(np.float32)
    first = 20 * len(names)  # twenty rows a parameter are solved whole, then we stream
    head, tail = ([part[s] for part in data] for s in np.s_[:first, first:])

    flow = ff.fisher_flow(
        logit,
        ff.likelihoods.bernoulli(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        prior_precision=1e-4,
    )
    state = ff.warm_start(flow, flow.init(jnp.zeros(len(names))), head)
    update = jax.jit(flow.update)
    reading = jax.jit(lambda s: (s.count, s.mean, *ff.confidence_interval(s)))
    path = [reading(state)]
    for batch in tqdm(batches_of(*tail), "streaming", unit="batch", disable=None):
        state, _ = update(state, batch)
        path.append(reading(state))
    refined = ff.refine(flow, state, [data])

    print("After the stream, ff.summary(state, names):\n")
    print(ff.summary(state, names))
    fit = sm.Logit(y, x).fit(disp=False)
    print("\nBeside statsmodels' Logit, which iterates over all rows at once:\n")
    print_gaps(names, fit, {"streamed": state, "after ff.refine": refined})
    figures.coefficient_paths(folder / "coefficients.png", names, path, fit)


def print_gaps(names: list[str], fit, states: dict) -> None:
    """Estimates and standard errors beside the batch fit's."""
    width = max(map(len, names))
    lines = [
        f"{'':{width}}  {'statsmodels':^18}",
        f"{'':{width}}  {'estimate':>8}  {'std. err':>8}",
    ]
    lines += [
        f"{name:{width}}  {estimate:8.4f}  {error:8.4f}"
        for name, estimate, error in zip(names, fit.params, fit.bse, strict=True)
    ]
    worst = []
    for title, state in states.items():
        estimates = np.asarray(state.mean)
        errors = np.asarray(ff.standard_error(state))
        gaps, ratios = (estimates - fit.params) / fit.bse, errors / fit.bse - 1
        lines[0] += f"   {title:^28}"
        lines[1] += f"   {'estimate':>8}  {'std. err':>8}  {'gap':>8}"
        for i, row in enumerate(zip(estimates, errors, gaps, strict=True), 2):
            lines[i] += "   {:8.4f}  {:8.4f}  {:+8.4f}".format(*row)
        worst.append(
            f"{title}: estimates within {np.abs(gaps).max():.4f} standard errors of "
            f"statsmodels', standard errors within {np.abs(ratios).max():.2%}"
        )
    rule = "-" * max(map(len, lines))
    body = [*lines[:2], rule, *lines[2:], rule, "gap: in standard errors", *worst]
    print("\n".join(line.rstrip() for line in body))


def main() -> None:
    began = time.perf_counter()
    folder = Path("outputs")
    folder.mkdir(exist_ok=True)
    stream_regression(folder)
    print()
    digits.compare(folder)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. Figures:")
    for name in ("coefficients.png", "reliability.png"):
        print(f"  {folder / name}")


if __name__ == "__main__":
    main()
