"""Averaged class probabilities against 100,000 draws of the outputs, and their time.

Posteriors at the prior of the training: wine, digits, and a net of one logit.

    python benchmarks/averages.py
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import describe_machine, measure, seconds, table
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split

import fisherflow_jax as ff

NUM_DRAWS = 100_000
ROWS, ROUNDS = 100, 5
LINKS = {
    "default": None,
    "probit": ff.predictions.probit(),
    "512 draws": ff.predictions.output_samples(0, 512),
}


def network(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] + params["c"]


def one_logit(params: dict, x: jax.Array) -> jax.Array:
    return network(params, x)[:, 0]


def trained(model: tuple, x: jax.Array, y: jax.Array, sizes: tuple) -> dict:
    """A network's parameters near the maximum a posteriori for prior precision 1."""
    keys = jax.random.split(jax.random.key(0), 2)
    wide, hidden, outputs = sizes
    params = {
        "w": jax.random.normal(keys[0], (wide, hidden)) * wide**-0.5,
        "b": jnp.zeros(hidden),
        "v": jax.random.normal(keys[1], (hidden, outputs)) * hidden**-0.5,
        "c": jnp.zeros(outputs),
    }
    loss = ff.negative_log_likelihood(*model)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 1500))

    def objective(params: dict) -> jax.Array:
        squares = optax.tree.norm(params, squared=True)
        return loss(params, (x, y)) + 0.5 * squares / len(x)

    def step(carry: tuple, _: None) -> tuple:
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.jit(lambda c: jax.lax.scan(step, c, length=1500))(start)[0][0]


def problem(load: Any, hidden: int) -> tuple:
    x, y = load(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    center, spread = parts[0].mean(0), parts[0].std(0)
    spread[spread == 0] = 1
    train, test = (jnp.asarray((p - center) / spread) for p in parts[:2])
    y, classes = jnp.asarray(parts[2]), int(np.max(y)) + 1
    model = network, ff.likelihoods.categorical()
    if classes == 2:
        model, classes = (one_logit, ff.likelihoods.bernoulli()), 1
    params = trained(model, train, y, (train.shape[1], hidden, classes))
    return model, params, (train, y), test[:ROWS]


def timed(arguments: tuple, link: Any) -> Any:
    return lambda _: jax.block_until_ready(ff.predict(*arguments, link=link))


def main() -> None:
    print(describe_machine(("jax", "numpy", "scikit-learn")), "\n")
    rows = []
    for name, load, hidden in (
        ("wine", load_wine, 16),
        ("two classes", load_breast_cancer, 16),
        ("digits", load_digits, 50),
    ):
        model, params, batch, x = problem(load, hidden)
        layers = ff.layers.find_layers(model[0], params, x)
        for kind in (
            ff.structures.kronecker(layers),
            ff.structures.diagonal(),
            ff.structures.full(),
        ):
            estimator = ff.estimators.exact(*model, kind, chunk_size=64)
            information = jax.jit(estimator)(params, batch)
            state = ff.posterior(params, information, prior_precision=1.0)
            draws = ff.predictions.output_samples(1, NUM_DRAWS)
            exact = ff.predict(state, *model, x, link=draws)
            cells = []
            calls = {
                label: timed((state, *model, x), link) for label, link in LINKS.items()
            }
            times = measure(calls, dict.fromkeys(calls, ROUNDS))
            for label, link in LINKS.items():
                found = ff.predict(state, *model, x, link=link)
                off = float(jnp.max(jnp.abs(found.mean - exact.mean)))
                some = np.asarray(exact.std) > 0.05
                ratio = np.abs(np.asarray(found.std / exact.std) - 1)[some]
                share = np.quantile(ratio, 0.9) if ratio.size else np.nan
                cells.append(f"{off:.3f}, {share:.0%}, {seconds(times[label].median)}")
            rows.append((name, type(information).__name__, *cells))
    print(table(("", "structure", *LINKS), rows))
    print(
        "\nEach: the mean's largest error, the 90th percentile of the relative error "
        "of\nstandard deviations above 0.05, and the time of 100 rows."
    )


if __name__ == "__main__":
    main()
