"""Variational training under Optax's wrappers, in every type, and with bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import get_information, get_posterior, variational
from together import together

PARAMS = cases.network_params()
STRUCTURES = {
    "diagonal": ff.structures.diagonal(),
    "full": ff.structures.full(),
    "scalar": ff.structures.scalar(),
}
ESTIMATORS = {
    name: ff.estimators.exact(*cases.MODEL, structure)
    for name, structure in STRUCTURES.items()
}
CHOICES = {
    "VOGN": ESTIMATORS["diagonal"],
    "VOGN, full": ESTIMATORS["full"],
    "VOGN, scalar": ESTIMATORS["scalar"],
    "VON": ff.estimators.observed(*cases.MODEL, STRUCTURES["diagonal"]),
    "Stein": None,
}
OPTIONS = {"num_observations": 12, "information": 30.0, "b2": 0.9}
STATIC = "estimator", "num_samples"
SHOWN = {"b": True, "out": True, "w": False}
FREE = {name: "free" if shown else "frozen" for name, shown in SHOWN.items()}


def made(name, rate=0.1, **options):
    return variational(rate, CHOICES[name], **OPTIONS | options)


def wrapped(name):
    frozen = {"free": made(name), "frozen": optax.set_to_zero()}
    injected = optax.inject_hyperparams(variational, static_args=STATIC)
    return {
        "plain": made(name),
        "injected": injected(0.1, CHOICES[name], **OPTIONS),
        "chained": optax.chain(optax.clip_by_global_norm(1e6), made(name)),
        "masked": optax.masked(made(name), SHOWN),
        "frozen": optax.partition(frozen, FREE),
        "apply_if_finite": optax.apply_if_finite(made(name), 3),
        "multi_steps": optax.MultiSteps(made(name), every_k_schedule=2),
    }


ALL = {
    f"{name}, {kind}": optimizer
    for name in ("VOGN", "Stein")
    for kind, optimizer in wrapped(name).items()
}


def step(optimizer, params, state, key, batch=cases.NETWORK_BATCH, **extra):
    posterior = get_posterior(state, params)
    drawn = ff.sample(posterior, key)
    # what is not shown is held
    drawn = jax.tree.map(
        lambda x, p: p if isinstance(x, optax.MaskedNode) else x,
        drawn,
        params,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    gradients = jax.grad(cases.LOSS)(drawn, batch)
    updates, state = optimizer.update(
        gradients, state, params, drawn=drawn, batch=batch, **extra
    )
    return updates, state, gradients


@functools.cache
def results():
    @cases.compiled
    def run(params):
        found = {}
        for name, optimizer in ALL.items():
            state, steps = optimizer.init(params), []
            for number in range(2):
                key = number // 2 if "multi" in name else number
                updates, state, gradients = step(
                    optimizer, params, state, key, value=1.0, grad=None
                )
                steps.append(updates)
            found[name] = steps, state, gradients
        return found

    return run(PARAMS)


def assert_close(left, right, rtol=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), left, right
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VOGN", "Stein"])
def test_wrappers_change_nothing_of_what_they_show(name):
    plain, state, _ = results()[f"{name}, plain"]
    assert all(np.any(x) for x in jax.tree.leaves(plain))
    for kind in ("injected", "chained", "apply_if_finite"):
        assert_close(results()[f"{name}, {kind}"][0], plain)
    multi, inner, _ = results()[f"{name}, multi_steps"]
    assert not any(np.any(x) for x in jax.tree.leaves(multi[0]))
    # two mini-batches that are one, at one draw
    assert_close(multi[1], plain[0])
    assert optax.tree.get(inner, "information") is not None
    for kind in ("masked", "frozen"):
        steps, state, gradients = results()[f"{name}, {kind}"]
        held = gradients["w"] if kind == "masked" else jnp.zeros_like(PARAMS["w"])
        np.testing.assert_array_equal(steps[1]["w"], held)
        assert all(np.any(steps[1][key]) for key in ("b", "out"))
        posterior = get_posterior(state, PARAMS)
        assert posterior.mean["w"] == optax.MaskedNode()
        entries = posterior.information.entries
        assert entries["w"] == optax.MaskedNode()
        assert np.all(entries["b"] > 0)


@pytest.mark.parametrize("name", CHOICES)
def test_init_needs_no_arrays_and_map_params_sees_what_is_like_them(name):
    optimizer = made(name, prior_mean=PARAMS)
    state = optimizer.init(PARAMS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    types = jax.tree.map(jax.typeof, state)
    assert jax.tree.map(jax.typeof, optimizer.init(shapes)) == types
    evaluated = jax.eval_shape(optimizer.init, PARAMS)
    assert jax.tree.structure(evaluated) == jax.tree.structure(state)
    optimizer = made(name)
    state = optimizer.init(PARAMS)
    mapped = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    np.testing.assert_array_equal(mapped[0].momentum["w"], np.ones((2, 4)))
    assert mapped[0].step == 0
    if name in ("VOGN", "VON", "Stein"):
        entries = mapped[0].information.entries
        np.testing.assert_array_equal(entries["w"], np.full((2, 4), 32.0))
    for field in state[0]._fields:
        assert optax.tree.get(state, field, default=None) is not None or (
            getattr(state[0], field) is None
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("VOGN, full", "float32"),
        ("VOGN, scalar", "bfloat16"),
        ("VON", "float64"),
        ("Stein", "bfloat16"),
        ("Stein", "float16"),
    ],
)
def test_types_are_stable_through_a_conditional_and_compiled_once(name, dtype):
    optimizer = made(name)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    state = optimizer.init(params)
    wide = jnp.dtype("float64" if dtype == "float64" else "float32")
    assert {x.dtype for x in jax.tree.leaves(state[0].information)} == {wide}

    @functools.partial(cases.compiled, donate_argnums=1)
    def run(params, state, take, key):
        def update():
            return step(optimizer, params, state, key)[:2]

        def skip():
            return optax.tree.zeros_like(params), state

        updates, state = jax.lax.cond(take, update, skip)
        return optax.apply_updates(params, updates), state

    types = jax.tree.map(jax.typeof, (params, state))
    for number in range(3):
        params, state = run(params, state, True, jax.random.key(number))
        assert jax.tree.map(jax.typeof, (params, state)) == types
    assert run._cache_size() == 1
    assert state[0].num_skipped == 0 and state[0].step == 3


@pytest.mark.slow
def test_a_vmap_of_scans_is_each_run_alone_and_eager_is_compiled():
    optimizer = made("VOGN", num_samples=3)

    def take(params, state, key):
        drawn = ff.sample(get_posterior(state, params), key, (3,))
        gradients = jax.vmap(jax.grad(cases.LOSS), (0, None))(
            drawn, cases.NETWORK_BATCH
        )
        updates, state = optimizer.update(
            gradients, state, params, drawn=drawn, batch=cases.NETWORK_BATCH
        )
        return optax.apply_updates(params, updates), state

    def train(params, keys):
        def step(carry, key):
            return take(*carry, key), None

        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), PARAMS)
    together, alone = cases.compiled(
        lambda both: (
            jax.vmap(train, (0, None))(both, keys),
            train(jax.tree.map(lambda x: x[0], both), keys),
        )
    )(both)
    assert_close(jax.tree.map(lambda x: x[0], together), alone)
    params, state = PARAMS, optimizer.init(PARAMS)
    for key in keys:
        params, state = take(params, state, key)
    assert_close((params, state), alone, 1e-4)


@pytest.mark.slow
def test_several_draws_are_averaged():
    """Of equal draws the update is that of one; of others, the mean of both."""
    batch, count = cases.NETWORK_BATCH, 2
    offsets = [0.1, -0.3]

    @cases.compiled
    def run(params):
        drawn = [jax.tree.map(lambda x, o=o: x + o, params) for o in offsets]
        gradients = [jax.grad(cases.LOSS)(x, batch) for x in drawn]
        found = {}
        for name in ("VOGN", "Stein"):
            one, many = made(name, b1=0.0), made(name, num_samples=count, b1=0.0)
            single = [
                one.update(g, one.init(params), params, drawn=x, batch=batch)[1]
                for g, x in zip(gradients, drawn, strict=True)
            ]
            stacked = [
                jax.tree.map(lambda *x: jnp.stack(x), *trees)
                for trees in (gradients, drawn)
            ]
            both = many.update(
                stacked[0], many.init(params), params, drawn=stacked[1], batch=batch
            )[1]
            found[name] = single, both
        return found

    for name, (single, both) in run(PARAMS).items():
        each = [state[0].information.entries for state in single]
        mean = jax.tree.map(lambda x, y: (x + y) / 2, *each)
        if name == "VOGN":  # linear in what was measured
            assert_close(both[0].information.entries, mean)
        momentum = jax.tree.map(
            lambda x, y: (x + y) / 2, *(state[0].momentum for state in single)
        )
        assert_close(both[0].momentum, momentum)


@pytest.mark.slow
def test_an_estimator_that_draws_takes_its_key_from_the_state():
    estimator = ff.estimators.monte_carlo(*cases.MODEL, STRUCTURES["diagonal"])
    with pytest.raises(ValueError, match="monte_carlo draws at random"):
        variational(0.1, estimator, **OPTIONS).init(PARAMS)
    optimizer = variational(0.1, estimator, **OPTIONS, key=0)
    state = optimizer.init(PARAMS)

    @cases.compiled
    def entries(state, **extra):
        batch = cases.NETWORK_BATCH
        extra = {"drawn": PARAMS, "batch": batch} | extra
        _, after = optimizer.update(PARAMS, state, PARAMS, **extra)
        return after, after[0].information.entries["w"]

    after, first = entries(state)
    np.testing.assert_array_equal(first, entries(state)[1])
    assert np.any(entries(state, key=jax.random.key(3))[1] != first)
    moved = after[0]._replace(information=state[0].information)
    assert np.any(entries((moved, after[1]))[1] != first)  # of the next step


@pytest.mark.slow
def test_what_is_not_finite_moves_nothing_and_bad_rows_are_counted():
    x, y = cases.NETWORK_BATCH
    bad = x.copy()
    bad[3, 0] = np.nan
    optimizer = made("VOGN")
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"row 3 of the batch has .* is not finite"):
        optimizer.update(PARAMS, state, PARAMS, drawn=PARAMS, batch=(bad, y))

    dropping = made("VOGN", bad_rows="drop")
    _, after = dropping.update(PARAMS, state, PARAMS, drawn=PARAMS, batch=(bad, y))
    assert (after[0].rows_skipped, after[0].num_skipped) == (1, 0)
    kept = np.delete(x, 3, 0), np.delete(y, 3)
    _, clean = dropping.update(PARAMS, state, PARAMS, drawn=PARAMS, batch=kept)
    assert_close(after[0].information, clean[0].information)

    for gradients, drawn in ((jnp.nan, 1.0), (1.0, jnp.inf)):
        given = [jax.tree.map(lambda x, v=v: x * v, PARAMS) for v in (gradients, drawn)]
        for name in ("VOGN", "Stein"):
            optimizer = made(name)
            state = optimizer.init(PARAMS)
            updates, after = jax.jit(
                lambda g, x, state, optimizer=optimizer: optimizer.update(
                    g, state, PARAMS, drawn=x, batch=cases.NETWORK_BATCH
                )
            )(*given, state)
            assert not any(np.any(x) for x in jax.tree.leaves(updates))
            assert after[0].num_skipped == 1 and after[0].step == 0
            assert_close(after[0].information, state[0].information)


# ---- what does not fit


@together
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a positive whole .* got 0"),
        ({"num_observations": 0}, "num_observations must be positive .* got 0"),
        ({"b1": 1.0}, r"b1 must be in \[0, 1\); got 1.0"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\); got 1.0"),
        ({"bad_rows": "keep"}, "bad_rows .* 'keep'"),
        ({"estimator": "exact"}, "estimator is what a factory .* got 'exact'"),
        (
            {
                "estimator": ff.estimators.squared_gradient(
                    structure=ff.structures.diagonal()
                )
            },
            "squares mean gradients, .* give the estimator None",
        ),
    ],
)
def test_options_are_checked_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        variational(0.1, **OPTIONS | options)


@together
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VOGN", {"information": -1.0}, "information, where it is a number, .* -1.0"),
        ("VOGN", {"information": np.ones(2)}, r"or a number; got an array of shape"),
        ("Stein", {"information": {"w": 1.0}}, r"or a number; got {'w': 1.0}"),
        (
            "Stein",
            {"information": ff.structures.Full(jnp.eye(24))},
            "information is a Full, which the structure diagonal",
        ),
        ("VOGN", {"prior_precision": 0.0}, "prior_precision must be positive .* 0.0"),
        (
            "Stein",
            {"prior_precision": ff.structures.full().isotropic(PARAMS, 2.0)},
            "without an estimator the precision is diagonal",
        ),
        ("VOGN", {"prior_mean": PARAMS["w"]}, "prior_mean must be like the parameters"),
    ],
)
def test_starts_are_checked_by_init(name, options, message):
    with pytest.raises(ValueError, match=message):
        made(name, **options).init(PARAMS)


def test_parameters_and_updates_that_do_not_fit():
    with pytest.raises(
        ValueError, match="real floating-point arrays; a has dtype int32"
    ):
        made("Stein").init({"a": jnp.zeros(2, jnp.int32)})
    optimizer, several = made("Stein"), made("Stein", num_samples=2)
    state = optimizer.init(PARAMS)
    other = {name: PARAMS[name] for name in ("b", "w")}
    cases_of = (
        ((PARAMS, state, PARAMS), {}, r"drawn = ff.sample\(.*get_posterior"),
        ((PARAMS, state), {"drawn": PARAMS}, "needs the parameters and where"),
        ((other, state, PARAMS), {"drawn": PARAMS}, "taken at the draws.* at out"),
        ((other, state, other), {"drawn": other}, "initialised with another tree"),
        (
            (PARAMS, state, PARAMS),
            {"drawn": other},
            "be like params; at out",
        ),
    )
    for arguments, extra, message in cases_of:
        with pytest.raises(ValueError, match=message):
            optimizer.update(*arguments, **extra)
    with pytest.raises(ValueError, match="a leading axis of num_samples=2; at b"):
        several.update(PARAMS, several.init(PARAMS), PARAMS, drawn=PARAMS)
    with pytest.raises(ValueError, match="exact needs the batch"):
        made("VOGN").update(PARAMS, made("VOGN").init(PARAMS), PARAMS, drawn=PARAMS)


def test_the_posterior_is_found_and_is_a_state():
    optimizer = optax.chain(made("VOGN"), optax.scale(1.0))
    state = optimizer.init(PARAMS)
    posterior = get_posterior(state, PARAMS)
    error = ff.standard_error(posterior)["w"]
    np.testing.assert_allclose(error, np.full((2, 4), 31.0**-0.5), rtol=1e-6)
    x = cases.NETWORK_BATCH[0]
    prediction = ff.predict(posterior, *cases.MODEL, x)
    np.testing.assert_allclose(prediction.mean.sum(1), np.ones(len(x)), rtol=1e-5)
    with pytest.raises(ValueError, match=r"no state of ff.transforms.variational"):
        get_posterior(optax.adam(0.1).init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"2 states of ff.transforms.variational"):
        get_posterior((state, state), PARAMS)
    with pytest.raises(ValueError, match=r"no state of ff.scale_by_fisher"):
        get_information(state, 10)


@pytest.mark.parametrize("b1", [0.0, 0.5])
def test_gradients_are_averaged_as_adams(b1):
    """Two steps by hand: an average of fewer gradients than it forgets is not short."""
    params, rows = jnp.asarray([0.5, -1.0]), jnp.asarray([[0.2, 0.4], [1.0, -0.6]])
    optimizer = variational(0.1, **OPTIONS, prior_precision=2.0, b1=b1)
    state = optimizer.init(params)
    for step, gradient in enumerate(rows):
        updates, state = optimizer.update(gradient, state, params, drawn=params)
        weights = (1 - b1) * b1 ** np.arange(step, -1.0, -1)
        mean = weights @ rows[: step + 1] / weights.sum()
        information = get_posterior(state, params).information.entries
        expected = -0.1 * (12 * mean + 2 * params) / information
        np.testing.assert_allclose(updates, expected, rtol=1e-5)
