"""Posteriors, and pairs (mean, information), merge into one; in every structure."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from fisherflow_jax.flow._quadratics import minimum

pytestmark = [
    pytest.mark.usefixtures("strict_promotion"),
    # models here are drawn at random: one test is about that
    pytest.mark.filterwarnings("ignore:the models have:fisherflow_jax.DataWarning"),
]

PARAMS = {
    "b1": np.zeros(2),
    "b2": np.zeros(2),
    "w1": np.zeros((3, 2)),
    "w2": np.zeros((2, 2)),
}
SIZE, PRIOR = 14, 0.5


def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


LAYERS = ff.layers.find_layers(apply_fn, PARAMS, np.zeros((1, 3)))
STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "block": ff.structures.block(lambda name: name[1]),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(2),
    "kronecker": ff.structures.kronecker(LAYERS),
    "corrected": None,  # in eigenbases of each client's own
}
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def vector(seed, scale=1.0):
    flat = np.random.default_rng(seed).normal(size=SIZE) * scale
    return jax.tree.map(jnp.asarray, ravel_pytree(PARAMS)[1](flat))


def data_of(structure, seed):
    """A client's own information, of a random number of rows."""
    rng = np.random.default_rng(50 + seed)
    if structure in ("kronecker", "corrected"):
        nothing = STRUCTURES["kronecker"].isotropic(PARAMS, 0.0)

        def gram(x):
            root = rng.normal(size=x.shape) * rng.uniform(0.3, 3, x.shape[-1])
            return jnp.asarray(root @ np.swapaxes(root, -1, -2))

        factors = [jax.tree.map(gram, part) for part in nothing[:2]]
        found = nothing._replace(
            input_factors=factors[0],
            output_factors=factors[1],
            num_observations=jnp.asarray(rng.uniform(2.0, 9.0)),
        )
        if structure == "kronecker":
            return found
        kept = ff.structures.kronecker(LAYERS, eigenvalue_correction=found)
        nothing = kept.isotropic(PARAMS, 0.0)
        values = {
            name: jnp.asarray(rng.uniform(0.1, 9.0, x.shape))
            for name, x in nothing.eigenvalues.items()
        }
        return nothing._replace(eigenvalues=values)
    rows = rng.normal(size=(20, SIZE)) * rng.uniform(0.2, 3, SIZE)
    stack = [ravel_pytree(PARAMS)[1](row) for row in rows]
    return STRUCTURES[structure].reduce(
        jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *stack)
    )


def posterior(structure, seed, mean=None, prior=PRIOR):
    mean = vector(seed) if mean is None else mean
    return ff.posterior(mean, data_of(structure, seed), prior_precision=prior)


@jax.jit
def _dense(information):
    return ff.information.to_dense(information, jax.tree.map(jnp.asarray, PARAMS))


def dense(information):
    return np.asarray(_dense(information))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


# ---- what is merged


@pytest.mark.slow_cases
@every_structure
def test_models_that_agree_are_returned_as_they_are(structure):
    mean = vector(0)
    states = [posterior(structure, seed, mean) for seed in range(3)]
    merged = ff.merge(states)
    assert np.array_equal(flat(merged.mean), flat(mean))
    assert merged.residual == 0
    assert merged.num_left_out == 0


@pytest.mark.slow_cases
@every_structure
def test_the_sum_of_the_operators_is_solved(structure):
    states = [posterior(structure, seed) for seed in range(3)]
    data = [dense(data_of(structure, seed)) for seed in range(3)]
    means, prior = [flat(state.mean) for state in states], PRIOR * np.eye(SIZE)
    total = sum(data) + prior

    def check(merged, origin, numerators):
        pulled = sum(x @ (m - origin) for x, m in zip(numerators, means, strict=True))
        expected = origin + np.linalg.solve(total, pulled)
        iterated = structure in ("kronecker", "corrected")
        error = np.abs(flat(merged.mean) - expected).max()
        assert error < (2e-5 if iterated else 1e-10)
        assert (0 < merged.residual <= 1e-6) if iterated else merged.residual == 0
        # what it keeps, and goes on with
        assert type(merged.information) is type(states[0].information)
        np.testing.assert_allclose(
            np.trace(dense(merged.information)), np.trace(total), rtol=0.7
        )

    # the prior holds them at their plain mean
    check(ff.merge(states), np.mean(means, 0), [x + prior for x in data])
    # where the prior has its mean: each posterior holds it once
    start = vector(9)
    check(ff.merge(states, start), flat(start), [x + prior for x in data])
    # estimates of the data alone
    if structure in ("diagonal", "kronecker"):
        pairs = [(state.mean, data_of(structure, k)) for k, state in enumerate(states)]
        merged = ff.merge(pairs, start, prior_precision=PRIOR)
        check(merged, flat(start), data)


