"""The natural-gradient flow: score decay, monotone for every structure, invariance."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

geo, likelihoods, structures = ff.geometry, ff.likelihoods, ff.structures
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3)) * [1, 1, 0.05]
X[:, 0] = 1
MEAN = X @ [-0.5, 1.0, 4.0]
TARGETS = {
    "bernoulli": (RNG.random(120) < 1 / (1 + np.exp(-MEAN))).astype(float),
    "poisson": RNG.poisson(np.exp(0.5 * MEAN)).astype(float),
    "categorical": RNG.integers(0, 3, 120),
}
TIMES = jnp.array([0.5, 2.0, 4.0])


def linear(params, inputs):
    return inputs @ params


def classes(params, inputs):
    logits = inputs @ params
    return jnp.concatenate([logits, jnp.zeros_like(logits[:, :1])], 1)


@functools.cache
def evaluate(name, structure=structures.full()):  # noqa: B008
    apply_fn = classes if name == "categorical" else linear
    family = getattr(likelihoods, name)()
    return ff.fisher_flow(apply_fn, family, structure=structure).evaluate


def start(name):
    return jnp.zeros((3, 2)) if name == "categorical" else jnp.zeros(3)


def batch(name):
    return jnp.asarray(X), jnp.asarray(TARGETS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "bernoulli",
        pytest.param("categorical", marks=pytest.mark.slow),
        pytest.param("poisson", marks=pytest.mark.slow),
    ],
)
def test_the_score_decays_as_exp_minus_t(name):
    """Whatever the conditioning, in a canonical model; mean parameters go straight."""
    run, at = evaluate(name), batch(name)
    path = geo.natural_gradient_flow(run, start(name), at, times=TIMES, rtol=1e-9)
    first = run(start(name), at)[1]
    scores = jax.vmap(lambda p: run(p, at)[1])(path.params)
    decay = jnp.exp(-TIMES).reshape(3, *[1] * first.ndim)
    np.testing.assert_allclose(scores, decay * first[None], rtol=1e-6, atol=1e-9)
    assert not path.converged


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("block", "low_rank")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "diagonal", *SLOW])
def test_every_structure_goes_up_to_the_same_optimum(name):
    structure = structures.low_rank(2) if name == "low_rank" else None
    structure = structure or getattr(structures, name)()
    run, at = evaluate("bernoulli", structure), batch("bernoulli")
    prior = jnp.ones(3), 0.5

    def penalised(p):
        value = evaluate("bernoulli")(p, at)[0]
        return value - 0.25 * jnp.sum((p - 1) ** 2)

    times = jnp.array([0.0, 0.3, 1.0, 2.0, 4.0, 30.0])
    found = geo.natural_gradient_flow(
        run, start("bernoulli"), at, prior=prior, times=times
    )
    assert found.converged
    assert found.decrement < 1e-8
    values = jax.vmap(penalised)(found.params)
    assert np.all(np.diff(values) > 0)
    np.testing.assert_allclose(found.log_likelihood, values[-1])
    end = found.params[-1]
    np.testing.assert_allclose(jax.grad(penalised)(end), 0, atol=1e-3)
    total = ff.information.add(found.information, structures.Scalar(jnp.array(0.5)))
    largest = jnp.sqrt(jnp.max(ff.information.inverse_diagonal(total)))
    np.testing.assert_allclose(largest, found.largest_error, rtol=1e-9)


# ---- steps of one size

# An exponential distribution by its rate, its log and its mean; sample mean .5.
CHARTS = {
    "rate": (lambda r: r, lambda r: r, lambda r: r),
    "log": (jnp.log, jnp.exp, jnp.exp),
    "mean": (lambda r: 1 / r, lambda m: 1 / m, lambda m: 1 / m),
}
RATE, SAMPLE_MEAN = 0.3, 0.5
EXACT = 1 / (SAMPLE_MEAN + (1 / RATE - SAMPLE_MEAN) * np.exp(-1))
EXPONENTIAL = geo.metric(likelihoods.gamma())


def in_chart(name):
    """The start, what `evaluate` says, the metric, and the way back to the rate."""
    into, back, rate = CHARTS[name]

    def log_likelihood(x):
        return jnp.log(rate(x)) - rate(x) * SAMPLE_MEAN

    metric = geo.pullback(EXPONENTIAL, lambda x: -jnp.log(rate(x)))

    def evaluate(x, _):
        value, score = jax.value_and_grad(log_likelihood)(x)
        return value, score, structures.Full(metric(x)[0])

    return into(jnp.array(RATE)), evaluate, metric, back


def solved(solver, name, size):
    x, run, _, back = in_chart(name)
    options = {"step_size": size, "solver": solver, "time": 1.0, "tolerance": 0.0}
    return back(geo.natural_gradient_flow(run, x, None, **options).params)


@pytest.mark.slow
def test_the_flow_is_the_same_in_every_chart():
    ends = []
    for name in CHARTS:
        x, run, _, back = in_chart(name)
        found = geo.natural_gradient_flow(
            run, x, None, time=1.0, tolerance=0.0, rtol=1e-10
        )
        ends.append(back(found.params))
    np.testing.assert_allclose(ends, EXACT, rtol=1e-8)


def corrected(name, size):
    """Euler's steps with the geodesic correction."""
    x, run, metric, back = in_chart(name)

    def step(_, x):
        _, score, _ = run(x, None)
        v = score / metric(x)[0, 0]
        turn = geo.acceleration(metric, x, v)
        return x + size * v + 0.5 * size**2 * turn

    steps = jnp.round(1 / size).astype(int)
    return back(jax.lax.fori_loop(0, steps, step, x))


