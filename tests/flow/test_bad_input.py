"""What a flow refuses, and how it says so."""

import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import streams
from together import together

FLOW = streams.flow()
BATCH = streams.batches(4)[0]


def build(**options):
    return ff.fisher_flow(
        streams.linear,
        options.pop("likelihood", ff.likelihoods.gaussian()),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
        **options,
    )


@pytest.mark.parametrize(
    ("level", "dtype"), [(0, "int64"), (1j, "complex128"), (True, "bool")]
)
@pytest.mark.parametrize("name", ["params", "prior_mean"])
def test_parameters_are_real_and_the_culprit_is_named(name, level, dtype):
    good = streams.tree(np.zeros(3))
    bad = good | {"level": np.asarray(level)}
    with pytest.raises(
        ValueError, match=rf"{name} must be .*; level has dtype {dtype}"
    ):
        FLOW.init(*((bad,) if name == "params" else (good, bad)))


def test_python_numbers_and_float32_will_do():
    state = FLOW.init({"level": 0.0, "slope": np.zeros(2, np.float32)})
    assert state.mean["level"].dtype == state.mean["slope"].dtype == jnp.float64


@pytest.mark.parametrize(
    "prior_mean",
    [np.zeros(3), {"level": 0.0}, {"level": np.zeros(2), "slope": np.zeros(2)}],
    ids=["other tree", "missing leaf", "other shape"],
)
def test_a_prior_mean_has_the_shapes_of_the_parameters(prior_mean):
    with pytest.raises(ValueError, match="prior_mean must have the tree and shapes of"):
        FLOW.init(streams.tree(np.zeros(3)), prior_mean)


@pytest.mark.parametrize(
    ("prior_precision", "message"),
    [
        (-1.0, "must be positive and finite.*got -1.0"),
        (0.0, "must be positive and finite.*got 0.0"),
        (np.inf, "must be positive and finite"),
        ({"level": 1.0, "slope": np.array([1.0, -2.0])}, "must be positive and finite"),
        ({"level": 1.0}, "prior_precision must be a pytree prefix"),
        (
            {"level": 1.0, "slope": np.ones(3)},
            r"shape \(3,\) for a parameter of .*\(2,\)",
        ),
        (
            ff.structures.Diagonal({"level": jnp.ones(()), "slope": -jnp.ones(2)}),
            "must be positive definite",
        ),
        (ff.structures.Diagonal(jnp.ones(3)), "another tree than the parameters"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_prior_precision_is_positive_and_fits(prior_precision, message):
    with pytest.raises(ValueError, match=message):
        build(prior_precision=prior_precision).init(streams.tree(np.zeros(3)))


@together
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((BATCH[0][:0], BATCH[1][:0]), r"must not be empty \(n = 0\)"),
        ((BATCH[0], BATCH[1][:3]), "agree in their leading axis"),
        ((BATCH[0], np.float64(1.0)), "has a leading example axis"),
        ((BATCH[0], BATCH[1], np.ones(3)), r"weights must have shape \(n,\) = \(4,\)"),
        ((BATCH[0], BATCH[1], np.ones((4, 1))), "weights must have shape"),
        ((BATCH[0], None), "a flow learns from targets"),
        ((BATCH[0],), "a batch is .* got tuple of length 1"),
        (BATCH[0], "a batch is .* got ndarray"),
        ((BATCH[0], BATCH[1][:, None]), "targets have shape"),
        ((BATCH[0], BATCH[1] + 0j), "targets must be real"),
    ],
    ids=str,
)
def test_a_batch_has_rows_that_belong_together(batch, message):
    with pytest.raises(ValueError, match=message):
        FLOW.update(streams.start(FLOW), batch)


def test_outputs_need_the_examples_axis():
    flow = ff.fisher_flow(
        lambda params, x: jnp.sum(x @ params),
        ff.likelihoods.gaussian(),
        structure=ff.structures.full(),
        memory=ff.memories.stationary(),
    )
    with pytest.raises(ValueError):
        flow.update(flow.init(np.zeros(3)), (BATCH[0], BATCH[1]))


@pytest.mark.parametrize("name", ["observed", "squared_gradient"])
def test_what_is_no_curvature_is_refused(name):
    with pytest.raises(ValueError, match=rf"estimators.{name} cannot be a flow's curv"):
        build(estimator=getattr(ff.estimators, name))


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95, float("nan")])
def test_a_level_lies_between_0_and_1(level):
    with pytest.raises(ValueError, match=r"level.*\(0, 1\)"):
        ff.confidence_interval(streams.start(FLOW), level=level)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_a_chunk_holds_a_whole_number_of_examples(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be a positive whole number"):
        build(chunk_size=chunk_size)


def test_robust_intervals_need_a_robust_flow():
    with pytest.raises(ValueError, match="built with robust=True"):
        ff.standard_error(streams.start(FLOW), robust=True)
