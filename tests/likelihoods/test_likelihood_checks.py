"""Static facts that raise, and factories that return the same object."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisherflow_jax import likelihoods

SCALES = {
    "categorical": likelihoods.SOFTMAX,
    "bernoulli": likelihoods.LOGIT,
    "poisson": likelihoods.LOG,
    "negative_binomial": likelihoods.LOG,
    "gamma": likelihoods.LOG,
}


def test_what_other_rooms_ask_of_a_likelihood(case):
    asked = case.likelihood
    assert asked.scale == SCALES.get(case.name, likelihoods.IDENTITY)
    assert asked.is_classes == (case.name in ("categorical", "bernoulli"))
    of_two = case.name in ("gaussian_location_scale", "gumbel")
    mixes = of_two or case.name == "categorical"
    assert asked.mixes_outputs == mixes
    assert asked.needs_covariance == of_two
    assert asked.normal_errors == case.name.startswith("gaussian")
    assert (asked.with_noise is not None) == (case.name == "gaussian")
    of_the_root = {"cholesky", "diagonal_bound", "low_rank", "diagonal", "root"}
    for bound in (
        likelihoods.cholesky_root(asked),
        likelihoods.diagonal_root(asked),
        likelihoods.rank_root(asked, 1),
    ):
        for name in set(asked._fields) - of_the_root - {"probe_shape", "call"}:
            assert getattr(bound, name) == getattr(asked, name), name


def test_check_accepts_arrays_shapes_and_tracers(case):
    outputs, targets = jnp.asarray(case.outputs), jnp.asarray(case.targets)
    check = case.likelihood.check
    assert check(outputs, targets) is None
    assert check(outputs, None) is None
    assert check(case.outputs, case.targets) is None

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    assert check(struct(outputs), struct(targets)) is None

    def traced(outputs, targets):
        check(outputs, targets)
        return jnp.zeros(())

    jax.jit(traced)(outputs, targets)
    with pytest.raises(ValueError, match=case.likelihood.name):
        jax.eval_shape(traced, outputs, targets[:-1])


def test_check_names_the_shapes(case):
    outputs, targets = jnp.asarray(case.outputs), jnp.asarray(case.targets)
    for wrong in (targets[:-1], targets[:, None], targets[None]):
        with pytest.raises(ValueError) as error:
            case.likelihood.check(outputs, wrong)
        assert case.likelihood.name in str(error.value)
        assert str(outputs.shape) in str(error.value)
        assert str(wrong.shape) in str(error.value)
        with pytest.raises(ValueError):
            case.likelihood.log_prob(outputs, wrong)
    with pytest.raises(ValueError, match="floating point, got dtype int"):
        case.likelihood.check(outputs.astype(jnp.int32), targets)
    with pytest.raises(ValueError, match="targets must be"):
        case.likelihood.check(outputs, targets.astype(jnp.complex128))


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson", "gamma"])
def test_check_explains_a_trailing_axis_of_one(name):
    likelihood = getattr(likelihoods, name)()
    with pytest.raises(ValueError, match=r"outputs\[\.\.\., 0\]"):
        likelihood.check(jnp.zeros((4, 1)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"targets\[\.\.\., 0\]"):
        likelihood.check(jnp.zeros(4), jnp.ones((4, 1)))


@pytest.mark.parametrize("name", ["gaussian", "gamma"])
def test_pearson_does_not_broadcast(name):
    unknown = getattr(likelihoods, name)(None)
    with pytest.raises(ValueError, match="shape"):
        unknown.pearson(jnp.zeros((4, 1)), jnp.ones(4))


def test_check_of_classes():
    check = likelihoods.categorical().check
    with pytest.raises(ValueError, match=r"at least 1 class .*\(4, 0\).*bernoulli"):
        check(jnp.zeros((4, 0)), np.zeros(4, int))
    with pytest.raises(ValueError, match="at least 1 class "):
        check(jnp.zeros(()), None)
    with pytest.raises(ValueError, match="integer classes, got dtype float"):
        check(jnp.zeros((4, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="argmax"):
        check(jnp.zeros((4, 3)), np.zeros((4, 3)))


def test_check_of_location_and_scale():
    check = likelihoods.gaussian_location_scale().check
    for shape in ((4,), (4, 3), ()):
        with pytest.raises(ValueError, match="last axis of the outputs must be 2"):
            check(jnp.zeros(shape), jnp.zeros(shape[:-1]))


@pytest.mark.parametrize(
    "factory, parameter",
    [
        (likelihoods.gaussian, "scale"),
        (likelihoods.gamma, "shape"),
        (likelihoods.negative_binomial, "concentration"),
        (functools.partial(likelihoods.student_t, scale=1.0), "df"),
        (functools.partial(likelihoods.student_t, df=3.0), "scale"),
    ],
)
def test_parameters_must_be_positive(factory, parameter):
    for value in (0.0, -1.5, float("nan"), float("inf"), jnp.asarray(-1.5)):
        with pytest.raises(ValueError, match=f"{parameter} must be positive") as error:
            factory(**{parameter: value})
        assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=r"one number.*\(2,\)"):
        factory(**{parameter: jnp.ones(2)})


def test_factories_return_the_same_object():
    assert likelihoods.bernoulli() is likelihoods.bernoulli()
    assert likelihoods.categorical() is likelihoods.categorical()
    assert likelihoods.gaussian() is likelihoods.gaussian(scale=1.0)
    assert likelihoods.gaussian(2.0) is likelihoods.gaussian(scale=2.0)
    assert likelihoods.gaussian(2.0) is not likelihoods.gaussian(scale=3.0)
    assert likelihoods.gaussian(scale=None) is likelihoods.gaussian(None)
    assert likelihoods.gamma() is likelihoods.gamma(1.0)
    assert likelihoods.student_t(3.0, 1.0) is likelihoods.student_t(scale=1.0, df=3.0)
    assert likelihoods.negative_binomial(2) is likelihoods.negative_binomial(2.0)
    poisson = likelihoods.poisson()
    make = likelihoods.from_log_prob
    assert make(poisson.log_prob, poisson.sample) is make(
        poisson.log_prob, sample=poisson.sample, num_samples=16
    )
    assert make(poisson.log_prob, poisson.sample) is not make(
        poisson.log_prob, poisson.sample, num_samples=8
    )


def test_a_likelihood_prints_as_the_call_that_makes_it():
    categorical, gaussian = likelihoods.categorical(), likelihoods.gaussian()
    lower = likelihoods.rank_root(categorical, 2)
    assert repr(categorical) == "categorical()"
    assert repr(gaussian) == "gaussian(scale=1.0)"
    assert repr(likelihoods.cholesky_root(gaussian)) == "gaussian(scale=1.0)"
    assert repr(lower) == "rank_root(categorical(), k=2, num_iterations=None)"
    assert repr(categorical._replace(name="labels", call="")) == "labels"


def test_a_likelihood_is_a_static_argument_that_compiles_once():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def loss(likelihood, outputs, targets):
        traces.append(likelihood.name)
        return -jnp.sum(likelihood.log_prob(outputs, targets))

    for _ in range(3):
        loss(likelihoods.negative_binomial(2.0), jnp.zeros(2), jnp.ones(2))
    assert traces == ["negative_binomial"]


TRACED = {
    "gaussian": (likelihoods.gaussian, 1.7),
    "gamma": (likelihoods.gamma, 2.5),
    "negative_binomial": (likelihoods.negative_binomial, 2.5),
    "df": (lambda df: likelihoods.student_t(df, 0.6), 9.0),
    "scale": (lambda scale: likelihoods.student_t(9.0, scale), 0.6),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", sorted(TRACED))
def test_parameters_may_be_traced(name):
    factory, value = TRACED[name]
    outputs, targets = np.array([0.4]), np.array([1.3])

    @jax.jit
    @jax.value_and_grad
    def log_prob(value):
        return factory(value).log_prob(outputs, targets)[0]

    expected = factory(value).log_prob(outputs, targets)[0]
    np.testing.assert_allclose(log_prob(value)[0], expected, rtol=1e-12)
    step = 1e-5
    slope = (log_prob(value + step)[0] - log_prob(value - step)[0]) / (2 * step)
    np.testing.assert_allclose(log_prob(value)[1], slope, rtol=1e-6)

    def parts(value):
        likelihood = factory(value)
        narrow = jnp.zeros(1, jnp.float32)
        return (
            likelihood.log_prob(narrow, jnp.ones(1)),
            likelihood.root(narrow, jnp.ones(1)),
            likelihood.variance(narrow),
            likelihood.sample(jax.random.key(0), narrow),
        )

    # A traced float64 parameter does not widen float32 outputs.
    for part in jax.eval_shape(parts, jnp.float64(value)):
        assert part.dtype == jnp.float32
