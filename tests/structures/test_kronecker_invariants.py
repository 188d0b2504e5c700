"""What factors are, by hand, and what must not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fisherflow_jax as ff
from fisherflow_jax.structures._algebra import kronecker_factors, layer_vectors

EXACT = {"rtol": 1e-10, "atol": 1e-12}
# most of the time goes into compiling, and tiny arrays gain nothing from it
FAST = {"xla_backend_optimization_level": 0}
CATEGORICAL = ff.likelihoods.categorical()
SHARING = {"expand": ff.structures.sharing.expand, "reduce": ff.structures.sharing.pool}


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


PARAMS = {"b": draw(3, seed=1), "u": draw(3, 3, seed=2), "w": draw(2, 3, seed=3)}
X = draw(4, 3, 2, seed=4)  # four examples of three steps
WEIGHTS = np.array([1.0, 2.0, 0.5, 1.0])


def scanned(params, x):
    def step(h, now):
        return jnp.tanh(now @ params["w"] + params["b"][None] + h @ params["u"]), None

    return lax.scan(step, jnp.ones((x.shape[0], 3), x.dtype), x.swapaxes(0, 1))[0]


def unrolled(params, x):
    h = jnp.ones((x.shape[0], 3), x.dtype)
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ params["w"] + params["b"][None] + h @ params["u"])
    return h


def one_by_one(params, x):
    return jax.vmap(lambda one: unrolled(params, one[None])[0])(x)


VARIANTS = {
    "unrolled": unrolled,
    "jitted": jax.jit(scanned),
    "checkpointed": jax.checkpoint(scanned),
    "vmapped": one_by_one,
}


@functools.cache
def factors(apply_fn=scanned, sharing="expand"):
    layers = ff.layers.find_layers(apply_fn, PARAMS, X)
    kernels = dict.fromkeys(("u", "w"), SHARING[sharing])
    structure = ff.structures.kronecker(layers, sharing=kernels)
    estimator = ff.estimators.exact(apply_fn, CATEGORICAL, structure)
    return jax.jit(estimator, compiler_options=FAST)(PARAMS, (X, None, WEIGHTS))


@functools.cache
def by_hand(sharing):
    """Inputs and Jacobians of every step, by perturbing its sum: A and G of `w`."""

    def outputs(added, x):
        h = jnp.ones(3)
        for t in range(3):
            h = jnp.tanh(x[t] @ PARAMS["w"] + PARAMS["b"] + h @ PARAMS["u"] + added[t])
        return h

    both = jax.jit(
        jax.vmap(
            lambda added, x: (jax.jacobian(outputs)(added, x), outputs(added, x)),
            (None, 0),
        ),
        compiler_options=FAST,
    )
    jacobians, logits = both(jnp.zeros((3, 3)), X)
    p = np.asarray(jax.nn.softmax(logits))
    fisher = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None, :]
    a = np.concatenate([X, np.ones((4, 3, 1))], 2)
    if sharing == "reduce":
        a, jacobians = a.mean(1, keepdims=True), jacobians.sum(2, keepdims=True)
    inputs = np.einsum("n,nti,ntj->ij", WEIGHTS, a, a)
    outputs_factor = np.einsum(
        "n,ncto,ncd,ndtp->op", WEIGHTS, jacobians, fisher, jacobians
    )
    return inputs, outputs_factor / a.shape[1]


def matches(sharing):
    found, (inputs, outputs) = factors(scanned, sharing), by_hand(sharing)
    return np.allclose(found.input_factors["w"][0], inputs, **EXACT) and (
        np.allclose(found.output_factors["w"][0], outputs, **EXACT)
    )


@pytest.mark.parametrize("sharing", SHARING)
def test_factors_are_those_of_explicit_jacobians(sharing):
    assert matches(sharing)


@pytest.mark.parametrize(
    "name", ["with_bias", "expand", "_gram"], ids=["inputs", "outputs", "both"]
)
def test_the_comparison_sees_an_error_of_a_thousandth(name, monkeypatch):
    module = ff.structures.sharing if name == "expand" else kronecker_factors
    original = getattr(module, name)
    wrong = {
        "with_bias": lambda inputs: 1.001 * original(inputs),
        "_gram": lambda rows, widest: 1.001 * original(rows, widest),
        "expand": lambda a, g: (a, 1.001 * original(a, g)[1]),
    }
    monkeypatch.setattr(module, name, wrong[name])
    monkeypatch.setitem(SHARING, "expand", ff.structures.sharing.expand)
    factors.cache_clear()
    assert not matches("expand")
    factors.cache_clear()


def test_factors_are_symmetric_and_positive_semi_definite():
    found = factors()
    for factor in (*found.input_factors.values(), *found.output_factors.values()):
        np.testing.assert_allclose(factor, factor.swapaxes(1, 2), rtol=1e-14)
        assert np.linalg.eigvalsh(factor).min() > -1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_how_a_model_is_written_does_not_matter(name):
    found, expected = factors(VARIANTS[name]), factors()
    assert found.layers == expected.layers
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **EXACT), found, expected
    )


def test_vectors_as_matrices_and_back_bit_for_bit():
    layers = ff.layers.find_layers(scanned, PARAMS, X)
    vector = jax.tree.map(lambda x: jnp.asarray(draw(*x.shape, seed=5)), PARAMS)
    matrices, others = layer_vectors.split(layers, vector, jnp.float64)
    assert {name: m.shape for name, m in matrices.items()} == {
        "u": (1, 3, 3),
        "w": (1, 3, 3),
    }
    assert others == {}
    np.testing.assert_array_equal(matrices["w"][0, -1], vector["b"])
    back = layer_vectors.join(layers, matrices | others, vector)
    jax.tree.map(np.testing.assert_array_equal, back, vector)


def test_the_correction_of_shared_kernels_is_the_diagonal_in_its_basis():
    """Kernels used at several steps, where no product of squares will do."""
    past = factors()
    structure = ff.structures.kronecker(past.layers, eigenvalue_correction=past)
    batch = X, None, WEIGHTS
    found, full = jax.jit(
        lambda p: [
            ff.estimators.exact(scanned, CATEGORICAL, s)(p, batch)
            for s in (structure, ff.structures.full())
        ],
        compiler_options=FAST,
    )(PARAMS)
    exact = np.asarray(ff.information.to_dense(full))
    # in ravelled order b (3), u (9), w (6); the bias is the last row of w's matrix
    for name, places in (
        ("u", np.arange(3, 12)),
        ("w", np.r_[np.arange(12, 18), np.arange(3)]),
    ):
        block = exact[np.ix_(places, places)]
        basis = np.kron(found.input_bases[name][0], found.output_bases[name][0])
        rotated = basis.T @ block @ basis
        np.testing.assert_allclose(
            found.eigenvalues[name].ravel(), np.diag(rotated), rtol=1e-8, atol=1e-10
        )
        plain = np.kron(past.input_factors[name][0], past.output_factors[name][0])
        corrected = basis @ np.diag(np.diag(rotated)) @ basis.T
        count = WEIGHTS.sum()
        assert np.linalg.norm(corrected - block) < np.linalg.norm(plain / count - block)
