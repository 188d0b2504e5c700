"""Pruning: what is predicted is what is solved for, and zeros stay zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
from small_network import PRIOR, drawn, flat

compression = ff.compression
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def dense(state):
    return np.asarray(ff.information.to_dense(state.information, state.mean))


STRUCTURES = ["scalar", "diagonal", "block", "full", "low_rank", "kronecker"]


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", STRUCTURES)
def test_pruning_is_constrained_least_squares(states, kept, name):
    state = states[name]
    matrix, theta, held = dense(state), flat(state.mean), ~flat(kept)
    found = compression.prune(state, kept)
    # stationarity with a multiplier for each zero, as one linear system
    rows = np.eye(len(theta))[held]
    system = np.block([[matrix, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    right = np.concatenate([matrix @ theta, np.zeros(len(rows))])
    expected = np.linalg.solve(system, right)[: len(theta)]
    np.testing.assert_allclose(flat(found.params), expected, **CLOSE)
    assert np.all(flat(found.params)[held] == 0)
    step = expected - theta
    np.testing.assert_allclose(found.predicted_rise, step @ matrix @ step / 2, **CLOSE)
    if name in ("scalar", "diagonal"):
        np.testing.assert_array_equal(flat(found.params)[~held], theta[~held])
    assert float(found.residual) < 1e-9
    alone = compression.prune(state, kept, compensate=False)
    np.testing.assert_array_equal(flat(alone.params), np.where(held, 0, theta))
    assert float(found.predicted_rise) <= float(alone.predicted_rise) * (1 + 1e-12)


def test_a_solve_that_does_not_end_is_warned_of(monkeypatch):
    from fisherflow_jax.information import _columns as columns

    root = drawn(23, 23, seed=5)
    state = ff.posterior(
        np.ones(23), ff.structures.Full(root @ root.T), prior_precision=PRIOR
    )
    mask = np.arange(23) % 2 == 0
    monkeypatch.setattr(columns, "_MOST", 1)
    with pytest.warns(ff.DataWarning, match="residual of"):
        found = compression.prune(state, jnp.asarray(mask))
    matrix = dense(state)
    alone = np.where(mask, 1.0, 0.0)
    left = (matrix @ (np.asarray(found.params) - 1))[mask]
    before = (matrix @ (alone - 1))[mask]
    expected = np.linalg.norm(left) / np.linalg.norm(before)
    np.testing.assert_allclose(found.residual, expected, rtol=1e-9)


@pytest.mark.slow
def test_of_one_linear_layer_kronecker_is_full(kept):
    x, params = drawn(40, 6), {"w": drawn(6, 4, seed=2), "b": drawn(4, seed=3)}

    def model(params, x):
        return x @ params["w"] + params["b"]

    found = {}
    layers = ff.layers.find_layers(model, params, x)
    for structure in (ff.structures.full(), ff.structures.kronecker(layers)):
        estimator = ff.estimators.exact(model, ff.likelihoods.gaussian(), structure)
        information = estimator(params, (x, None))
        state = ff.posterior(params, information, prior_precision=PRIOR)
        mask = {name: kept[name] for name in params}
        found[structure.name] = compression.prune(state, mask)
        if structure.name == "full()":
            # of a quadratic loss the prediction is what is measured, at its minimum
            zero = ff.posterior(params, information, prior_precision=1e-9)
            rise = compression.prune(zero, mask)
            step = model(rise.params, x) - model(params, x)
            measured = np.sum(np.square(step)) / 2
            np.testing.assert_allclose(rise.predicted_rise, measured, rtol=1e-6)
    full, kronecker = found.values()
    np.testing.assert_allclose(flat(full.params), flat(kronecker.params), **CLOSE)
    np.testing.assert_allclose(full.predicted_rise, kronecker.predicted_rise, **CLOSE)


def test_saliency(states, kept):
    state = states["full"]
    matrix, theta = dense(state), flat(state.mean)
    marginal = flat(compression.saliency(state))
    variance = np.diag(np.linalg.inv(matrix))
    np.testing.assert_allclose(marginal, theta**2 / variance / 2, **CLOSE)
    # it is what pruning that entry alone costs
    alone = {name: np.ones(x.shape, bool) for name, x in state.mean.items()}
    alone["v"][1, 2] = False
    rise = compression.prune(state, alone).predicted_rise
    np.testing.assert_allclose(compression.saliency(state)["v"][1, 2], rise, **CLOSE)
    conditional = flat(compression.saliency(state, rule="conditional"))
    np.testing.assert_allclose(conditional, theta**2 * np.diag(matrix) / 2, **CLOSE)
    inside = flat(compression.saliency(state, mask=kept))
    np.testing.assert_array_equal(inside, np.where(flat(kept), marginal, 0))


def test_rises_are_of_the_objective_whatever_the_temperature(states, kept):
    state = states["full"]
    cold = state._replace(
        information=ff.information.scale(state.information, 4.0),
        temperature=jnp.asarray(0.25),
    )
    rises = [compression.prune(x, kept).predicted_rise for x in (state, cold)]
    np.testing.assert_allclose(*rises, rtol=1e-12)


def test_pruning_under_jit_and_in_float32(states, kept):
    found = jax.jit(lambda state, kept: compression.prune(state, kept))(
        states["kronecker"], kept
    )
    eager = compression.prune(states["kronecker"], kept)
    np.testing.assert_allclose(flat(found.params), flat(eager.params), rtol=1e-12)
    with jax.enable_x64(False):
        single = jax.tree.map(lambda x: np.asarray(x, np.float32), states["kronecker"])
        found = compression.prune(single, kept)
        assert {x.dtype for x in found.params.values()} == {np.dtype("float32")}
        np.testing.assert_allclose(flat(found.params), flat(eager.params), rtol=2e-3)


# ---- masks


def magnitudes(params):
    return jax.tree.map(jnp.abs, params)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.83])
def test_a_share_of_the_kernels_is_removed(params, sparsity):
    found = compression.mask(magnitudes(params), sparsity)
    kernels = np.concatenate([np.ravel(found["v"]), np.ravel(found["w"])])
    assert np.sum(~kernels) == round(36 * sparsity)
    assert np.all(found["b"]) and np.all(found["c"])
    sizes = np.abs(np.concatenate([np.ravel(params["v"]), np.ravel(params["w"])]))
    if sparsity > 0:
        assert sizes[~kernels].max() < sizes[kernels].min()
    traced = jax.jit(compression.mask)(magnitudes(params), sparsity)
    np.testing.assert_array_equal(flat(traced), flat(found))


def test_n_of_m_along_the_inputs(params, layers):
    sizes = magnitudes(params)
    for found in (
        compression.mask(sizes, "1:2"),
        compression.mask(sizes, "1:2", layers=layers),
    ):
        for name in "vw":
            pairs = np.asarray(sizes[name]).reshape(-1, 2, sizes[name].shape[1])
            expected = pairs == pairs.max(1, keepdims=True)
            np.testing.assert_array_equal(
                found[name], expected.reshape(sizes[name].shape)
            )
    # a last, shorter row stays
    four = compression.mask(sizes, "2:4")["w"]
    assert np.all(four[4:]) and np.all(np.sum(four[:4], 0) == 2)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (0, 2), (2, 0)])
def test_less_than_a_row_of_a_pattern_stays(shape):
    sizes = {"w": jnp.ones(shape)}
    found = compression.mask(sizes, "2:4", chosen=["w"])["w"]
    assert found.shape == shape and np.all(found)


def test_n_of_m_of_a_kernel_whose_inputs_come_last():
    params = {"w": drawn(3, 8)}
    layers = ff.layers.find_layers(lambda p, x: x @ p["w"].T, params, jnp.zeros((1, 8)))
    found = compression.mask(magnitudes(params), "2:4", layers=layers)["w"]
    assert np.all(np.sum(np.reshape(found, (3, 2, 4)), 2) == 2)


def test_groups_go_together(params):
    units = np.arange(4)
    groups = {"w": units[None], "b": units, "v": units[:, None]}
    found = compression.mask(magnitudes(params), 0.5, groups=groups)
    total = (
        np.abs(params["w"]).sum(0) + np.abs(params["b"]) + np.abs(params["v"]).sum(1)
    )
    gone = set(np.argsort(total)[:2].tolist())
    for unit in range(4):
        flags = np.concatenate(
            [found["w"][:, unit], found["v"][unit], [found["b"][unit]]]
        )
        assert set(map(bool, flags)) == {unit not in gone}
    assert np.all(found["c"])
    # of groups that have lost an entry the rest counts, and empty ones come first
    earlier = {k: np.ones(x.shape, bool) for k, x in params.items()}
    earlier["w"][0, int(np.argmax(total))] = False
    again = compression.mask(magnitudes(params), 0.5, groups=groups, mask=earlier)
    np.testing.assert_array_equal(again["v"], found["v"])
    for name, axis in (("w", 0), ("v", 1)):
        np.moveaxis(earlier[name], 1 - axis, 0)[int(np.argmax(total))] = False
    earlier["b"][int(np.argmax(total))] = False
    again = compression.mask(magnitudes(params), 0.25, groups=groups, mask=earlier)
    np.testing.assert_array_equal(flat(again), flat(earlier))


def test_an_earlier_mask_is_kept(params, kept):
    sizes = magnitudes(params)
    units = {"w": np.arange(4)[None]}
    for options in ((0.3, {}), (0.6, {}), ("1:2", {}), (0.5, {"groups": units})):
        sparsity, more = options
        found = compression.mask(sizes, sparsity, mask=kept, **more)
        assert not np.any(flat(found) & ~flat(kept))
    # what was removed counts
    found = compression.mask(sizes, 0.6, mask=kept)
    assert sum(np.sum(~np.asarray(found[n])) for n in "vw") == round(0.6 * 36)


def test_zeros_survive_a_hundred_steps(params, kept):
    optimizer = optax.chain(
        optax.adamw(0.05, weight_decay=0.1), compression.keep_zeros(kept)
    )
    zeroed = jax.tree.map(jnp.multiply, params, kept)

    @jax.jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            noise = jax.random.normal(key, (3,))
            gradient = jax.tree.map(lambda x: jnp.sin(x) + noise[0], params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 100)
        return jax.lax.scan(step, (params, state), keys)[0]

    moved, state = run(zeroed, optimizer.init(zeroed))
    assert np.all(flat(moved)[~flat(kept)] == 0)
    assert np.all(flat(moved)[flat(kept)] != flat(params)[flat(kept)])
    # of a later mask in the state, and parameters that are not zero yet
    more = compression.mask(magnitudes(moved), 0.7, mask=kept)
    state = optax.tree.set(state, kept=more)
    moved, _ = run(moved, state)
    assert np.all(flat(moved)[~flat(more)] == 0)


def test_bad_input(states, params, kept):
    state, sizes = states["full"], magnitudes(params)
    other = {"w": kept["w"]}
    for call in (
        lambda: compression.prune(state, other),
        lambda: compression.mask(sizes, 0.5, mask=other),
        lambda: compression.saliency(state, mask=other),
        lambda: compression.keep_zeros(other).init(params),
    ):
        with pytest.raises(ValueError, match="mask must be like the parameters"):
            call()
    with pytest.raises(ValueError, match=r"booleans, .* parameter b has dtype float64"):
        compression.prune(state, params)
    for sparsity in (-0.1, 1.0, 2):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
            compression.mask(sizes, sparsity)
    for pattern in ("4:2", "0:4", "half", "2:4:8"):
        with pytest.raises(ValueError, match="how many of how many"):
            compression.mask(sizes, pattern)
    with pytest.raises(ValueError, match="no parameter has the name 'u'"):
        compression.mask(sizes, 0.5, chosen=["u"])
    with pytest.raises(ValueError, match="there is no kernel"):
        compression.mask({"b": sizes["b"]}, 0.5)
    with pytest.raises(ValueError, match="groups of w are whole numbers"):
        compression.mask(sizes, 0.5, groups={"w": np.arange(5)})
    with pytest.raises(ValueError, match="groups name u; the parameters"):
        compression.mask(sizes, 0.5, groups={"u": np.arange(5)})
    with pytest.raises(ValueError, match="groups say themselves"):
        compression.mask(sizes, "2:4", groups={"w": np.arange(4)})
    with pytest.raises(ValueError, match="the saliency of parameter w is not finite"):
        compression.mask(sizes | {"w": sizes["w"] * np.nan}, 0.5)
    with pytest.raises(ValueError, match="rule is one of"):
        compression.saliency(state, rule="magnitude")
    with pytest.raises(ValueError, match="another tree than the mean"):
        compression.prune(state._replace(mean={"w": params["w"]}), other)
    with pytest.raises(TypeError, match=r"a state has \.mean"):
        compression.prune(params, kept)
    with pytest.raises(ValueError, match="keep_zeros needs params"):
        compression.keep_zeros(kept).update(params, None)
    flat_one = ff.structures.Full(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="not positive definite"):
        compression.prune(
            ff.posterior(jnp.ones(2), flat_one, prior_precision=1e-20),
            jnp.array([True, False]),
        )


def test_printing_lists_what_is_pruned(states, kept):
    text = str(compression.prune(states["full"], kept))
    assert f"{np.sum(kept['w'])}" in text and "predicted rise" in text
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["b", "c", "v", "w"]
