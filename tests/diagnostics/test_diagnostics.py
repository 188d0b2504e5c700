"""Diagnostics against dense matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
PARAMS = {
    "w": RNG.normal(size=(3, 4)),
    "head": RNG.normal(size=(4, 3)),
}
X, LABELS = RNG.normal(size=(20, 3)), np.arange(20) % 3
WEIGHTS = np.tile([1.0, 2.0, 0.0, 1.0], 5)
DATA = (X, LABELS, WEIGHTS)
CATEGORICAL = ff.likelihoods.categorical()


def apply_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


@functools.cache
def exact():
    """The Fisher information by an explicit Jacobian, `(24, 24)`."""
    flat, unravel = ravel_pytree(PARAMS)
    outputs = lambda p: apply_fn(unravel(p), X)  # noqa: E731
    both = jax.jit(lambda p: (jax.jacobian(outputs)(p), jax.nn.softmax(outputs(p))))
    jacobian, p = map(np.asarray, both(flat))
    output = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    return np.einsum("n,nia,nij,njb->ab", WEIGHTS, jacobian, output, jacobian)


@functools.cache
def information(name):
    layers = ff.layers.find_layers(apply_fn, PARAMS, X)
    kronecker = ff.structures.kronecker(layers)
    make = {
        "scalar": ff.structures.scalar,
        "diagonal": ff.structures.diagonal,
        "block": ff.structures.block,
        "full": ff.structures.full,
        "low_rank": lambda: ff.structures.low_rank(5),
        "kronecker": lambda: kronecker,
        "eigen": lambda: ff.structures.kronecker(
            layers, eigenvalue_correction=information("kronecker")
        ),
    }[name]
    estimator = ff.estimators.exact(apply_fn, CATEGORICAL, make())
    return jax.jit(lambda p, batch: estimator(p, batch))(PARAMS, DATA)


NAMES = ["scalar", "diagonal", "block", "full", "low_rank", "kronecker", "eigen"]


@functools.cache
def dense(name):
    to_dense = jax.jit(ff.information.to_dense)
    return np.asarray(to_dense(information(name), PARAMS))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAMES)
def test_with_a_basis_of_probes_the_error_is_exact(name):
    found = ff.diagnostics.relative_error(
        information(name), apply_fn, CATEGORICAL, PARAMS, DATA, 0, num_probes=24
    )
    norm = np.linalg.norm
    expected = norm(dense(name) - exact()) / norm(exact())
    np.testing.assert_allclose(found.value, expected, rtol=1e-9, atol=1e-12)
    assert found.standard_error == 0


def test_random_probes_and_their_standard_error():
    norm = np.linalg.norm
    expected = norm(dense("diagonal") - exact()) / norm(exact())
    found = [
        ff.diagnostics.relative_error(
            information("diagonal"), apply_fn, CATEGORICAL, PARAMS, DATA, key,
            num_probes=20,
        )
        for key in range(30)
    ]  # fmt: skip
    found = jax.device_get(found)
    values = np.array([x.value for x in found])
    claimed = np.sqrt(np.mean([x.standard_error**2 for x in found]))
    assert abs(values.mean() - expected) < 4 * claimed / np.sqrt(30) + 0.02 * expected
    assert 0.6 < values.std() / claimed < 1.6


def test_batches_add():
    parts = [tuple(a[i : i + 10] for a in DATA) for i in (0, 10)]
    whole, split = (
        ff.diagnostics.relative_error(
            information("kronecker"), apply_fn, CATEGORICAL, PARAMS, data, 1,
            num_probes=24,
        )
        for data in (DATA, parts)
    )  # fmt: skip
    np.testing.assert_allclose(whole.value, split.value, rtol=1e-12)


def test_trace_ratio():
    found = ff.diagnostics.trace_ratio(apply_fn, CATEGORICAL, PARAMS, DATA)

    def score(x, y):
        def log_prob(p):
            return CATEGORICAL.log_prob(apply_fn(p, x[None]), y[None])[0]

        return ravel_pytree(jax.grad(log_prob)(PARAMS))[0]

    scores = np.asarray(jax.jit(jax.vmap(score))(X, LABELS))
    empirical = (WEIGHTS[:, None] * scores**2).sum()
    np.testing.assert_allclose(found, empirical / np.trace(exact()), rtol=1e-10)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", NAMES)
def test_dimensions(name):
    values = np.linalg.eigvalsh(dense(name))
    found = ff.diagnostics.eigenvalues(information(name), PARAMS)
    np.testing.assert_allclose(found, values[::-1], atol=1e-10 * values.max())
    gamma = ff.diagnostics.effective_parameters(information(name), 0.3, PARAMS)
    np.testing.assert_allclose(gamma, (values / (values + 0.3)).sum(), rtol=1e-9)
    shares = np.maximum(values, 1e-300) / values.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    found = ff.diagnostics.effective_rank(information(name), PARAMS)
    np.testing.assert_allclose(found, rank, rtol=1e-6)


def test_a_prior_for_each_layer():
    prior = {"w": 0.2, "head": 2.0}
    diagonal = ravel_pytree({k: np.full(PARAMS[k].shape, prior[k]) for k in PARAMS})[0]
    for name in ("full", "kronecker"):
        matrix = dense(name)
        inverse = np.linalg.inv(matrix + np.diag(diagonal))
        found = ff.diagnostics.effective_parameters(information(name), prior)
        np.testing.assert_allclose(found, np.trace(matrix @ inverse), rtol=1e-9)


def test_low_rank_alone():
    factors = {"w": jnp.asarray(RNG.normal(size=(3, 5)))}
    for base in (0.0, 2.0):
        low = ff.structures.LowRank({"w": jnp.full(5, base)}, factors)
        expected = np.linalg.eigvalsh(ff.information.to_dense(low))[::-1]
        found = ff.diagnostics.eigenvalues(low)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    # no matrix is made of many parameters
    wide = ff.structures.LowRank(jnp.ones(9000), jnp.ones((1, 9000)))
    assert ff.diagnostics.eigenvalues(wide)[0] == pytest.approx(9001)
    assert ff.diagnostics.effective_rank(ff.structures.Diagonal(jnp.zeros(3))) == 0


def test_table():
    names = ["full", "kronecker", "diagonal"]
    table = ff.diagnostics.table(
        {name: information(name) for name in names},
        apply_fn, CATEGORICAL, PARAMS, DATA, 0,
        prior_precision=0.3, num_probes=24,
    )  # fmt: skip
    for row in table.rows:
        single = ff.diagnostics.relative_error(
            information(row.name), apply_fn, CATEGORICAL, PARAMS, DATA, 0, num_probes=24
        )
        assert row.error == pytest.approx(float(single.value), abs=1e-12)
        assert row.trace == pytest.approx(np.trace(dense(row.name)))
        gamma = ff.diagnostics.effective_parameters(information(row.name), 0.3)
        assert row.effective_parameters == pytest.approx(float(gamma))
    assert table.rows[0].error < 1e-12 < table.rows[1].error < table.rows[2].error
    ratio = ff.diagnostics.trace_ratio(apply_fn, CATEGORICAL, PARAMS, DATA)
    assert table.empirical_share == pytest.approx(float(ratio))
    lines = str(table).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == names
    assert lines[-1].startswith("24 parameters; trace(empirical) / trace(exact)")


def test_bad_input():
    diagonal = information("diagonal")
    arguments = (apply_fn, CATEGORICAL, PARAMS)
    with pytest.raises(ValueError, match=r"num_probes must be .* at least 2; got 1"):
        ff.diagnostics.relative_error(diagonal, *arguments, DATA, 0, num_probes=1)
    with pytest.raises(ValueError, match="about another tree"):
        other = ff.structures.Diagonal({"w": jnp.ones((3, 4))})
        ff.diagnostics.relative_error(other, *arguments, DATA, 0, num_probes=4)
    with pytest.raises(ValueError, match="batch 0 holds a NaN"):
        bad = (np.where(np.arange(60).reshape((20, 3)) == 0, np.nan, X), LABELS)
        ff.diagnostics.relative_error(diagonal, *arguments, bad, 0, num_probes=4)
    with pytest.raises(ValueError, match="no batches"):
        ff.diagnostics.relative_error(diagonal, *arguments, [], 0, num_probes=4)
    with pytest.raises(ValueError, match="read twice"):
        ff.diagnostics.trace_ratio(*arguments, iter([DATA]))
    with pytest.raises(ValueError, match="informations is empty"):
        ff.diagnostics.table({}, *arguments, DATA, 0)
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        ff.diagnostics.effective_parameters(diagonal, 0.0)