def test_linear_gaussian_models_are_the_joint_fit():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(3, 12, 4)), rng.normal(size=(3, 12))
    origin = rng.normal(size=4)
    grams = np.einsum("kni,knj->kij", x, x)
    pulls = np.einsum("kni,kn->ki", x, y)

    def fit(gram, pull, prior):
        total = gram + prior * np.eye(4)
        return np.linalg.solve(total, pull + prior * origin)

    for prior, start in ((0.7, jnp.asarray(origin)), (1e-13, None)):
        states = [
            ff.posterior(
                jnp.asarray(fit(gram, pull, prior)),
                ff.structures.Full(jnp.asarray(gram)),
                prior_precision=prior,
            )
            for gram, pull in zip(grams, pulls, strict=True)
        ]
        joint = fit(grams.sum(0), pulls.sum(0), prior)
        merged = ff.merge(states, start)
        np.testing.assert_allclose(merged.mean, joint, rtol=1e-9)
        total = grams.sum(0) + prior * np.eye(4)
        np.testing.assert_allclose(merged.information.rows, total, rtol=1e-12)
        # by twos, and with a client that has no rows
        if start is not None:
            before = ff.posterior(start, ff.structures.full(), prior_precision=prior)
            pair = ff.merge(states[:2], start)
            both = ff.merge([pair, before, states[2]], before)
            np.testing.assert_allclose(both.mean, joint, rtol=1e-9)
    # columns that do not meet: a diagonal is all there is
    design = np.eye(4)[rng.integers(0, 4, (2, 30))]
    targets = rng.normal(size=(2, 30))
    counts = design.sum(1)
    estimates = np.einsum("kni,kn->ki", design, targets) / counts
    pairs = [
        (jnp.asarray(mean), ff.structures.Diagonal(jnp.asarray(count)))
        for mean, count in zip(estimates, counts, strict=True)
    ]
    merged = ff.merge(pairs, prior_precision=1e-13)
    joint = np.einsum("kni,kn->i", design, targets) / counts.sum(0)
    np.testing.assert_allclose(merged.mean, joint, rtol=1e-9)


def test_identity_output_factors_are_regmean():
    def regmean(information):
        outputs = {
            name: jnp.broadcast_to(jnp.eye(x.shape[-1]), x.shape)
            for name, x in information.output_factors.items()
        }
        one = jnp.ones_like(information.num_observations)
        return information._replace(output_factors=outputs, num_observations=one)

    measured = [data_of("kronecker", seed) for seed in range(3)]
    pairs = [(vector(k), regmean(one)) for k, one in enumerate(measured)]
    merged = ff.merge(pairs, prior_precision=1e-12)
    for kernel, bias in (("w1", "b1"), ("w2", "b2")):
        # stacked under the name of the first layer of a shape
        grams = [np.asarray(one.input_factors[kernel][0]) for one in measured]
        weights = [np.vstack([mean[kernel], mean[bias]]) for mean, _ in pairs]
        total = sum(a @ w for a, w in zip(grams, weights, strict=True))
        expected = np.linalg.solve(sum(grams), total)
        found = np.vstack([merged.mean[kernel], merged.mean[bias]])
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["scalar", "kronecker", "low_rank"])
def test_one_model_is_itself(structure):
    state = posterior(structure, 1)
    for merged in (ff.merge([state]), ff.merge([state], vector(3))):
        np.testing.assert_allclose(flat(merged.mean), flat(state.mean), rtol=1e-8)
        expected = dense(state.information)
        np.testing.assert_allclose(
            dense(merged.information), expected, rtol=1e-9, atol=1e-12
        )


