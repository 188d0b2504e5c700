"""Joint predictions, in weight space and in function space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS
from program_size import largest


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("name", "structure"),
    [("mlp", "kronecker"), ("conv", "kronecker"), ("tokens", "eigen")],
)
def test_the_whole_covariance_by_the_jacobian(belief, name, structure):
    model, posterior = MODELS[name], cases.state(name, structure)
    state = belief(
        posterior.mean,
        posterior.information,
        dispersion=jnp.asarray(2.5),
        degrees_of_freedom=jnp.asarray(9.0),
    )
    found = ff.predictions.joint(state, model.apply_fn, model.inputs, chunk_size=2)
    rows = cases.jacobian(name)
    rows = rows.reshape((-1, rows.shape[-1]))
    expected = 2.5 * rows @ cases.covariance(posterior) @ rows.T
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-9, atol=1e-10)


def test_no_jacobian_of_all_parameters():
    """Of a wide network: the outputs times themselves, and what returns to layers."""
    shapes = {"w": (30, 40), "v": (40, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    state = ff.Posterior(params, ff.structures.Scalar(jnp.ones(())), jnp.ones(()))
    program = jax.make_jaxpr(
        lambda state: ff.predictions.joint(
            state, lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], jnp.zeros((8, 30))
        )
    )(state)
    assert largest(program.jaxpr) <= 30 * 40 < 16 * 1280


def test_it_is_the_gaussian_process_given_all_points():
    """Function space: the kernel `J J^T / p` conditioned on every observation."""
    model = MODELS["mlp"]
    prior, noise, train = 0.7, 0.3, model.inputs
    new = jnp.asarray(np.random.default_rng(9).normal(size=(3, 3)))
    likelihood = ff.likelihoods.gaussian(scale=noise)
    estimator = ff.estimators.exact(model.apply_fn, likelihood, ff.structures.full())

    @jax.jit
    def predicted(train, new):
        information = estimator(model.params, (train, None))
        posterior = ff.posterior(model.params, information, prior_precision=prior)
        return ff.predictions.joint(posterior, model.apply_fn, new)

    found = predicted(train, new)

    @jax.jit
    def rows(x):
        tree = jax.jacrev(lambda p: model.apply_fn(p, x).ravel())(model.params)
        return jnp.concatenate(
            [leaf.reshape((leaf.shape[0], -1)) for leaf in jax.tree.leaves(tree)], 1
        )

    seen, unseen = np.asarray(rows(train)), np.asarray(rows(new))
    kernel = seen @ seen.T / prior + noise**2 * np.eye(len(seen))
    cross = unseen @ seen.T / prior
    expected = unseen @ unseen.T / prior - cross @ np.linalg.solve(kernel, cross.T)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-8, atol=1e-8)


def test_samples_have_the_covariance():
    model, posterior = MODELS["linear"], cases.state("linear", "diagonal")
    found = ff.predictions.joint(posterior, model.apply_fn, model.inputs)
    count = 40_000
    draws = found.sample(0, (200, 200))
    assert draws.shape == (200, 200, 6, 3)
    draws = np.asarray(draws).reshape((count, -1))
    error = 5 * np.sqrt(np.diag(found.covariance) / count)
    assert np.all(np.abs(draws.mean(0) - found.mean.ravel()) < error)
    spread = np.cov(draws.T)
    scale = np.sqrt(np.outer(np.diag(found.covariance), np.diag(found.covariance)))
    assert np.max(np.abs(spread - found.covariance) / scale) < 0.03


def test_banks_have_no_joint_normal():
    model, posterior = MODELS["mlp"], cases.state("mlp", "kronecker")
    bank = ff.BankState((posterior, posterior), jnp.log(jnp.array([0.5, 0.5])))
    with pytest.raises(ValueError, match="a mixture"):
        ff.predictions.joint(bank, model.apply_fn, model.inputs)