@pytest.mark.parametrize(
    ("way", "invariance", "accuracy"),
    [
        pytest.param(functools.partial(solved, None), 1, 1, marks=pytest.mark.slow),
        pytest.param(
            functools.partial(solved, diffrax.Midpoint()), 2, 2, marks=pytest.mark.slow
        ),
        (corrected, 2, 1),
    ],
    ids=["euler", "midpoint", "geodesic"],
)
def test_orders_of_invariance_and_of_accuracy(way, invariance, accuracy):
    ends_of = jax.jit(lambda size: jnp.stack([way(name, size) for name in CHARTS]))
    ends = np.array([ends_of(1 / 32), ends_of(1 / 64)])
    spread = np.ptp(ends, axis=1)
    error = np.abs(ends - EXACT).max(1)
    assert np.log2(spread[0] / spread[1]) == pytest.approx(invariance, abs=0.1)
    assert np.log2(error[0] / error[1]) == pytest.approx(accuracy, abs=0.1)


@pytest.mark.slow
def test_steps_of_one_size():
    """A step of 1 is Newton's; above 2 it is unstable."""
    run, at = evaluate("bernoulli"), batch("bernoulli")
    found = geo.natural_gradient_flow(run, start("bernoulli"), at, step_size=1.0)
    assert found.converged
    assert found.num_steps <= 8
    with pytest.raises(ValueError, match=r"steps of size 2\.2 made the log-likelihood"):
        geo.natural_gradient_flow(run, start("bernoulli"), at, step_size=2.2)


@pytest.mark.slow
def test_what_goes_wrong():
    run, (x, y) = evaluate("bernoulli"), batch("bernoulli")
    twice = x.at[:, 2].set(x[:, 1])
    with pytest.raises(ValueError, match=r"along \+1 theta\[1\] -1 theta\[2\]"):
        geo.natural_gradient_flow(run, start("bernoulli"), (twice, y))
    with pytest.raises(ValueError, match="did not end within 3 steps"):
        geo.natural_gradient_flow(run, start("bernoulli"), (x, y), max_steps=3)
    separated = (x[:, 1] > 0).astype(float)
    with pytest.warns(ff.DataWarning, match="grow without end"):
        lost = geo.natural_gradient_flow(
            run, start("bernoulli"), (x, separated), time=20.0
        )
    assert lost.largest_error > 1e3


@pytest.mark.slow
def test_jit_and_vmap():
    run, (x, y) = evaluate("bernoulli"), batch("bernoulli")
    starts = jnp.stack([jnp.zeros(3), jnp.array([0.3, -0.5, 1.0])])
    run_all = jax.jit(jax.vmap(lambda p: geo.natural_gradient_flow(run, p, (x, y))))
    found = run_all(starts)
    assert np.all(found.converged)
    np.testing.assert_allclose(found.params[0], found.params[1], atol=1e-3)


@pytest.mark.slow
def test_float32():
    run, (x, y) = evaluate("bernoulli"), batch("bernoulli")
    found = geo.natural_gradient_flow(run, start("bernoulli"), (x, y))
    single = [a.astype(jnp.float32) for a in (start("bernoulli"), x, y)]
    lone = geo.natural_gradient_flow(
        run, single[0], tuple(single[1:]), tolerance=1e-5, rtol=1e-5
    )
    assert lone.params.dtype == jnp.float32
    np.testing.assert_allclose(lone.params, found.params, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [2.0, 1.0]}, "times are an array"),
        ({"times": 1.0}, "times are an array"),
        ({"time": -1.0}, "time must not be negative"),
        ({"tolerance": -1.0}, "tolerance must be finite and not negative"),
        ({"rtol": -1.0}, "a relative tolerance must be positive"),
        ({"damping": -1.0}, "damping must be finite and not negative"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"max_steps": 0}, "max_steps must be a positive whole number"),
        ({"prior": 1.0}, r"prior is a pair, \(mean, precision\)"),
        ({"prior": (jnp.zeros(3), -1.0)}, "the prior's precision must be finite and"),
        ({"prior": (jnp.zeros(2), 1.0)}, "a prior's mean is a tree like the param"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        geo.natural_gradient_flow(
            evaluate("bernoulli"), jnp.zeros(3), batch("bernoulli"), **options
        )


def test_evaluate_is_a_function():
    flow = ff.fisher_flow(linear, likelihoods.bernoulli())
    with pytest.raises(TypeError, match=r"such as ff\.fisher_flow\(\.\.\.\)\.evaluate"):
        geo.natural_gradient_flow(flow, jnp.zeros(3), batch("bernoulli"))
