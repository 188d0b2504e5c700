"""The cubic Wald interval: against its formula in numpy, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

import firth
import fisherflow_jax as ff

MODEL = firth.MODEL
X, Y = firth.rows(40, np.array([-1.0, 1.5, -0.5]), seed=4)


def reference(x, y, contrast, weights=1.0, level=0.95):
    """`(estimate, lower, upper)` of a logistic regression."""
    theta = firth.firth(x, y, weights)
    along = np.linalg.solve(firth.information(x, theta, weights), contrast)
    error = np.sqrt(contrast @ along)
    p = expit(x @ theta)
    bends = -weights * p * (1 - p) * (1 - 2 * p)
    a = np.sum(bends * (x @ along / error) ** 3) / 6
    estimate, quantile = contrast @ theta, norm.ppf(0.5 + level / 2)
    ends = [
        brentq(lambda t, z=z: t + a * t**2 + a**2 * t**3 / 3 + 2 * a - z, -90, 90)
        for z in (quantile, -quantile)
    ]
    return estimate, *(estimate - error * np.array(ends))


def numbers(found):
    return np.array([found.estimate, found.lower, found.upper])


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_a_name_weights_and_a_function_ask_for_the_same(at_zero, level):
    expected = reference(X, Y, np.array([0.0, 1.0, 0.0]), level=level)
    asked = "theta[1]", jnp.array([0.0, 1.0, 0.0]), lambda theta: theta[1]
    for contrast in asked:
        found = ff.intervals.corrected(
            at_zero(3), *MODEL, (X, Y), contrast, level=level
        )
        np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)
        assert found.lower.shape == ()


@pytest.mark.slow
def test_all_parameters_and_affine_functions_of_several_values(at_zero):
    expected = np.array([reference(X, Y, row) for row in np.eye(3)]).T
    found = ff.intervals.corrected(at_zero(3), *MODEL, (X, Y))
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)

    def function(theta):
        return {"gap": theta[1] - theta[2] - 2.0, "twice": 2 * theta[:2]}

    found = ff.intervals.corrected(at_zero(3), *MODEL, (X, Y), function)
    rows = np.array([[0, 1.0, -1], [2, 0, 0], [0, 2, 0]])
    expected = np.array([reference(X, Y, row) for row in rows]).T
    gap = [found.estimate["gap"], found.lower["gap"], found.upper["gap"]]
    np.testing.assert_allclose(gap, expected[:, 0] - 2, rtol=1e-5)
    np.testing.assert_allclose(found.upper["twice"], expected[2, 1:], rtol=1e-5)


@pytest.mark.slow
def test_however_rows_come_and_weights_are_multiplicities(at_zero):
    weights = np.random.default_rng(0).integers(1, 4, len(Y)).astype(float)
    expected = reference(X, Y, np.array([0.0, 1.0, 0.0]), weights)
    parts = [slice(0, 15), slice(15, 30), slice(30, 40)]
    batches = [(X[k], Y[k], weights[k]) for k in parts]
    stacked = ff.Stacked(*(a.reshape((4, 10, *a.shape[1:])) for a in (X, Y, weights)))
    repeated = tuple(np.repeat(a, weights.astype(int), axis=0) for a in (X, Y))
    dicts = [dict(zip("xyw", batch, strict=True)) for batch in batches]
    for data, options in (
        ((X, Y, weights), {}),
        (batches, {}),
        (iter(batches), {}),
        (stacked, {}),
        (repeated, {}),
        (dicts, {"to_batch": lambda item: (item["x"], item["y"], item["w"])}),
    ):
        found = ff.intervals.corrected(at_zero(3), *MODEL, data, "theta[1]", **options)
        np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)


@pytest.mark.slow
def test_parameters_with_names_offsets_and_shared_parts(at_zero):
    shift = np.array([0.3, -0.2, 0.1])
    params = {"bias": jnp.zeros(()), "slopes": jnp.zeros(2)}
    state = ff.posterior(params, ff.structures.full(), prior_precision=1.0)

    def apply_fn(p, inputs):
        x = inputs["x"] * inputs["unit"]
        return p["bias"] + x @ p["slopes"] + inputs["offset"]

    inputs = {"x": X[:, 1:], "offset": X @ shift}
    halves = [
        ({**jax.tree.map(lambda a, k=k: a[k], inputs), "unit": ff.Shared(2.0)}, Y[k])
        for k in (slice(0, 20), slice(20, 40))
    ]
    found = ff.intervals.corrected(state, apply_fn, MODEL[1], halves, "slopes[0]")
    expected = (np.array(reference(X, Y, np.eye(3)[1])) - shift[1]) / 2
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)
    both = ff.intervals.corrected(state, apply_fn, MODEL[1], halves, "slopes")
    assert both.lower.shape == (2,)
    np.testing.assert_allclose(both.lower[0], found.lower, rtol=1e-9)


def test_linear_changes_of_coordinates_change_nothing(at_zero):
    turn = np.array([[1.0, 0.3, 0.0], [0.0, 2.0, 0.5], [0.0, 0.0, 0.7]])
    contrast = np.array([0.0, 1.0, -1.0])
    found = ff.intervals.corrected(at_zero(3), *MODEL, (X, Y), contrast)
    other = ff.intervals.corrected(at_zero(3), *MODEL, (X @ turn, Y), turn.T @ contrast)
    np.testing.assert_allclose(numbers(other), numbers(found), rtol=1e-5)


@pytest.mark.slow
def test_separated_rows_have_finite_intervals(at_zero):
    x, y = firth.separated()
    found = ff.intervals.corrected(at_zero(2), *MODEL, (x, y), "theta[1]")
    expected = reference(x, y, np.array([0.0, 1.0]))
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-4)


@pytest.mark.slow
def test_counts_and_a_normal_are_what_closed_forms_say(at_zero):
    # Jeffreys' prior of a log-rate is half a count more
    counts = np.array([1.0, 2.0, 1.0])
    model = (lambda theta, x: x * theta), ff.likelihoods.poisson()
    state = ff.posterior(jnp.zeros(()), ff.structures.full(), prior_precision=1.0)
    found = ff.intervals.corrected(state, *model, (np.ones(3), counts))
    np.testing.assert_allclose(found.estimate, np.log(4.5 / 3), rtol=1e-7)
    np.testing.assert_allclose(found.skewness, -1 / np.sqrt(4.5), rtol=1e-7)
    # of a normal, Wald's
    model = MODEL[0], ff.likelihoods.gaussian(2.0)
    found = ff.intervals.corrected(at_zero(3), *model, (X, Y), "theta[2]")
    gram = X.T @ X / 4
    middle = np.linalg.solve(gram, X.T @ Y / 4)[2]
    reach = norm.ppf(0.975) * np.sqrt(np.linalg.inv(gram)[2, 2])
    expected = [middle, middle - reach, middle + reach]
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-7)


@pytest.mark.slow
def test_softmax_by_whole_arrays_of_derivatives():
    labels = np.random.default_rng(1).integers(0, 3, 40)
    state = ff.posterior(jnp.zeros((3, 2)), ff.structures.full(), prior_precision=1.0)

    def apply_fn(theta, x):
        logits = x @ theta
        return jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], 1)

    found = ff.intervals.corrected(
        state, apply_fn, ff.likelihoods.categorical(), (X, labels), "theta[1,0]"
    )

    def log_likelihood(flat):
        rows = jax.nn.log_softmax(apply_fn(flat.reshape((3, 2)), X))
        return jnp.sum(rows[jnp.arange(40), labels])

    hessian = jax.jit(jax.hessian(log_likelihood))
    thirds = jax.jit(jax.jacfwd(hessian))

    def penalty(flat):
        return 0.5 * jnp.linalg.slogdet(-hessian(flat))[1]

    slope = jax.jit(jax.grad(lambda flat: log_likelihood(flat) + penalty(flat)))
    theta = np.zeros(6)
    for _ in range(200):
        theta = theta - np.linalg.solve(hessian(theta), slope(theta))
    assert np.abs(slope(theta)).max() < 1e-9
    # Firth's score is the score less half of the contracted third derivative
    inverse = np.linalg.inv(-hessian(theta))
    own = jax.grad(log_likelihood)(theta)
    own = own - 0.5 * np.einsum("ijk,jk->i", thirds(theta), inverse)
    np.testing.assert_allclose(own, 0, atol=1e-9)
    error = np.sqrt(inverse[2, 2])
    third = np.einsum("ijk,i,j,k", thirds(theta), *[inverse[2] / error] * 3)
    np.testing.assert_allclose(found.estimate, theta[2], rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-5)
    np.testing.assert_allclose(found.skewness, third, rtol=1e-5)


@pytest.mark.slow
def test_compiled_and_mapped_as_eager(at_zero):
    data = [firth.rows(30, np.array([0.0, 1.0, -0.5]), seed) for seed in range(4)]
    stacked = tuple(map(np.stack, zip(*data, strict=True)))

    def interval(x, y):
        return ff.intervals.corrected(at_zero(3), *MODEL, (x, y), "theta[1]")

    mapped = jax.jit(jax.vmap(interval))(*stacked)
    expected = np.array([reference(*one, np.eye(3)[1]) for one in data]).T
    np.testing.assert_allclose(numbers(mapped), expected, rtol=1e-5)


@pytest.mark.slow
def test_in_float32():
    with jax.enable_x64(False):
        state = ff.posterior(jnp.zeros(3), ff.structures.full(), prior_precision=1.0)
        found = ff.intervals.corrected(state, *MODEL, (X, Y), "theta[1]")
    assert found.lower.dtype == np.float32
    expected = reference(X, Y, np.eye(3)[1])
    np.testing.assert_allclose(numbers(found), expected, rtol=2e-3)


def test_a_bad_row_is_refused_or_costs_that_row(at_zero):
    bad = np.where(np.arange(40) == 7, np.nan, X[:, 1])
    x = np.stack([X[:, 0], bad, X[:, 2]], 1)
    with pytest.raises(ValueError, match=r"row 7"):
        ff.intervals.corrected(at_zero(3), *MODEL, (x, Y))
    found = ff.intervals.corrected(
        at_zero(3), *MODEL, (x, Y), "theta[1]", bad_rows="drop"
    )
    kept = np.arange(40) != 7
    expected = reference(X[kept], Y[kept], np.eye(3)[1])
    np.testing.assert_allclose(numbers(found), expected, rtol=1e-5)


def probit(theta, x):
    return jax.scipy.special.logit(jax.scipy.stats.norm.cdf(x @ theta))


def curved(theta, x):
    return x @ jnp.sinh(theta)


@jax.custom_vjp
def without_tangents(x):
    return x


without_tangents.defvjp(lambda x: (x, None), lambda _, g: (g,))
LIKELIHOODS = ff.likelihoods
REFUSED = {
    "unknown dispersion": ({"likelihood": LIKELIHOODS.gaussian(scale=None)}, "unknown"),
    "quasi": ({"likelihood": LIKELIHOODS.bernoulli(dispersion=None)}, "unknown"),
    "concentration": (
        {"likelihood": LIKELIHOODS.negative_binomial(None)},
        "concentration of .* is unknown",
    ),
    "gamma": ({"likelihood": LIKELIHOODS.gamma(2.0), "y": Y + 1}, "canonical"),
    "probit": ({"apply_fn": probit}, "canonical"),
    "curved": ({"apply_fn": curved}, "canonical"),
    "tangents": (
        {"apply_fn": lambda theta, x: without_tangents(x @ theta)},
        "jax.custom_jvp",
    ),
    "redundant": ({"x": X[:, [0, 1, 1]]}, "do not determine"),
    "zeros": ({"x": X * [1.0, 1, 0]}, "do not determine"),
    "targets": ({"y": None}, "needs targets"),
    "name": ({"contrast": "slope"}, r"no parameter has the name 'slope'.*theta\[2\]"),
    "shape": ({"contrast": jnp.ones(2)}, "a contrast is"),
    "nothing": ({"contrast": jnp.zeros(3)}, "of no parameter"),
    "bent": ({"contrast": lambda theta: theta[0] * theta[1]}, "not linear"),
    "level": ({"level": 1.5}, "level"),
}


SLOW = {"gamma", "curved", "zeros"}  # each compiles a search of its own


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in REFUSED],
)
def test_what_has_no_corrected_interval_is_refused(at_zero, name):
    given, match = REFUSED[name]
    given = {"x": X, "y": Y, "contrast": "theta[1]", "level": 0.95, **given}
    with pytest.raises(ValueError, match=match):
        ff.intervals.corrected(
            at_zero(3),
            given.get("apply_fn", MODEL[0]),
            given.get("likelihood", MODEL[1]),
            (given["x"], given["y"]),
            given["contrast"],
            level=given["level"],
        )


@pytest.mark.slow
def test_a_mixture_and_no_batches_are_refused_and_under_jit_ends_are_nan(at_zero):
    with pytest.raises(TypeError, match="mixture"):
        ff.intervals.corrected([at_zero(3)] * 2, *MODEL, (X, Y))
    with pytest.raises(ValueError, match="no batches"):
        ff.intervals.corrected(at_zero(3), *MODEL, [])
    found = jax.jit(
        lambda y: ff.intervals.corrected(at_zero(3), probit, MODEL[1], (X, y))
    )(Y)
    assert np.isnan(found.lower).all() and np.isnan(found.upper).all()


def test_firths_penalty_is_jeffreys_prior():
    estimator = ff.estimators.exact(*MODEL, ff.structures.full())
    prior = ff.geometry.jeffreys(ff.geometry.metric(estimator, (X, Y)))
    theta = np.array([-0.5, 1.0, 0.3])
    slope = jax.jit(jax.grad(prior))(theta)
    expected = firth.firth_score(X, Y, theta) - X.T @ (Y - expit(X @ theta))
    np.testing.assert_allclose(slope, expected, atol=1e-10)