def test_consolidated_posteriors_count_what_they_share_once():
    before = posterior("full", 0)
    tasks = [data_of("full", seed) for seed in (1, 2)]
    states = [
        ff.continual.consolidate(before, vector(k + 1), task)
        for k, task in enumerate(tasks)
    ]
    merged = ff.merge(states, before)
    total = dense(before.information) + sum(map(dense, tasks))
    np.testing.assert_allclose(dense(merged.information), total, rtol=1e-12)
    assert type(merged.prior_precision) is type(before.prior_precision)
    # and a merged one is a state
    assert np.isfinite(flat(ff.standard_error(merged))).all()


def test_cold_posteriors_of_one_temperature_merge():
    means, data = [vector(0), vector(1)], [data_of("full", 0), data_of("full", 1)]

    def of(temperatures):
        return [
            ff.posterior(m, f, prior_precision=PRIOR, temperature=t)
            for m, f, t in zip(means, data, temperatures, strict=True)
        ]

    warm, cold = ff.merge(of([1, 1])), ff.merge(of([0.25, 0.25]))
    np.testing.assert_allclose(flat(cold.mean), flat(warm.mean), rtol=1e-9)
    assert cold.temperature == 0.25
    np.testing.assert_allclose(
        dense(cold.information), 4 * dense(warm.information), rtol=1e-9
    )
    with pytest.raises(ValueError, match="another temperature than the first"):
        ff.merge(of([1, 0.5]))


# ---- what is left out


@pytest.mark.slow_cases
@pytest.mark.parametrize("structure", ["diagonal", "kronecker"])
def test_a_model_that_is_not_finite_is_left_out(structure):
    states = [posterior(structure, seed) for seed in range(3)]
    lost = states[0]._replace(mean=jax.tree.map(lambda x: x * np.nan, vector(0)))
    expected = ff.merge(states[1:])
    with pytest.warns(ff.DataWarning, match="left out, .*: model 0"):
        merged = ff.merge([lost, *states[1:]])
    traced = jax.jit(ff.merge)([lost, *states[1:]])
    worse = jax.tree.map(lambda x: x * np.nan, states[0].information)
    both = jax.jit(ff.merge)([states[0]._replace(information=worse), *states[1:]])
    for found in (merged, traced, both):
        assert found.num_left_out == 1
        np.testing.assert_allclose(flat(found.mean), flat(expected.mean), rtol=1e-6)
        np.testing.assert_allclose(
            dense(found.information), dense(expected.information), rtol=1e-9
        )
    with pytest.raises(ValueError, match="no model is finite"):
        ff.merge([lost, lost])


# ---- models of different initialisations


def of_shapes(seed, spread=0.0, origin=None):
    """A network's parameters, drawn anew or near others."""
    rng = np.random.default_rng(seed)
    draw = {
        "w1": rng.normal(size=(20, 16)) / np.sqrt(20),
        "w2": rng.normal(size=(16, 5)) / 4,
        "b1": rng.normal(size=16),
    }
    if origin is None:
        return jax.tree.map(jnp.asarray, draw)
    return jax.tree.map(lambda x, y: x + spread * y, origin, draw)


