"""What the theory promises of a flow, and where it ends: the tests of docs/claims.md.

Covariance under reparameterisation, and efficiency against the bound of Cramér and Rao.
"""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 12, 3)))
COUNTS = jnp.asarray(RNG.poisson(np.exp(np.asarray(X) @ [0.5, -0.3, 0.2])), float)
MIXED = jnp.array([[1.0, 0.4, -0.2], [0.1, 2.0, 0.3], [-0.5, 0.2, 0.5]])
UNITS = jnp.diag(jnp.array([0.1, 3.0, 20.0]))
POISSON = ff.likelihoods.poisson()


ROOT = Path(__file__).parents[1]


def test_the_page_names_tests_that_are_there():
    page = (ROOT / "docs/claims.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    functions = {
        path: {
            node.name
            for node in ast.parse((ROOT / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        for path in {path for path, _ in named}
    }
    assert [each for each in named if each[1] not in functions[each[0]]] == []


def curved(phi):
    """A chart of the parameters that is no affine map."""
    return MIXED @ phi + 0.3 * jnp.sin(phi[::-1])


@pytest.mark.parametrize("name", ["exact", "empirical", "observed"])
def test_information_is_pulled_back_as_a_metric(name):
    """`J' I J` in any chart; a Hessian is none where the score is not zero."""
    phi, batch = jnp.array([0.3, -0.2, 0.4]), (X[0], COUNTS[0])
    estimator, structure = getattr(ff.estimators, name), ff.structures.full()

    def at(apply_fn, params):
        found = estimator(apply_fn, POISSON, structure)(params, batch)
        return ff.information.to_dense(found, params)

    here = at(lambda theta, x: x @ theta, curved(phi))
    slope = jax.jacobian(curved)(phi)
    there = at(lambda phi, x: x @ curved(phi), phi)
    gap = jnp.abs(there - slope.T @ here @ slope).max() / jnp.abs(there).max()
    assert gap < 1e-12 if name != "observed" else gap > 1e-2


def ends(structure, chart, num_steps):
    """A stream's end in theta, and that of theta = chart @ phi + 0.2, carried back."""
    theta, precision = jnp.array([0.1, 0.0, -0.1]), jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    matrix = {"mixed": MIXED, "units": UNITS}[chart]
    kept = getattr(ff.structures, structure)()

    def stream(apply_fn, start, prior):
        if structure == "diagonal":
            prior = ff.structures.Diagonal(jnp.diag(prior))
        else:
            prior = ff.structures.Full(prior)
        flow = ff.fisher_flow(
            apply_fn,
            POISSON,
            structure=kept,
            prior_precision=prior,
            num_steps=num_steps,
        )
        state, _ = jax.lax.scan(flow.update, flow.init(start), (X, COUNTS))
        return state.mean, ff.information.to_dense(state.information, start)

    def mapped(phi, x):
        return x @ (matrix @ phi + 0.2)

    mean, information = stream(lambda theta, x: x @ theta, theta, precision)
    start = jnp.linalg.solve(matrix, theta - 0.2)
    other, own = stream(mapped, start, matrix.T @ precision @ matrix)
    back = jnp.linalg.inv(matrix)
    return mean, information, matrix @ other + 0.2, back.T @ own @ back


@pytest.mark.parametrize(
    "structure, chart, num_steps",
    [
        ("full", "mixed", 1),
        ("diagonal", "units", 1),
        pytest.param("full", "mixed", 10, marks=pytest.mark.slow),
        pytest.param("diagonal", "units", 10, marks=pytest.mark.slow),
    ],
)
def test_updates_follow_affine_charts(structure, chart, num_steps):
    """Of all parameters together, or of each one's units: prior and all."""
    mean, information, same_mean, same = ends(structure, chart, num_steps)
    np.testing.assert_allclose(same_mean, mean, rtol=1e-8)
    np.testing.assert_allclose(same, information, rtol=1e-8, atol=1e-8)


def test_a_diagonal_depends_on_the_axes():
    mean, information, other, _ = ends("diagonal", "mixed", 1)
    assert (jnp.abs(other - mean) * jnp.sqrt(jnp.diag(information))).max() > 0.1


@pytest.mark.slow
def test_curved_charts_agree_as_rows_come():
    """A rate, by its logarithm and its root: 50 streams in ten rows, one prior."""
    counts = jnp.asarray(np.random.default_rng(1).poisson(3.0, (50, 200, 10)), float)
    rates = []
    for into, back in ((jnp.log, jnp.exp), (jnp.sqrt, jnp.square)):
        start, slope = into(2.0), jax.grad(back)(into(2.0))
        flow = ff.fisher_flow(
            lambda phi, rows, back=back: jnp.log(back(phi)) + 0 * rows,
            POISSON,
            prior_precision=slope**2 / 4,
            num_steps=2,
        )

        def one(rows, flow=flow, start=start):
            def step(state, row):
                state, _ = flow.update(state, (row, row))
                return state, state.mean

            return jax.lax.scan(step, flow.init(start), rows)[1]

        rates.append(back(jax.jit(jax.vmap(one))(counts)))
    gaps = (rates[0] - rates[1]) / jnp.sqrt(3.0 / (10 * jnp.arange(1, 201)))
    typical = jnp.sqrt(jnp.mean(gaps**2, 0))
    print(f"\nafter 100 and 2,000 rows: {typical[9]:.3f}, {typical[-1]:.3f} errors")
    assert typical.max() < 0.15
    assert typical[9] > 1.5 * typical[-1]
    assert typical[-1] > 0.01  # they do differ


@pytest.mark.slow
def test_the_maximum_of_a_batch_is_in_no_chart():
    counts, found = COUNTS.ravel()[:20], []
    for back in (jnp.exp, jnp.square):
        flow = ff.fisher_flow(
            lambda phi, rows, back=back: jnp.log(back(phi)) + 0 * rows,
            POISSON,
            prior_precision=1e-10,
        )
        found.append(back(flow.update(flow.init(1.0), (counts, counts))[0].mean))
    np.testing.assert_allclose(found, counts.mean(), rtol=1e-6)


@pytest.mark.slow
def test_efficiency_under_correlation():
    """One pass reaches the bound where the information is kept whole."""
    num_samples, structures = 2000, ff.structures
    root = jnp.linalg.cholesky(0.1 * jnp.eye(4) + 0.9)
    inputs = jnp.asarray(np.random.default_rng(2).normal(size=(10, 20, 4))) @ root.T
    truth = jnp.array([1.0, -1.0, 0.5, 0.0])
    noise = jax.random.normal(jax.random.key(0), (num_samples, 10, 20))
    model = (lambda params, x: x @ params), ff.likelihoods.gaussian()
    whole = structures.full().reduce(inputs.reshape(-1, 4))
    bound = jnp.diag(ff.geometry.cramer_rao(whole, truth))
    efficiency = {}
    for name, structure, marginal in (
        ("full", structures.full(), False),
        ("marginal", structures.diagonal(), True),
        ("diagonal", structures.diagonal(), False),
    ):
        flow = ff.fisher_flow(
            *model,
            structure=structure,
            prior_precision=1e-6,
            marginal=marginal,
            num_steps=1,
        )

        def one(errors, flow=flow):
            batches = inputs, inputs @ truth + errors
            return jax.lax.scan(flow.update, flow.init(jnp.zeros(4)), batches)[0].mean

        squares = jnp.mean((jax.jit(jax.vmap(one))(noise) - truth) ** 2, 0)
        efficiency[name] = float(jnp.mean(bound) / jnp.mean(squares))
    print(efficiency)
    # standard error of each at most sqrt(2 / 2000) = .032
    assert efficiency["full"] == pytest.approx(1, abs=0.1)
    assert efficiency["marginal"] > 0.75
    assert efficiency["diagonal"] < 0.5
