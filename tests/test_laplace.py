"""From a trained model to a state in one call: four models, and what is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from scipy.special import softmax

import fisherflow_jax as ff
from fisherflow_jax import _laplace
from program_size import largest

RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 4)).astype(np.float32)
LABELS = (X[:, 0] + X[:, 1] * X[:, 2] > 0).astype(int) + (X[:, 3] > 1)
TARGETS = (X[:, 0] + 0.1 * RNG.normal(size=70)).astype(np.float32)
BATCHES = [(X[i : i + 20], LABELS[i : i + 20]) for i in (0, 20)]
HELD_OUT = X[40:], LABELS[40:]
CATEGORICAL, GAUSSIAN = ff.likelihoods.categorical(), ff.likelihoods.gaussian()


def draw(*shape):
    return RNG.normal(size=shape)


def explicit(apply_fn, params, x):
    """The Jacobian of the outputs and the outputs, in numpy."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    outputs = lambda flat: apply_fn(unravel(flat), x)  # noqa: E731
    both = jax.jit(lambda flat: (jax.jacrev(outputs)(flat), outputs(flat)))(flat)
    return [np.asarray(x) for x in both]


def double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


# ---- models as people write them, each in less than ten lines


@pytest.mark.slow
def test_a_flax_classifier():
    network = linen.Sequential([linen.Dense(3), linen.tanh, linen.Dense(3)])
    params = double(network.init(jax.random.key(0), X[:1]))

    found = ff.laplace(network.apply, CATEGORICAL, params, BATCHES, validation=HELD_OUT)
    prediction = ff.predict(*found[:3], X[:5])

    assert prediction.mean.shape == (5, 3)
    jacobian, logits = explicit(network.apply, params, X[:40])
    p = softmax(logits, axis=1)
    middle = np.eye(3) * p[:, None] - p[:, None] * p[:, :, None]
    expected = np.einsum("nci,ncd,ndj->ij", jacobian, middle, jacobian)
    gathered = ff.information.to_dense(found.report.accumulation.information)
    np.testing.assert_allclose(gathered, expected, rtol=1e-9, atol=1e-11)
    scale = found.report.calibration.scale
    matrix = (expected + np.eye(len(expected))) / scale
    np.testing.assert_allclose(
        ff.information.to_dense(found.state.information), matrix, rtol=1e-7, atol=1e-9
    )
    assert found.report.calibration.after <= found.report.calibration.before
    assert str(found.report).splitlines()[:3] == [
        "structure: full(), 5,832 bytes: the whole matrix fits in 67,108,864 bytes",
        "estimator: exact",
        "data: 40 observations in 2 batches",
    ]
    assert repr(found) == f"laplace({found.state!r}, categorical())"


@pytest.mark.slow
def test_an_nnx_regressor():
    network = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(network, nnx.Param)
    apply_fn = lambda weights, x: nnx.merge(graph, weights)(x)[:, 0]  # noqa: E731
    train, held_out = [(X[:40], TARGETS[:40])], (X[40:], TARGETS[40:])

    found = ff.laplace(
        apply_fn,
        ff.likelihoods.gaussian(None),
        weights,
        train,
        validation=held_out,
    )
    prediction = ff.predict(*found[:3], X[:5])

    assert prediction.mean.shape == (5,)
    x = np.column_stack([np.ones(40), X[:40]])
    np.testing.assert_allclose(
        ff.information.to_dense(found.report.accumulation.information),
        x.T @ x,
        rtol=1e-5,
        atol=1e-4,
    )
    noise = found.report.calibration.noise
    assert f"noise {noise:.3g}" in str(found.report)
    assert found.likelihood == ff.likelihoods.gaussian(scale=float(noise))


@pytest.mark.slow
def test_a_last_layer_of_3000_classes():
    features, num_classes = 16, 3000
    head = {"w": draw(features, num_classes), "gain": np.ones(())}
    params = {"body": draw(4, features), "head": head}

    def apply_fn(p, x):
        return p["head"]["gain"] * (jnp.tanh(x @ p["body"]) @ p["head"]["w"])

    batches = [(X[:10], np.arange(10)), (X[10:20], np.arange(10))]

    found = ff.laplace(apply_fn, CATEGORICAL, params, batches, chosen=["head"], key=0)
    prediction = ff.predict(*found[:3], X[:5])

    assert prediction.mean.shape == (5, num_classes)
    assert found.state.mean["head"]["w"].shape == (features, num_classes)
    # 16^2 numbers of the inputs, one a class, one each of gain, count and shift; the
    # matrix would take 18 GB
    assert found.report.num_bytes == 8 * (features**2 + num_classes + 3)
    assert "would take 18,432,768,008 bytes, and linear layers" in found.report.reason
    assert "the diagonal alone (used in mul): head.gain" in str(found.report)
    assert found.report.estimator.name == "monte_carlo"
    # no array of the pass is larger than the layer and the batch's outputs
    head, most = found.state.mean, 10 * num_classes
    run = jax.make_jaxpr(lambda p, b: found.report.estimator(p, b, jax.random.key(0)))
    assert largest(run(head, batches[0]).jaxpr) <= max(most, features * num_classes)


def test_an_adapter():
    params = {"w": draw(4, 8), "lora": {"a": draw(4, 2), "b": draw(2, 8)}, "v": draw(8)}

    def apply_fn(p, x):
        return jnp.tanh(x @ p["w"] + (x @ p["lora"]["a"]) @ p["lora"]["b"]) @ p["v"]

    found = ff.laplace(
        apply_fn,
        GAUSSIAN,
        params,
        [(X[:40], TARGETS[:40])],
        chosen=lambda name: "lora" in name,
    )

    assert found.state.mean["w"] is None
    jacobian, _ = explicit(*ff.only(apply_fn, params, ["lora"]), X[:40])
    information = found.report.accumulation.information
    np.testing.assert_allclose(
        ff.information.to_dense(information), jacobian.T @ jacobian, rtol=1e-9
    )


