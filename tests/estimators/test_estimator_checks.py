"""What does not fit raises before anything is computed, and says what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from together import together

X, Y = np.ones((4, 2)), np.zeros(4)
PARAMS = np.ones(2)
NAMES = ["exact", "monte_carlo", "empirical", "observed", "squared_gradient"]
every_estimator = pytest.mark.parametrize("name", NAMES)


def linear(params, x):
    return x @ params


def call(name, batch, apply_fn=linear, likelihood=None, params=PARAMS):
    likelihood = ff.likelihoods.gaussian() if likelihood is None else likelihood
    factory = getattr(ff.estimators, name)
    estimator = factory(apply_fn, likelihood, ff.structures.diagonal())
    return estimator(params, batch, jax.random.key(0))


@together
@every_estimator
@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda params, x: jnp.sum(x @ params),
        lambda params, x: (x @ params)[:2],
        lambda params, x: (x @ params)[None],
        lambda params, x: (x @ params, x),
    ],
    ids=["number", "short", "transposed", "tuple"],
)
def test_outputs_lead_with_the_examples(name, apply_fn):
    with pytest.raises(ValueError, match=r"leading axis is the examples' \(n = 4\)"):
        call(name, (X, Y), apply_fn)


@together
@every_estimator
def test_targets_have_the_shape_of_the_outputs(name):
    with pytest.raises(ValueError, match=r"drop it \(targets\[\.\.\., 0\]\)"):
        call(name, (X, Y[:, None]))
    with pytest.raises(ValueError, match=r"drop it \(outputs\[\.\.\., 0\]\)"):
        call(name, (X, Y), lambda params, x: (x @ params)[:, None])


@together
@every_estimator
def test_outputs_are_floating_point(name):
    with pytest.raises(ValueError, match="outputs must be floating point"):
        call(name, (X, Y), lambda params, x: (x @ params).astype(jnp.int32))


BATCHES = {
    "empty": ((X[:0], Y[:0]), r"must not be empty \(n = 0\)"),
    "lengths": ((X, Y[:3]), r"must agree in their leading axis.*\(4, 2\), \(3,\)"),
    "number": ((X, 1.0), "leading example axis .*ff.Shared"),
    "nothing": (((), None), "at least one array with an example axis"),
    "one": ((X,), "a batch is .inputs, targets. or .*got tuple of length 1"),
    "four": ((X, Y, Y, Y), "got tuple of length 4"),
    "dict": ({"x": X, "y": Y}, "got dict of length 2"),
    "array": (X, "a batch is .* got ndarray of length 4"),
    "None": (None, "a batch is .* got NoneType"),
    "weights of another length": ((X, Y, np.ones(3)), r"shape \(n,\) = \(4,\).*\(3,\)"),
    "weights of two axes": ((X, Y, np.ones((4, 1))), r"\(4,\), .* got \(4, 1\)"),
    "a number as weights": ((X, Y, 1.0), r"weights must have shape \(n,\) = \(4,\)"),
    "negative weights": ((X, Y, np.array([1, -1, 1, 1.0])), "not negative; got .*-1"),
    "infinite weights": ((X, Y, np.array([1, np.inf, 1, 1])), "must be finite .*inf"),
    "NaN as a weight": ((X, Y, np.array([1, np.nan, 1, 1])), "must be finite .*nan"),
}


@together
@pytest.mark.parametrize("case", BATCHES)
def test_batches(case):
    batch, message = BATCHES[case]
    with pytest.raises(ValueError, match=message):
        call("exact", batch)


@together
@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_chunk_sizes(name, chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size .* got {chunk_size}"):
        getattr(ff.estimators, name)(
            linear,
            ff.likelihoods.gaussian(),
            ff.structures.diagonal(),
            chunk_size=chunk_size,
        )


@together
@every_estimator
@pytest.mark.parametrize("dtype", ["int32", "complex128", "bool"])
def test_parameters_are_real_floating_point(name, dtype):
    params = {"w": np.ones(2), "b": np.ones((), dtype)}
    with pytest.raises(ValueError, match=rf"params must be .*; b has dtype {dtype}"):
        call(name, (X, Y), lambda p, x: x @ p["w"] + p["b"], params=params)


def test_parameters_may_be_numbers():
    information = call(
        "exact", (X, Y), lambda p, x: x @ jnp.stack(p), params=[0.5, 1.0]
    )
    assert information.entries == [4.0, 4.0]


@pytest.mark.parametrize("name", ["exact", "empirical"])
def test_static_facts_raise_under_jit(name):
    estimator = getattr(ff.estimators, name)(
        linear, ff.likelihoods.gaussian(), ff.structures.diagonal()
    )
    run = jax.jit(lambda params, batch: estimator(params, batch))
    with pytest.raises(ValueError, match="leading axis"):
        run(PARAMS, (X, Y[:3]))
    with pytest.raises(ValueError, match="must not be empty"):
        run(PARAMS, (X[:0], Y[:0]))


def test_an_estimator_is_a_function_that_jax_transforms():
    estimator = ff.estimators.exact(
        linear, ff.likelihoods.gaussian(), ff.structures.diagonal()
    )
    assert estimator.name == "exact"
    shapes = jax.eval_shape(estimator, PARAMS, (X, Y))
    assert shapes.entries.shape == (2,)
    jitted = jax.jit(estimator)(PARAMS, (X, Y))
    stacked = jax.vmap(estimator, in_axes=(0, None))(np.ones((3, 2)), (X, Y))
    np.testing.assert_allclose(jitted.entries, [4.0, 4.0])
    np.testing.assert_allclose(stacked.entries, np.full((3, 2), 4.0))
