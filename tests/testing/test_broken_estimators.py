"""The kit sees what is wrong: estimators of which one thing is broken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.testing._estimators import LAWS

ops = ff.information


def broken(change, factory=ff.estimators.exact):
    """A factory whose estimator computes by `change(compute)`."""

    def build(apply_fn, likelihood, structure):
        right = factory(apply_fn, likelihood, structure)
        return dataclasses.replace(right, compute=change(right.compute))

    return build


def mean(compute):
    def run(params, batch, key):
        return ops.scale(compute(params, batch, key), 1 / jnp.sum(batch.weights))

    return run


def without_weights(compute):
    def run(params, batch, key):
        ones = jnp.ones_like(batch.weights)
        return compute(params, batch._replace(weights=ones), key)

    return run


def without_the_first(compute):
    def run(params, batch, key):
        later = batch.weights.at[0].set(0.0)
        return compute(params, batch._replace(weights=later), key)

    return run


def doubled(compute):
    return lambda *arguments: ops.scale(compute(*arguments), 2.0)


def with_one_key(compute):
    return lambda params, batch, key: compute(params, batch, jax.random.key(0))


def negative(compute):
    return lambda *arguments: ops.scale(compute(*arguments), -1.0)


def in_half_precision(compute):
    def run(*arguments):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), compute(*arguments))

    return run


CASES = {
    "a mean": (broken(mean), {"sums over parts", "sizes", "weights", "reference"}),
    "no weights": (broken(without_weights), {"nothing", "weights", "reference"}),
    "one example lost": (broken(without_the_first), {"order", "sizes", "reference"}),
    "a factor of two": (broken(doubled), {"reference"}),
    "not positive": (broken(negative), {"positive", "reference"}),
    "half precision": (
        broken(in_half_precision),
        {"float32 or wider", "of the structure"},
    ),
    "one key for all": (
        broken(with_one_key, ff.estimators.hutchinson),
        {"keys", "reference"},
    ),
    "a bias of draws": (
        broken(doubled, ff.estimators.monte_carlo),
        {"reference"},
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", CASES)
def test_what_is_broken_is_named(name):
    factory, laws = CASES[name]
    # of the others some may be broken too, and are not looked at
    others = dict.fromkeys(LAWS.keys() - laws, "another law's case")
    with pytest.raises(AssertionError, match="breaks") as caught:
        ff.testing.check_estimator(
            factory,
            structure=ff.structures.diagonal(),
            reference=ff.estimators.exact,
            num_draws=500,
            skip=others,
        )
    message = str(caught.value)
    missed = {law for law in laws if f"- {law}: " not in message}
    assert not missed, message


def test_a_reference_may_be_a_matrix():
    def gram(apply_fn, likelihood, structure):
        return lambda params, batch: np.einsum(
            "n,ni,nj->ij", batch[2], batch[0], batch[0]
        )

    problem = ff.testing.Trial(
        lambda params, x: x @ params,
        ff.likelihoods.gaussian(),
        np.zeros(2),
        np.random.default_rng(0).normal(size=(5, 2)),
        np.zeros(5),
    )
    report = ff.testing.check_estimator(
        ff.estimators.exact, problem=problem, reference=gram
    )
    assert "reference" in report.checked


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"skip names \['sum'\], which are no laws"):
        ff.testing.check_estimator(ff.estimators.exact, skip={"sum": "why"})
    with pytest.raises(TypeError, match=r"must return a .*Estimator; got function"):
        ff.testing.check_estimator(lambda *_: lambda params, batch: None)
