"""Rounding against minimisation one entry at a time, and allocation against search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.compression._allocate import cheapest
from small_network import PRIOR, flat

compression = ff.compression
ROUNDED = compression.round_to_grid


def one_by_one(matrix, theta, order, is_rounded, kept, scales, level):
    """Each entry to its grid, the rest where the quadratic is then least: in numpy."""
    fixed, values = [], np.array(theta)
    for i in order:
        rest = [j for j in order if j not in fixed]
        inner = matrix[np.ix_(rest, rest)]
        pushed = matrix[np.ix_(rest, fixed)] @ (values[fixed] - theta[fixed])
        values[rest] = theta[rest] - np.linalg.solve(inner, pushed)
        if is_rounded[i]:
            points = np.clip(np.round(values[i] / scales[i]), -level, level)
            values[i] = kept[i] * points * scales[i]
        fixed.append(i)
    return values


@pytest.mark.slow
def test_kronecker_rounds_one_input_at_a_time(states, kept, params):
    state, level = states["kronecker"], 3
    found = ROUNDED(state, 3, mask=kept)
    scales = found.scales
    for kernel, bias in (("w", "b"), ("v", "c")):
        a = np.asarray(state.information.input_factors[kernel][0])
        g = np.diag(state.information.output_factors[kernel][0]) / 50
        block = a + PRIOR / g.mean() * np.eye(len(a))
        order = [*np.argsort(-np.diag(a)[:-1]), len(a) - 1]
        rounds = np.arange(len(a)) < len(a) - 1
        for o in range(len(g)):
            theta = np.append(params[kernel][:, o], params[bias][o])
            flags = np.append(kept[kernel][:, o], True)
            own = np.full(len(a), scales[kernel][0, o])
            expected = one_by_one(block, theta, order, rounds, flags, own, level)
            column = np.append(found.params[kernel][:, o], found.params[bias][o])
            np.testing.assert_allclose(column, expected, rtol=1e-9, atol=1e-9)


def test_full_rounds_one_parameter_at_a_time(states, params):
    state, level = states["full"], 7
    matrix = np.asarray(ff.information.to_dense(state.information))
    found = ROUNDED(state, 4)
    scales = {n: found.scales[n] for n in "wv"}
    theta, own = flat(params), np.ones(len(matrix))
    is_kernel = flat({k: np.full(x.shape, k in "wv") for k, x in params.items()})
    own = flat(
        {k: np.broadcast_to(scales.get(k, 1.0), x.shape) for k, x in params.items()}
    )
    entries = np.where(is_kernel, -np.diag(matrix), np.inf)
    order = [int(i) for i in np.argsort(entries, kind="stable")]
    kept = np.ones(len(matrix), bool)
    expected = one_by_one(matrix, theta, order, is_kernel, kept, own, level)
    np.testing.assert_allclose(flat(found.params), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["diagonal", "block", "full", "kronecker"])
def test_what_is_returned(states, params, kept, name):
    state = states[name]
    matrix = np.asarray(ff.information.to_dense(state.information, state.mean))
    found = ROUNDED(state, 3, mask=kept)
    for kernel in "wv":
        values = found.values[kernel]
        assert values.dtype == np.int8 and np.abs(values).max() <= 3
        assert found.scales[kernel].shape == (1, values.shape[1])
        np.testing.assert_allclose(
            found.params[kernel], values * found.scales[kernel], rtol=1e-12
        )
        assert np.all(values[~kept[kernel]] == 0)
    assert found.values["b"] is None and found.scales["c"] is None
    step = flat(found.params) - flat(params)
    rise = step @ matrix @ step / 2
    np.testing.assert_allclose(found.predicted_rise, rise, rtol=1e-9)
    nearest = {}
    for kernel, x in params.items():
        nearest[kernel] = x
        if x.ndim == 2:
            x = x * kept[kernel]
            scale = jnp.abs(x).max(0) / 3
            nearest[kernel] = jnp.round(x / scale) * scale
    step = flat(nearest) - flat(params)
    np.testing.assert_allclose(found.nearest_rise, step @ matrix @ step / 2, rtol=1e-9)
    assert float(found.predicted_rise) <= float(found.nearest_rise)
    if name == "diagonal":
        alone = ROUNDED(state, 3, mask=kept, compensate=False)
        np.testing.assert_array_equal(flat(alone.params), flat(found.params))


def test_without_correlation_it_is_rounding_to_nearest(states, params):
    kronecker = states["kronecker"]
    units = jax.tree.map(
        lambda a: jnp.eye(a.shape[-1])[None] * 50.0,
        kronecker.information.input_factors,
    )
    state = kronecker._replace(
        information=kronecker.information._replace(input_factors=units)
    )
    for bits in (2, 4):
        found = ROUNDED(state, bits)
        alone = ROUNDED(state, bits, compensate=False)
        level = 2 ** (bits - 1) - 1
        for n in "wv":
            nearest = jnp.clip(jnp.round(params[n] / found.scales[n]), -level, level)
            np.testing.assert_array_equal(found.values[n], nearest)
        np.testing.assert_array_equal(found.params["b"], params["b"])
        assert float(found.predicted_rise) == float(alone.predicted_rise)


@pytest.mark.slow
def test_a_dead_input_is_named(states, params):
    state = states["kronecker"]
    factors = dict(state.information.input_factors)
    factors["w"] = factors["w"].at[:, 2].set(0.0).at[:, :, 2].set(0.0)
    dead = state._replace(information=state.information._replace(input_factors=factors))
    for call in (
        lambda **more: ROUNDED(dead, 3, **more),
        lambda **more: compression.allocate_bits(dead, (2, 3), 2.5, **more),
    ):
        with pytest.raises(ValueError, match=r"inputs of w .* 4 .* w\[2,0\] on"):
            call()
        call(dead_inputs="nearest")
    row = {n: np.ones(x.shape, bool) for n, x in params.items()}
    row["w"][2] = False
    assert np.all(ROUNDED(dead, 3, mask=row).values["w"][2] == 0)
    with pytest.raises(ValueError, match='"raise" or "nearest"'):
        ROUNDED(state, 3, dead_inputs="drop")


def test_bits_by_name_and_of_other_arrays(states, params):
    state = states["kronecker"]
    found = ROUNDED(state, {"v": 12, "c": 4})
    assert found.values["v"].dtype == np.int16 and found.values["w"] is None
    assert found.scales["c"].shape == (1,)
    np.testing.assert_array_equal(found.params["w"], params["w"])
    np.testing.assert_array_equal(
        ROUNDED(state, 4, chosen=["w"]).params["v"], params["v"]
    )


def test_channels_of_kernels_in_other_layouts():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 8)))}

    def model(params, x):  # outputs (3, 2), inputs last
        return jnp.einsum("ni,abi->nab", x, params["w"]).reshape((-1, 6))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(20, 8)))
    layers = ff.layers.find_layers(model, params, x)
    estimator = ff.estimators.exact(
        model, ff.likelihoods.gaussian(), ff.structures.kronecker(layers)
    )
    state = ff.posterior(params, estimator(params, (x, None)), prior_precision=0.1)
    found = ROUNDED(state, 3)
    assert found.scales["w"].shape == (3, 2, 1)
    assert float(found.predicted_rise) < float(found.nearest_rise)


@pytest.mark.slow
def test_jit_and_float32(states):
    with jax.numpy_dtype_promotion("strict"):
        eager = ROUNDED(states["kronecker"], 3)
    traced = jax.jit(lambda state: ROUNDED(state, 3))(states["kronecker"])
    np.testing.assert_array_equal(traced.values["w"], eager.values["w"])
    kept = jax.tree.map(lambda x: jnp.ones(x.shape, bool), states["kronecker"].mean)
    known = jax.jit(lambda: ROUNDED(states["kronecker"], 3, mask=kept))()
    np.testing.assert_array_equal(known.values["w"], eager.values["w"])
    with jax.enable_x64(False):
        single = jax.tree.map(lambda x: np.asarray(x, np.float32), states["kronecker"])
        found = ROUNDED(single, 3)
        assert found.params["w"].dtype == np.float32
        np.testing.assert_allclose(found.predicted_rise, eager.predicted_rise, rtol=0.2)


# ---- allocation


def searched(costs, sizes, limit):
    best = min(
        (sum(c[k] for c, k in zip(costs, pick, strict=True)), pick)
        for pick in itertools.product(*map(range, map(len, costs)))
        if sum(s[k] for s, k in zip(sizes, pick, strict=True)) <= limit
    )
    return best[0]


def test_the_cheapest_choice_is_found():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, columns = rng.integers(1, 6), rng.integers(1, 5)
        costs = rng.exponential(size=(rows, columns)) ** 3
        sizes = np.outer(rng.integers(1, 50, rows), np.arange(2, 2 + columns))
        limit = rng.uniform(sizes.min(1).sum(), sizes.max(1).sum() + 1)
        picked = cheapest(costs, sizes, limit)
        places = np.arange(rows), picked
        assert sizes[places].sum() <= limit
        assert costs[places].sum() == pytest.approx(searched(costs, sizes, limit))


def test_bits_of_a_pruned_model_count_its_zeros_once(states, kept):
    state = states["kronecker"]
    found = compression.allocate_bits(state, (3,), 3.0, mask=kept)
    rise = compression.round_to_grid(state, found.bits, mask=kept).predicted_rise
    np.testing.assert_allclose(found.predicted_rise, rise, rtol=1e-9)


def test_bits_are_allocated(states, params):
    state, choices = states["kronecker"], (2, 3, 6)
    names = ("v", "w")
    costs = [
        [float(ROUNDED(state, {n: b}).predicted_rise) for b in choices] for n in names
    ]
    sizes = [[params[n].size * b for b in choices] for n in names]
    for budget in (2.0, 3.4, 6.0):
        found = compression.allocate_bits(state, choices, budget)
        assert found.mean_bits <= budget
        limit = budget * sum(params[n].size for n in names)
        best = searched(costs, sizes, limit)
        np.testing.assert_allclose(found.predicted_rise, best, rtol=1e-9)
        rise = ROUNDED(state, found.bits).predicted_rise
        np.testing.assert_allclose(found.predicted_rise, rise, rtol=1e-9)


def test_bad_input(states, params, kept):
    state = states["kronecker"]
    for bits in (0, 1, 33, 4.0, True, "4"):
        with pytest.raises(ValueError, match="bits are whole numbers from 2"):
            ROUNDED(state, bits)
    with pytest.raises(ValueError, match="bits are whole numbers"):
        compression.allocate_bits(state, (2, 33), 3.0)
    with pytest.raises(ValueError, match="bits name"):
        ROUNDED(state, {"u": 3})
    with pytest.raises(ValueError, match="leave chosen out"):
        ROUNDED(state, {"w": 3}, chosen=["w"])
    for budget in (1.9, 0.5):
        with pytest.raises(ValueError, match="below the least of the choices, 2"):
            compression.allocate_bits(state, (2, 4), budget)
    with pytest.raises(ValueError, match="budget must be positive"):
        compression.allocate_bits(state, (2, 4), -1.0)
    with pytest.raises(ValueError, match="one or more; got none"):
        compression.allocate_bits(state, (), 3.0)
    with pytest.raises(ValueError, match="mask must be like the parameters"):
        ROUNDED(state, 3, mask={"w": kept["w"]})
    with pytest.raises(ValueError, match="another tree than the mean"):
        ROUNDED(states["full"]._replace(mean={"w": params["w"]}), 3)