def merged_warnings(means):
    information = ff.structures.Diagonal(jax.tree.map(jnp.ones_like, means[0]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ff.merge([(mean, information) for mean in means], prior_precision=1.0)
    return [str(one.message) for one in said]


@pytest.mark.slow
def test_models_that_were_initialised_apart_are_warned_of():
    origin = of_shapes(0)
    assert merged_warnings([of_shapes(k, 0.5, origin) for k in (1, 2, 3)]) == []
    (said,) = merged_warnings([of_shapes(1), of_shapes(2)])
    assert "different initialisations" in said
    assert "have 0.0" in said or "have -0.0" in said
    # the same function, its hidden units in another order
    order = np.random.default_rng(4).permutation(16)
    moved = {
        "w1": origin["w1"][:, order],
        "w2": origin["w2"][order],
        "b1": origin["b1"][order],
    }
    assert len(merged_warnings([origin, moved])) == 1
    # no hidden units, nothing to permute: any coefficients may be averaged
    coefficients = [{"w": of_shapes(k)["w1"], "b": of_shapes(k)["b1"]} for k in (1, 2)]
    assert merged_warnings(coefficients) == []


# ---- derivatives, and iterations


@pytest.mark.slow
def test_merging_has_a_derivative():
    states = [posterior("kronecker", seed) for seed in range(3)]

    def moved(factor):
        mean = jax.tree.map(lambda x: factor * x, states[0].mean)
        return ff.merge([states[0]._replace(mean=mean), *states[1:]]).mean["b1"][0]

    slope = jax.grad(moved)(1.0)  # linear in the means
    np.testing.assert_allclose(slope, moved(2.0) - moved(1.0), rtol=1e-4)


@pytest.mark.slow
def test_iterations_are_capped_and_their_residual_is_told():
    states = [posterior("kronecker", seed) for seed in range(3)]
    common = ff.information.add(
        ff.information.scale(states[0].information, 0.0), states[0].prior_precision
    )
    parts = [state.information for state in states]
    moves = [state.mean for state in states]
    residuals = [
        float(minimum(common, parts, moves, most=most).residual) for most in (1, 100)
    ]
    assert residuals[0] > 1e-2
    assert residuals[1] < 1e-6


def test_an_unfinished_solve_is_warned_of(monkeypatch):
    states = [posterior("kronecker", seed) for seed in range(3)]
    monkeypatch.setitem(ff.merge.__globals__, "UNFINISHED", 0.0)
    with pytest.warns(ff.DataWarning, match="has a residual of"):
        ff.merge(states)


# ---- what does not belong together


def diagonal(mean, **options):
    entries = jax.tree.map(lambda x: jnp.ones_like(x), mean)
    options = {"prior_precision": 1.0} | options
    return ff.posterior(mean, ff.structures.Diagonal(entries), **options)


ONE = diagonal(jnp.ones(2))
PAIR = ONE.mean, ONE.information
REFUSED = [
    ([ONE, diagonal(jnp.ones(3))], {}, "model 1 has another mean than the first"),
    (
        [ONE, diagonal({"a": jnp.ones(2)})],
        {},
        "model 1 has another mean than the first",
    ),
    ([ONE, diagonal(jnp.ones(2), prior_precision=2.0)], {}, "another prior_precision"),
    (
        [ONE, ff.posterior(jnp.ones(2), ff.structures.full(), prior_precision=1.0)],
        {},
        "another information than the first, Full, not Diagonal",
    ),
    ([ONE._replace(prior_precision=None)], {}, "model 0 does not say its prior"),
    ([ONE], {"prior_precision": 1.0}, "for pairs"),
    ([PAIR], {"prior_precision": -1.0}, "must be positive"),
    ([(jnp.ones(3), PAIR[1])], {"prior_precision": 1.0}, "other parameters than its"),
    ([ONE], {"start": jnp.ones(3)}, "start must be like the means"),
    ([], {}, "at least one"),
]


@pytest.mark.parametrize(
    ("states", "options", "match"), REFUSED, ids=[x[2][:30] for x in REFUSED]
)
def test_what_does_not_belong_together_refuses(states, options, match):
    with pytest.raises(ValueError, match=match):
        ff.merge(states, **options)


def test_what_is_no_belief_refuses():
    flow = ff.fisher_flow(lambda p, x: x @ p, ff.likelihoods.gaussian())
    start = flow.init(jnp.zeros(2))
    for states, options, match in (
        ([start], {}, "none was given"),
        ([ONE, start], {"start": start}, "got posterior"),
        ([start], {"start": jnp.zeros(2)}, "set out from"),
        ([ONE, "one"], {}, "got 'one'"),
        ([(start, None)], {}, "merge takes a list: flows' states"),
        ([PAIR], {}, "and prior_precision"),
        (ONE, {}, "in a list, ff.merge"),
    ):
        with pytest.raises(TypeError, match=match):
            ff.merge(states, **options)
    with pytest.raises(ValueError, match="for pairs"):
        ff.merge([start], start, prior_precision=1.0)
