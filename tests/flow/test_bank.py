"""A bank's weights are those of dynamic model averaging, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fisherflow_jax as ff

DECAYS = (0.5, 0.8, 0.99)


def member(decay=None, prior_precision=0.3):
    memory = ff.memories.stationary() if decay is None else None
    return ff.fisher_flow(
        lambda params, x: x * params,
        ff.likelihoods.gaussian(),
        structure=ff.structures.diagonal(),
        memory=memory or ff.memories.exponential(decay),
        prior_precision=prior_precision,
        num_steps=1,
    )


MEMBERS = [member(decay) for decay in DECAYS]
PRIORS = [member(prior_precision=precision) for precision in (0.01, 1.0)]


def drifting(seed=0, number=60, size=5):
    """A level that wanders, seen through noise."""
    rng = np.random.default_rng(seed)
    levels = np.cumsum(0.6 * rng.normal(size=number))
    targets = levels[:, None] + rng.normal(size=(number, size))
    return levels, (np.ones((number, size)), targets)


@pytest.mark.slow
def test_the_weights_follow_the_recursion():
    bank = ff.bank(MEMBERS, forgetting=0.9)
    state = bank.init(np.float64(0))
    weights = np.full(3, 1 / 3)
    members = [flow.init(np.float64(0)) for flow in MEMBERS]
    _, (inputs, targets) = drifting()
    for batch in zip(inputs[:8], targets[:8], strict=True):
        gains = []
        for index, flow in enumerate(MEMBERS):
            members[index], info = flow.update(members[index], batch)
            gains.append(float(info.log_evidence))
        state, info = bank.update(state, batch)
        faded = weights**0.9 / np.sum(weights**0.9)
        joint = faded * np.exp(gains)
        np.testing.assert_allclose(info.log_evidence, np.log(joint.sum()), rtol=1e-10)
        weights = joint / joint.sum()
        np.testing.assert_allclose(state.weights, weights, rtol=1e-10)
        means = np.array([m.mean for m in members])
        np.testing.assert_allclose(state.mean, weights @ means, rtol=1e-10)
        variances = np.array([1 / m.information.entries for m in members])
        spread = weights @ (variances + (means - weights @ means) ** 2)
        np.testing.assert_allclose(ff.standard_error(state), np.sqrt(spread))


def test_without_forgetting_the_weights_are_posterior_probabilities():
    bank = ff.bank(PRIORS, forgetting=1.0)
    _, (inputs, targets) = drifting(number=6)
    state, _ = jax.lax.scan(bank.update, bank.init(np.float64(0)), (inputs, targets))
    densities = [
        stats.multivariate_normal.logpdf(
            targets.ravel(), cov=np.eye(30) + np.ones((30, 30)) / precision
        )
        for precision in (0.01, 1.0)
    ]
    odds = np.exp(densities[1] - densities[0])
    np.testing.assert_allclose(state.weights[1], odds / (1 + odds), rtol=1e-9)


def test_a_bad_batch_moves_nobody():
    bank = ff.bank(PRIORS)
    update = jax.jit(bank.update)
    good = np.ones(5), np.arange(5.0)
    state, _ = update(bank.init(np.float64(0)), good)
    # the square of each value is beyond float64
    after, info = update(state, (np.full(5, 1e200), good[1]))
    assert info.skipped and info.log_evidence == 0
    assert all(m.num_skipped == 1 for m in after.members)
    same = [m._replace(num_skipped=0 * m.step) for m in after.members]
    jax.tree.map(
        np.testing.assert_array_equal, after._replace(members=tuple(same)), state
    )


def test_a_batch_that_one_member_cannot_take_moves_nobody():
    """The second member's model overflows where the first one's is fine."""

    def build(power):
        return ff.fisher_flow(
            lambda params, x: x**power * params,
            ff.likelihoods.gaussian(),
            structure=ff.structures.diagonal(),
            memory=ff.memories.stationary(),
            num_steps=1,
        )

    bank = ff.bank([build(1), build(5)])
    state = bank.init(np.float64(0))
    after, info = jax.jit(bank.update)(state, (np.full(2, 1e40), np.ones(2)))
    assert info.skipped
    assert [bool(i.skipped) for i in info.members] == [False, True]
    assert [int(m.step) for m in after.members] == [0, 0]
    assert [int(m.num_skipped) for m in after.members] == [1, 1]


@pytest.mark.slow
def test_it_follows_drift_better_than_its_worst_member():
    bank = ff.bank(MEMBERS)

    drifts = [drifting(seed) for seed in range(3)]
    levels, batches = jax.tree.map(lambda *x: np.stack(x), *drifts)

    def means(flow, batches):
        def step(state, batch):
            state, _ = flow.update(state, batch)
            return state, state.mean

        return jax.lax.scan(step, flow.init(np.float64(0)), batches)[1]

    mixed, *alone = (
        np.mean(
            (jax.vmap(lambda b, f=flow: means(f, b))(batches) - levels)[:, 10:] ** 2
        )
        for flow in (bank, *MEMBERS)
    )
    assert mixed < 0.5 * max(alone)
    assert mixed < 1.2 * min(alone)


@pytest.mark.parametrize("forgetting", [0.0, -1.0, 1.01, float("nan")])
def test_forgetting_lies_between_0_and_1(forgetting):
    with pytest.raises(ValueError, match=r"forgetting must be in \(0, 1\]"):
        ff.bank(MEMBERS, forgetting=forgetting)


def test_a_bank_has_members():
    with pytest.raises(ValueError, match="at least one flow"):
        ff.bank([])


# ---- rules for the weights


def losses(bank, batches):
    """Summed log-evidence of the mixture, and of each member batch by batch."""
    state, info = jax.lax.scan(bank.update, bank.init(np.float64(0)), batches)
    members = np.stack([np.asarray(one.log_evidence) for one in info.members])
    return state, float(np.sum(info.log_evidence)), members


def test_without_forgetting_the_loss_is_within_log_k_of_the_best():
    for seed in range(3):
        batches = drifting(seed)[1]
        _, mixed, members = losses(ff.bank(MEMBERS, forgetting=1.0), batches)
        assert mixed >= members.sum(1).max() - np.log(len(MEMBERS)) - 1e-9


@pytest.mark.slow
def test_fixed_share_is_within_its_bound_of_the_best_sequence():
    """Whatever the data: here a stream that stands, drifts, and stands again."""
    share, count = 0.01, len(MEMBERS)
    still = [drifting(seed, 40)[1][1] * 0 + 1 for seed in (1, 2)]
    rng = np.random.default_rng(5)
    parts = [still[0], drifting(3, 40)[1][1], still[1]]
    targets = np.concatenate(parts) + 0.1 * rng.normal(size=(120, 5))
    batches = np.ones_like(targets), targets
    bank = ff.bank(MEMBERS, switching=share)
    state, mixed, members = losses(bank, batches)
    best = sum(members[:, i : i + 40].sum(1).max() for i in (0, 40, 80))
    switches, times = 2, 120
    bound = (switches + 1) * np.log(count) + switches * np.log(1 / share)
    bound += (times - switches - 1) * np.log(1 / (1 - share))
    assert mixed >= best - bound - 1e-9
    np.testing.assert_allclose(state.weights.sum(), 1)
    # and on a stream that stands, at the price of it
    _, shared, members = losses(bank, tuple(x[:40] for x in batches))
    _, plain, _ = losses(
        ff.bank(MEMBERS, forgetting=1.0), tuple(x[:40] for x in batches)
    )
    assert shared >= plain - 2


def test_weights_by_fixed_share_and_a_score_of_ones_own():
    bank = ff.bank(MEMBERS, switching=0.2, weigh_by=ff.calibration.log_score)
    state = bank.init(np.float64(0))
    weights = np.full(3, 1 / 3)
    _, (inputs, targets) = drifting()
    for batch in zip(inputs[:4], targets[:4], strict=True):
        gains = [
            ff.calibration.log_score(
                flow.advance(one), flow.recipe.apply_fn, flow.recipe.likelihood, batch
            ).sum()
            for flow, one in zip(MEMBERS, state.members, strict=True)
        ]
        joint = (0.8 * weights + 0.2 / 3) * np.exp(np.array(gains))
        state, info = bank.update(state, batch)
        np.testing.assert_allclose(info.log_evidence, np.log(joint.sum()), rtol=1e-10)
        weights = joint / joint.sum()
        np.testing.assert_allclose(state.weights, weights, rtol=1e-10)
    missing = inputs[0], targets[0] * np.nan, np.zeros(5)
    after, info = bank.update(state, missing)
    assert info.missing
    np.testing.assert_allclose(after.weights, 0.8 * weights + 0.2 / 3, rtol=1e-10)


def test_structures_are_weighed_by_what_they_predict():
    full = ff.fisher_flow(lambda p, x: x * p, ff.likelihoods.gaussian(), num_steps=1)
    with pytest.raises(
        ValueError, match=r"differ in structure \(diagonal\(\), full\(\)\)"
    ):
        ff.bank([MEMBERS[0], full])
    bank = ff.bank([MEMBERS[2], full], weigh_by=ff.calibration.log_score)
    state, _ = jax.lax.scan(bank.update, bank.init(np.float64(0)), drifting()[1])
    assert np.all(np.isfinite(state.weights))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forgetting": 0.0}, "forgetting must be"),
        ({"switching": 0.0}, "switching must be"),
        ({"switching": 1.0}, "switching must be"),
        ({"switching": 0.1, "forgetting": 0.9}, "one rule"),
    ],
    ids=str,
)
def test_bad_rules(wrong, message):
    with pytest.raises(ValueError, match=message):
        ff.bank(MEMBERS, **wrong)


@pytest.mark.slow
def test_the_share_may_be_traced():
    """And a bank is of flows that it can advance."""
    batches = drifting()[1]

    def weights(share):
        bank = ff.bank(MEMBERS, switching=share)
        return jax.lax.scan(bank.update, bank.init(np.float64(0)), batches)[0].weights

    found = jax.vmap(weights)(jnp.array([0.01, 0.3]))
    np.testing.assert_allclose(found, [weights(0.01), weights(0.3)], rtol=1e-9)
    sparse = ff.sparse.flow(ff.likelihoods.bernoulli(), 3)
    with pytest.raises(TypeError, match=r"flows\[0\] is a sparse flow"):
        ff.bank([sparse])


@pytest.mark.slow
def test_a_batch_that_some_member_does_not_predict_weighs_none():
    """As of a dispersion of which nothing is known yet."""
    _, (inputs, targets) = drifting()
    flows = [
        ff.fisher_flow(
            lambda p, x: x * p,
            ff.likelihoods.gaussian(None),
            memory=ff.memories.exponential(decay),
            num_steps=1,
        )
        for decay in (0.5, 0.99)
    ]
    bank = ff.bank(flows, forgetting=1.0, weigh_by=ff.calibration.log_score)
    update = jax.jit(bank.update)
    state, _ = update(bank.init(np.float64(0)), (inputs[0], targets[0]))
    np.testing.assert_allclose(state.weights, 0.5)
    state, _ = update(state, (inputs[1], targets[1]))
    assert np.all(np.isfinite(state.weights))
    assert np.abs(state.weights[0] - 0.5) > 1e-6
