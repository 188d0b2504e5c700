"""Random probes: mean and variance over all signs, likelihood by likelihood."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import estimator_cases as cases
import fisherflow_jax as ff
from estimator_cases import MODELS, NAMED, STRUCTURES
from sign_enumeration import KEY, given, outcomes, probe_keys, signs

EXACT = {"rtol": 1e-10, "atol": 1e-12}
FULL, DIAGONAL = ff.structures.full(), ff.structures.diagonal()
ENTRIES = {
    "categorical": 3,
    "tokens": 6,
    "labels": 3,
    "location_scale": 2,
    "poisson": 1,
    "gaussian": 2,
}


def first(name, count):
    model = NAMED[name]
    return model._replace(inputs=model.inputs[:count], targets=model.targets[:count])


def parts(name, count, weights=None):
    """The Fisher information of each of the first examples, `(count, d, d)`."""
    weights = np.ones(count) if weights is None else weights
    padded = np.zeros((count, cases.COUNT))
    np.fill_diagonal(padded, weights)
    return np.stack([cases.fisher(name, row) for row in padded])


def fourth_moments(name, count, root):
    """`sum a^4` over the entries of all `L^T J`, `(d,)`."""
    outputs, jacobians = cases.jacobian(name)
    model = first(name, count)
    shaped = model.apply_fn(model.params, model.inputs)
    columns = ff.likelihoods.root_columns(root(model.likelihood), shaped)
    columns = np.asarray(columns).reshape((columns.shape[0], count, -1))
    entries = np.einsum("rnc,ncd->nrd", columns, jacobians[:count])
    return np.sum(entries**4, axis=(0, 1))


# ---- the mean over all signs


@pytest.mark.slow_cases
@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_mean_over_all_signs_is_the_information(model):
    name = model.name
    count = 2 if name in ("tokens", "categorical", "labels") else 3
    weights = np.array([2.5, 1.0, 0.0])[:count]
    found = outcomes(
        ff.estimators.hutchinson,
        first(name, count),
        FULL,
        ENTRIES[name],
        weights=weights,
    )
    # sums of outer products, not diagonals alone
    expected = parts(name, count, weights).sum(0)
    np.testing.assert_allclose(found.mean(0), expected, **EXACT)


@pytest.mark.slow_cases
@pytest.mark.parametrize("groups", [1, None])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_mean_is_kept_by_every_structure(structure, groups):
    found = outcomes(
        ff.estimators.hutchinson,
        first("categorical", 2),
        STRUCTURES[structure],
        3,
        groups=groups,
    )
    expected = cases.kept(structure, parts("categorical", 2).sum(0))
    np.testing.assert_allclose(found.mean(0), expected, **EXACT)


def test_a_sampled_root_has_the_mean_too():
    # the score of a Laplace distribution is -1 or 1, so every sampled root is exact
    likelihood = ff.likelihoods.from_log_prob(
        lambda outputs, targets: -jnp.abs(targets - outputs),
        lambda key, outputs: (
            outputs + jax.random.laplace(key, outputs.shape, outputs.dtype)
        ),
        num_samples=3,
    )
    model = first("poisson", 2)._replace(likelihood=likelihood)
    found = outcomes(ff.estimators.hutchinson, model, FULL, 3)
    _, jacobians = cases.jacobian("poisson")
    expected = np.einsum("nad,nae->de", jacobians[:2], jacobians[:2])
    np.testing.assert_allclose(found.mean(0), expected, **EXACT)


# ---- the variance over all signs


def diagonal_outcomes(**options):
    found = outcomes(
        ff.estimators.hutchinson, first("categorical", 4), DIAGONAL, 3, **options
    )
    return np.diagonal(found, axis1=1, axis2=2)


@pytest.mark.parametrize("groups", [1, 2, 4, None])
def test_the_variance_falls_with_the_groups(groups):
    squares = np.diagonal(parts("categorical", 4), axis1=1, axis2=2)
    of_groups = squares.reshape((groups or 4, -1, squares.shape[1])).sum(1)
    moments = fourth_moments("categorical", 4, lambda likelihood: likelihood)
    found = diagonal_outcomes(groups=groups)
    np.testing.assert_allclose(found.mean(0), squares.sum(0), **EXACT)
    expected = 2 * np.sum(of_groups**2, axis=0) - 2 * moments
    np.testing.assert_allclose(found.var(0), expected, **EXACT)
    # the relative standard deviation has a bound whatever the model
    assert np.all(found.std(0) <= np.sqrt(2) * found.mean(0))


def test_the_variance_of_probes_is_that_of_their_mean():
    model = first("location_scale", 2)
    single = outcomes(ff.estimators.hutchinson, model, DIAGONAL, 2)
    double = outcomes(ff.estimators.hutchinson, model, DIAGONAL, 2, num_probes=2)
    np.testing.assert_allclose(double.mean(0), single.mean(0), **EXACT)
    np.testing.assert_allclose(double.var(0), single.var(0) / 2, **EXACT)


def test_two_classes_and_a_root_of_one_column_have_no_variance():
    model = NAMED["categorical"]._replace(
        apply_fn=lambda params, x: model_outputs(params, x)[:, :2]
    )
    run = [
        jax.jit(factory(model.apply_fn, model.likelihood, DIAGONAL, **options))
        for factory, options in (
            (
                ff.estimators.hutchinson,
                {"root": ff.likelihoods.cholesky_root, "groups": None},
            ),
            (ff.estimators.exact, {}),
        )
    ]
    batch = model.inputs, None
    exact = run[1](model.params, batch).entries
    for key in range(3):
        found = run[0](model.params, batch, key).entries
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), found, exact
        )


def model_outputs(params, x):
    return NAMED["categorical"].apply_fn(params, x)


# ---- the formulas of the paper


def literal(form, model, probes):
    """The square of the gradient of a scalar `h(params, probes)`."""

    def scalar(params):
        return form(model.apply_fn(params, model.inputs), probes)

    return jax.tree.map(jnp.square, jax.grad(scalar)(model.params))


def published(logits, probes):
    log_p = jax.nn.log_softmax(logits)
    held = jax.lax.stop_gradient(jnp.exp(0.5 * log_p))
    return jnp.sum(held * log_p * probes)


def square_root(logits, probes):
    return 2 * jnp.sum(jnp.exp(0.5 * jax.nn.log_softmax(logits)) * probes)


def raw_logits(logits, probes):
    held = jax.lax.stop_gradient(jnp.exp(0.5 * jax.nn.log_softmax(logits)))
    return jnp.sum(held * logits * probes)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name, form",
    [
        ("hutchinson", published),
        ("hutchinson", square_root),
        ("hutchinson_sqrt", square_root),
        ("hutchinson_dg", raw_logits),
    ],
)
def test_the_same_probes_give_the_published_square(name, form):
    model = NAMED["categorical"]

    @jax.jit
    def literally(params):
        keys = probe_keys(cases.COUNT)[:, 0]
        probes = jax.vmap(lambda key: ff.estimators.rademacher(key, (3,)))(keys)
        return literal(form, model._replace(params=params), probes.astype(float))

    estimator = getattr(ff.estimators, name)(model.apply_fn, model.likelihood, DIAGONAL)
    found = jax.jit(estimator)(model.params, model.batch, KEY).entries
    expected = literally(model.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9), found, expected
    )


def test_hutchinson_sqrt_is_an_alias():
    assert ff.estimators.hutchinson_sqrt is ff.estimators.hutchinson


# ---- mutations: each must be seen by the check of the mean


def mean_of(likelihood=None, probe=None):
    model = first("categorical", 2)
    likelihood = likelihood or model.likelihood
    patterns = signs(6).reshape((-1, 2, 1, 3))

    @jax.jit
    @jax.vmap
    def run(pattern):
        estimator = ff.estimators.hutchinson(
            model.apply_fn, likelihood, FULL, probe=(probe or given)(pattern)
        )
        return ff.information.to_dense(estimator(model.params, model.batch, KEY))

    return np.asarray(run(patterns)).mean(0)


def relative_error(found):
    expected = parts("categorical", 2).sum(0)
    return np.abs(found - expected).max() / np.abs(expected).max()


def root_of_p(outputs, probes, key=None):
    p = jax.nn.softmax(outputs)
    probes = probes.astype(p.dtype)
    return p * probes - p * jnp.sum(p * probes, -1, keepdims=True)


def shared_probe(pattern):
    return lambda key, shape, dtype: pattern[0].astype(dtype).reshape(shape)


def test_the_check_of_the_mean_sees_mutations():
    categorical = ff.likelihoods.categorical()
    assert relative_error(mean_of()) < 1e-12
    assert relative_error(mean_of(categorical._replace(root=root_of_p))) > 0.1
    assert relative_error(mean_of(probe=shared_probe)) > 0.1


def test_the_formula_without_the_detached_root_is_another_estimator():
    def undetached(logits, probes):
        log_p = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(0.5 * log_p) * log_p * probes)

    model = first("categorical", 2)
    patterns = signs(6).reshape((-1, 2, 3))

    def mean(form):
        squares = jax.jit(jax.vmap(functools.partial(literal, form, model)))(patterns)
        flat = [np.asarray(x).mean(0).ravel() for x in jax.tree.leaves(squares)]
        return np.concatenate(flat)

    expected = np.diag(parts("categorical", 2).sum(0))
    np.testing.assert_allclose(mean(published), expected, rtol=1e-10)
    assert np.max(np.abs(mean(undetached) / expected - 1)) > 0.1


def test_the_mean_is_taken_after_squaring():
    model, probes = first("categorical", 4), 8
    run = jax.jit(
        ff.estimators.hutchinson(
            model.apply_fn, model.likelihood, DIAGONAL, num_probes=probes, groups=None
        )
    )
    found = run(model.params, model.batch, 1).entries
    expected = np.diag(parts("categorical", 4).sum(0))
    ratio = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)]) / expected
    # squares of means would be about 1 / probes of it
    assert 0.5 < np.median(ratio) < 2.0


@pytest.mark.slow
def test_saturated_logits_stay_finite():
    model = NAMED["categorical"]

    def saturated(params, x):
        return model.apply_fn(params, x) + jnp.array([200.0, 0.0, -200.0])[None]

    for name in ("hutchinson", "hutchinson_dg", "hutchinson_rank1"):
        estimator = getattr(ff.estimators, name)(saturated, model.likelihood, DIAGONAL)
        with jax.enable_x64(False):
            params, inputs = jax.tree.map(
                lambda x: np.asarray(x, np.float32), (model.params, model.inputs)
            )
            found = jax.jit(estimator)(params, (inputs, None), 0)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found)), name

    # the naive root has no gradient there
    def naive(logits):
        return jnp.sum(jnp.sqrt(jax.nn.softmax(logits)))

    logits = jnp.array([200.0, 0.0, -200.0], jnp.float32)
    assert not np.all(np.isfinite(jax.grad(naive)(logits)))
