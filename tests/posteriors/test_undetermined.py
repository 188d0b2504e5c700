"""What only the prior determines is found, named, and said once a state."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff


def linear(params, x):
    return x @ params


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {item.category for item in caught} <= {ff.DataWarning}
    assert all(item.filename == __file__ for item in caught)
    return [str(item.message) for item in caught]


def named(state) -> list[str]:
    return [direction.name for direction in ff.diagnostics.undetermined(state)]


@functools.partial(jax.jit, static_argnums=0)
def fitted(likelihood, x, y, prior_precision):
    flow = ff.fisher_flow(linear, likelihood, prior_precision=prior_precision)
    return ff.warm_start(flow, flow.init(jnp.zeros(x.shape[1])), (x, y))


def regression(x, prior_precision=1e-6, dtype="float64"):
    """The belief of a regression with unit noise, whatever its targets."""
    information = ff.structures.full().reduce(jnp.asarray(x, dtype))
    mean = jnp.zeros(x.shape[1], dtype)
    return ff.posterior(mean, information, prior_precision=prior_precision)


RNG = np.random.default_rng(3)
NORMAL = RNG.normal(size=(60, 2))


def dummies(groups):
    return np.column_stack([np.ones(240), np.eye(groups)[np.arange(240) % groups]])


# columns, and the directions that change nothing
COLUMNS = {
    "intercept and all groups": (
        dummies(3),
        {"theta[0] - theta[1] - theta[2] - theta[3]": [1, -1, -1, -1]},
    ),
    "cents beside euros": (
        np.column_stack([NORMAL, 100 * NORMAL[:, 1]]),
        {"theta[1] - 0.01 theta[2]": [0, 1, -0.01]},
    ),
    "zeros": (np.column_stack([NORMAL, np.zeros(60)]), {"theta[2]": [0, 0, 1]}),
    "all of these": (
        np.column_stack([dummies(2)[:60], NORMAL, NORMAL.sum(1), np.zeros(60)]),
        {
            "theta[0] - theta[1] - theta[2]": [1, -1, -1, 0, 0, 0, 0],
            "theta[3] + theta[4] - theta[5]": [0, 0, 0, 1, 1, -1, 0],
            "theta[6]": [0, 0, 0, 0, 0, 0, 1],
        },
    ),
}


@pytest.mark.parametrize("prior_precision", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_columns_that_change_nothing(kind, dtype, prior_precision):
    x, expected = COLUMNS[kind]
    found = ff.diagnostics.undetermined(regression(x, prior_precision, dtype))
    assert {direction.name for direction in found} == set(expected)
    for direction in found:
        np.testing.assert_allclose(direction.vector, expected[direction.name], 1e-4)
        np.testing.assert_allclose(x @ direction.vector, 0.0, atol=1e-3)
        alone = np.sum(np.asarray(direction.vector) != 0) == 1
        assert ("no data" if alone else "collinear") in direction.reason
        assert direction.share > 0.5


def test_a_long_direction_is_cut_short():
    state = regression(10 * dummies(12), 1.0)
    (direction,) = ff.diagnostics.undetermined(state)
    assert direction.name.startswith("theta[0] - theta[1] - ")
    assert direction.name.endswith(" + 5 more")
    # no single variance is above a tenth of the prior's
    assert warned(lambda: ff.standard_error(state)) == []
    (message,) = warned(lambda: ff.summary(state))
    assert "theta[0] - theta[1]" in message


def test_a_direction_of_little_data_beside_one_of_none():
    x = np.column_stack([NORMAL, NORMAL[:, 1], np.zeros(60)])
    x[0, 3] = 1.0  # one row, under a prior of one: a half
    found = ff.diagnostics.undetermined(regression(x, 1.0))
    assert [str(direction) for direction in found] == [
        "theta[1] - theta[2] (collinear)",
        "theta[3] (little data: the prior's share is 0.5)",
    ]


def test_what_the_prior_determines_in_part_is_said_with_its_share():
    x = np.column_stack([NORMAL[:, 0], np.zeros(60), np.zeros(60)])
    x[0, :2] = 0.0, 2.0  # four fifths are the data's
    state = regression(x, 1.0)
    for call in (ff.standard_error, ff.summary):
        (message,) = warned(lambda f=call: f(jax.tree.map(jnp.array, state)))
        assert "determined by the prior: theta[2]" in message
        assert "determined partly by the prior: theta[1]" in message
        assert "Its share is 0.2: " in message
    lines = str(ff.summary(state)).splitlines()
    assert lines[-1].startswith("determined partly by the prior: theta[1] (")


def test_classes_are_determined_by_their_differences():
    def model(params, x):
        return x[:, None] * params

    flow = ff.fisher_flow(model, ff.likelihoods.categorical(), prior_precision=1e-3)
    batch = jnp.ones(60), jnp.arange(60) % 3
    state, _ = flow.update(flow.init(jnp.zeros(3)), batch)
    (message,) = warned(lambda: ff.summary(state))
    assert "theta[0] + theta[1] + theta[2] (collinear)" in message
    assert "only differences are determined" in message
    assert "redundant" not in message


def test_a_long_warning_is_cut_short():
    like = {"a_long_name_of_a_weight": jnp.zeros(600)}
    one = ff.structures.Diagonal({"a_long_name_of_a_weight": jnp.eye(600)[0] * 99.0})
    (message,) = warned(
        lambda: ff.standard_error(ff.posterior(like, one, prior_precision=1.0))
    )
    assert "a_long_name_of_a_weight[6] and 593 more" in message and len(message) < 600
    assert "ff.diagnostics.undetermined(state) lists all" in message


# ---- likelihoods that flatten out


SIDE = RNG.uniform(0.5, 2.0, 30)
X = np.column_stack([np.ones(60), np.concatenate([-SIDE, SIDE])])
SEPARATED = (X[:, 1] > 0).astype(float)


@pytest.fixture(scope="module")
def separated():
    return fitted(ff.likelihoods.bernoulli(), X, SEPARATED, 1e-6)


def test_separation_is_said_by_name(separated):
    (message,) = warned(lambda: ff.standard_error(separated))
    assert "determined by the prior: theta[0], theta[1]." in message
    assert "ff.diagnostics.undetermined(state)" in message  # the way out
    assert warned(lambda: ff.confidence_interval(separated)) == []  # once a state
    assert named(separated) == ["theta[1]", "theta[0]"]
    table = ff.summary(separated, ["intercept", "dose"])
    # the data's information is that of a log-odds of 11 at the nearest points
    share = float(ff.standard_error(separated)[1]) ** 2 * 1e-6
    assert 0.05 < share < 0.1
    np.testing.assert_allclose(table.prior_share[1], share)
    lines = str(table).splitlines()
    assert lines[0].split()[-1] == "prior" and lines[3].split()[-1] == f"{share:.2g}"
    assert lines[-1].startswith("determined by the prior: dose (little data")


@pytest.mark.parametrize("prior_precision", [1.0, 1e-2, 1e-4, 1e-8, 1e-10])
def test_separation_under_other_priors(prior_precision):
    state = fitted(ff.likelihoods.bernoulli(), X, SEPARATED, prior_precision)
    (message,) = warned(lambda: ff.standard_error(state))
    assert "theta[1]" in message and "theta[1]" in named(state)[0]


def test_an_empty_cell_of_counts():
    cells = np.eye(3)[np.arange(60) % 3]
    counts = np.where(cells[:, 1] == 1, 0.0, RNG.poisson(3.0, 60))
    state = fitted(ff.likelihoods.poisson(), cells, counts, 1e-6)
    (message,) = warned(lambda: ff.standard_error(state))
    assert "determined by the prior: theta[1]." in message
    assert named(state) == ["theta[1]"]


@pytest.mark.slow
def test_a_class_never_seen():
    # with a reference class: without, a constant added to all is the prior's too
    def model(params, x):
        return jnp.pad(x @ params, ((0, 0), (1, 0)))

    flow = ff.fisher_flow(model, ff.likelihoods.categorical(), prior_precision=1e-6)
    x, y = np.column_stack([np.ones(60), NORMAL[:, 0]]), RNG.integers(0, 2, 60)
    state = flow.init({"w": jnp.zeros((2, 2))}["w"])
    state = ff.warm_start(flow, state, (jnp.asarray(x), jnp.asarray(y)))
    (message,) = warned(lambda: ff.standard_error(state))
    assert "determined by the prior: theta[0,1], theta[1,1]." in message
    assert set(named(state)) == {"theta[0,1]", "theta[1,1]"}


# ---- no false alarms


@pytest.mark.parametrize("prior_precision", [1e-8, 1e-2, 1.0])
@pytest.mark.parametrize("rows", [60, 15])
def test_ordinary_states_are_quiet(rows, prior_precision):
    x, many = NORMAL[:rows], np.tile(NORMAL, (5, 1))  # 60 labels leave a prior of 1 .14
    y = (RNG.logistic(size=300) < many[:, 0]).astype(float)
    both = [
        regression(x, prior_precision),
        fitted(ff.likelihoods.bernoulli(), many, y, prior_precision),
    ]
    for state in both:
        found = warned(lambda s=state: (ff.standard_error(s), ff.summary(s)))
        assert found == [] and named(state) == []
        assert " prior" not in str(ff.summary(state)).splitlines()[0]


def test_states_without_data_are_quiet():
    flow = ff.fisher_flow(linear, ff.likelihoods.gaussian())
    nothing = ff.structures.full().isotropic(jnp.zeros(3), 0.0)
    before = ff.posterior(jnp.zeros(3), nothing, prior_precision=2.0)
    for state in (flow.init(jnp.zeros(3)), before):
        assert warned(lambda s=state: (ff.standard_error(s), ff.summary(s))) == []
        assert named(state) == [] and ff.summary(state).undetermined == ()
    assert ff.summary(flow.init(jnp.zeros(3))).notes == [
        "observations 0: this is the prior"
    ]


def test_nothing_is_said_under_jit(separated):
    state = jax.tree.map(jnp.array, separated)
    assert warned(lambda: jax.jit(ff.standard_error)(state)) == []
    assert warned(lambda: jax.jit(lambda: ff.standard_error(state))()) == []
    assert len(warned(lambda: ff.standard_error(state))) == 1


# ---- structures, memories, mixtures


def test_shares_are_posterior_over_prior_variances():
    rows = np.array([0, 1, 9, 99, 99])
    prior = np.array([1.0, 1.0, 1.0, 1.0, 4.0])
    state = ff.posterior(
        jnp.zeros(5),
        ff.structures.Diagonal(jnp.asarray(rows, float)),
        prior_precision=jnp.asarray(prior),
    )
    table = ff.summary(state)
    np.testing.assert_allclose(table.prior_share, prior / (rows + prior))
    assert table.determined_by_prior.tolist() == [True, True, False, False, False]
    assert [d.name for d in table.undetermined] == ["theta[0]", "theta[1]"]
    assert [d.share for d in table.undetermined] == [1.0, 0.5]
    # a scale of the posterior is one of its prior
    cold = ff.posterior(
        jnp.zeros(5),
        ff.structures.Diagonal(jnp.asarray(rows, float)),
        prior_precision=jnp.asarray(prior),
        temperature=0.1,
    )
    np.testing.assert_allclose(ff.summary(cold).prior_share, table.prior_share)


def test_more_parameters_than_are_searched_for_directions():
    entries = np.full(600, 50.0)
    entries[[3, 500]] = 0.0
    structure = ff.structures.block({"a": "a", "b": "b"})
    like = {"a": jnp.zeros(300), "b": jnp.zeros(300)}
    wide = ff.information.add(
        structure.isotropic(like, 0.0),
        ff.structures.Diagonal(
            {"a": jnp.array(entries[:300]), "b": jnp.array(entries[300:])}
        ),
    )
    assert named(ff.posterior(like, wide, prior_precision=1.0)) == ["a[3]", "b[200]"]


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "memory, determined",
    [
        (ff.memories.windowed(3), True),
        (ff.memories.exponential(0.9), True),
        (ff.memories.exponential(0.9, floor=False), True),
        (ff.memories.random_walk(1e-3), False),  # the drift takes the prior's place
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_memories(memory, determined):
    flow = ff.fisher_flow(linear, ff.likelihoods.gaussian(), memory=memory)
    x = np.column_stack([NORMAL, np.zeros(60)])
    state, _ = flow.update(flow.init(jnp.zeros(3)), (x, x[:, 0]))
    assert named(state) == ["theta[2]"] * determined
    if not determined:  # what the prior would be by now: the stream without weights
        alone, _ = flow.update(flow.init(jnp.zeros(3)), (x, x[:, 0], np.zeros(60)))
        shares = (ff.standard_error(state) / ff.standard_error(alone)) ** 2
        np.testing.assert_allclose(shares[2], 1.0, rtol=1e-12)
        assert np.all(shares[:2] < 0.1)


def test_a_mixture_has_the_mean_share():
    states = [regression(np.eye(2) * 2.0**k, 1.0) for k in (0, 2)]
    expected = np.full(2, (1 / 2 + 1 / 17) / 2)
    np.testing.assert_allclose(ff.summary(states).prior_share, expected)
    with pytest.raises(TypeError, match="mixture"):
        ff.diagnostics.undetermined(states)


def test_only_what_is_tested_is_asked_for():
    state = regression(dummies(3))
    groups = jnp.array([0.0, 1.0, -1.0, 0.0])
    assert warned(lambda: ff.wald_test(state, groups)) == []
    assert warned(lambda: ff.delta_method(state, lambda p: p[0] + p[1:])) == []
    (message,) = warned(lambda: ff.wald_test(state, jnp.eye(4)[0]))
    assert "value 0 of what is asked for" in message
    (message,) = warned(lambda: ff.delta_method(state, lambda p: (p[0] + p[1], p[1])))
    assert "value 1 of" in message


# ---- events


@pytest.mark.slow
def test_refused_batches_are_said_everywhere():
    likelihood = ff.likelihoods.bernoulli()
    flow = ff.fisher_flow(linear, likelihood)
    huge = jnp.full((20, 5, 2), 1e200)  # the model overflows
    batches = huge, jnp.ones((20, 5))
    state, _ = jax.lax.scan(flow.update, flow.init(jnp.zeros(2)), batches)
    calls = {
        "standard_error": lambda s: ff.standard_error(s),
        "confidence_interval": lambda s: ff.confidence_interval(s),
        "wald_test": lambda s: ff.wald_test(s, jnp.ones(2)),
        "delta_method": lambda s: ff.delta_method(s, lambda p: p),
        "summary": lambda s: ff.summary(s),
        "predict": lambda s: ff.predict(s, linear, likelihood, jnp.ones((1, 2))),
    }
    for call in calls.values():
        own = jax.tree.map(jnp.array, state)
        (message,) = warned(lambda f=call, s=own: f(s))
        assert message.startswith("20 batches were refused")
        assert warned(lambda f=call, s=own: f(s)) == []
    table = ff.summary(state)
    assert table.events["batches_refused"] == 20
    assert table.notes == ["observations 0: this is the prior", "batches refused: 20"]


@pytest.mark.slow
def test_events_are_printed():
    flow = ff.fisher_flow(linear, ff.likelihoods.gaussian())
    state, _ = flow.update(flow.init(jnp.zeros(2)), (NORMAL, NORMAL[:, 0]))
    assert len(ff.summary(state).notes) == 1
    assert re.fullmatch(
        r"observations 60, the prior's share 1\.\d%", *ff.summary(state).notes
    )
    one = jnp.ones((), jnp.int32)
    counted = state._replace(
        events=ff.summary
        and state.events._replace(
            rows_skipped=3 * one, solves_regularised=2 * one, searches_unfinished=one
        )
    )
    line = "rows skipped: 3, solves regularised: 2, searches unfinished: 1"
    assert ff.summary(counted).notes[1] == line
    members = ff.BankState((state, counted), jnp.zeros(2))
    assert ff.summary(members).events["rows_skipped"] == 3
    assert ff.summary(members).notes[1] == line