# ---- what is chosen


def test_the_structure_is_chosen_by_size_layers_and_interaction():
    network = lambda p, x: p["gain"] * (jnp.tanh(x @ p["w"]) @ p["v"])  # noqa: E731
    curve = lambda p, x: jnp.sum(jnp.sin(p["w"] * x[:, :1]) * p["v"], 1)  # noqa: E731
    together = lambda p, x: network(p, x - (x @ p["w"]).mean())  # noqa: E731
    strange = lambda p, x: curve(p, x) - curve(p, x).mean()  # noqa: E731
    wide = {"w": (4, 600), "v": (600, 3), "gain": (3,)}
    small, gains = (
        {"w": (4, 2), "v": (2, 3), "gain": (3,)},
        {"w": (3000,), "v": (3000,)},
    )
    too_large = "the whole matrix would take"
    cases = {
        ("full()", "the whole matrix fits in 67,108,864 bytes"): (network, small),
        (
            "kronecker(layers)",
            f"{too_large} 141,321,672 bytes, and linear layers were found",
        ): (network, wide),
        (
            "diagonal()",
            f"{too_large} 288,000,000 bytes, and no linear layer was found",
        ): (curve, gains),
        (
            "kronecker(layers)",
            "examples interact (reduce_sum over the examples) and are squared by "
            "layers",
        ): (together, small),
        (
            "diagonal()",
            "examples interact (reduce_sum over the examples) and are squared by "
            "layers, of which none was found",
        ): (strange, gains),
    }
    wrong = []
    for expected, (model, shapes) in cases.items():
        params = {name: jax.ShapeDtypeStruct(s, float) for name, s in shapes.items()}
        layers = ff.layers.find_layers(model, params, X)
        structure, reason = _laplace._chosen_structure(params, layers)
        batched = structure.layers is not None and structure.layers.batched
        if (structure.name, reason) != expected or batched != ("interact" in reason):
            wrong.append((structure.name, reason))
    assert wrong == []


def line(params, x):
    return x @ params


def test_batches_may_come_once_and_stacked():
    rows = ff.laplace(line, GAUSSIAN, np.zeros(4), [(X[:40], TARGETS[:40])]).state
    stacked = ff.Stacked(X[:40].reshape((2, 20, 4)), TARGETS[:40].reshape((2, 20)))
    once = ((X[i : i + 20], TARGETS[i : i + 20]) for i in (0, 20))
    for batches in (once, stacked):
        found = ff.laplace(line, GAUSSIAN, np.zeros(4), batches, prior_precision=1.0)
        assert found.report.accumulation.count == 40
        np.testing.assert_allclose(
            found.state.information.rows, rows.information.rows, rtol=1e-6
        )


def test_a_posterior_that_is_not_calibrated_needs_no_pass():
    train, held_out = [(X[:40], TARGETS[:40])], (X[40:], TARGETS[40:])
    found = ff.laplace(line, GAUSSIAN, np.zeros(4), train, validation=held_out, key=7)
    plain = ff.laplace(line, GAUSSIAN, np.zeros(4), train, prior_precision=3.0)
    mean, gathered = found.state.mean, found.report.accumulation
    again = ff.posterior(mean, gathered, prior_precision=3.0)
    jax.tree.map(np.testing.assert_array_equal, again, plain.state)


def test_what_is_refused_or_said():
    run = lambda *args, **options: ff.laplace(line, *args, **options)  # noqa: E731
    w, train = np.zeros(4), [(X, TARGETS)]
    classes = np.zeros((4, 300))
    refused = {
        "dispersion of gaussian.* validation=": lambda: run(
            ff.likelihoods.gaussian(None), w, train
        ),
        "300 outputs, so that labels are sampled: give ff.laplace a key": lambda: run(
            CATEGORICAL, classes, [(X, LABELS)]
        ),
        "examples interact, .*: give ff.laplace a key": lambda: ff.laplace(
            lambda w, x: line(w, x - x.mean(0) * w), GAUSSIAN, w, train
        ),
        r"one batch alone goes in a list, \[batch\]": lambda: run(
            GAUSSIAN, w, train[0]
        ),
        "no batches": lambda: run(GAUSSIAN, w, iter([])),
        "no parameter has the name 'tail'": lambda: run(
            GAUSSIAN, {"head": w}, train, chosen=["tail"]
        ),
    }
    for message, call in refused.items():
        with pytest.raises(ValueError, match=message):
            call()
    for likelihood, apply_fn in ((ff.likelihoods.gaussian, line), (line, GAUSSIAN)):
        with pytest.raises(TypeError, match="apply_fn"):
            ff.laplace(apply_fn, likelihood, w, train)
    with pytest.raises(TypeError, match=r"Call it: ff\.structures\.full\(\)"):
        run(GAUSSIAN, w, train, structure="full")


def test_batches_that_are_not_finite_are_said():
    square = lambda w, x: jnp.exp(x @ w)  # noqa: E731
    batches = [(X, TARGETS), (np.full((1, 4), 1e3), np.ones(1))]
    with pytest.warns(ff.DataWarning, match="1 of 2 batches were left out"):
        found = ff.laplace(square, GAUSSIAN, np.ones(4), batches)
    assert "1 of 2 batches were left out" in str(found.report)
