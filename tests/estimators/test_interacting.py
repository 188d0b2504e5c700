"""Models whose examples interact: whole batches are squared, or it is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherflow_jax as ff
from interacting_models import COUNT, MODELS, PARAMS, X
from interacting_models import draw as drawn

pytestmark = pytest.mark.standard_promotion  # flax's own sums

LIKELIHOOD = ff.likelihoods.gaussian(scale=0.5)
Y = drawn(COUNT, 2, seed=3)
ROLL = MODELS["roll"].apply_fn
STRUCTURES = [
    ff.structures.full(),
    ff.structures.block(),
    ff.structures.diagonal(),
    ff.structures.scalar(),
    ff.structures.low_rank(3),
]


@functools.cache
def of_jacobian(name):
    """Each example's rows of the batch's Jacobian, `(n, k, d)`, and its outputs."""
    apply_fn, params, _ = MODELS[name]
    flat, unravel = ravel_pytree(params)
    run = jax.jit(lambda v: apply_fn(unravel(v), X))
    return np.asarray(jax.jacobian(run)(flat)), np.asarray(run(flat))


def fisher(name, weights=1.0):
    jacobian, _ = of_jacobian(name)
    return 4 * np.einsum("n,ncd,nce->de", weights * np.ones(COUNT), jacobian, jacobian)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MODELS)
def test_the_information_is_that_of_the_whole_batch(name):
    apply_fn, params, _ = MODELS[name]
    estimator = ff.estimators.exact(apply_fn, LIKELIHOOD, STRUCTURES[0])
    dense = ff.information.to_dense(estimator(params, (X, None)), params)
    np.testing.assert_allclose(dense, fisher(name), 1e-10, 1e-10)


@pytest.mark.slow
def test_every_structure_runs_whole_batches():
    wrong = []
    for name, (apply_fn, params, _) in MODELS.items():
        layers = ff.layers.find_layers(apply_fn, params, X)
        if not layers.batched:
            wrong.append((name, "layers"))
        for structure in STRUCTURES:
            estimator = ff.estimators.exact(apply_fn, LIKELIHOOD, structure)
            table = estimator.paths(params, (X, None))
            whole = table.count("a gradient of the whole batch for each example")
            if whole != len(jax.tree.leaves(params)):
                wrong.append((name, structure.name))
        kronecker = ff.structures.kronecker(layers)
        if not ff.estimators.exact(apply_fn, LIKELIHOOD, kronecker).random:
            wrong.append((name, "no signs for the rows of whole batches"))
        with pytest.raises(ValueError, match=r"interact|one row"):
            # as another model, without interaction, has them
            alone = dataclasses.replace(layers, batched=False, together=None)
            kronecker = ff.structures.kronecker(alone)
            ff.estimators.exact(apply_fn, LIKELIHOOD, kronecker).paths(
                params, (X, None)
            )
    assert wrong == []


@pytest.mark.slow
@pytest.mark.usefixtures("strict_promotion")
def test_structures_weights_chunks_and_scores():
    """Of weights, a chunk that is not full, and the data's scores."""
    weights = np.array([1.0, 0.0, 2.0, 1.0, 3.0, 1.0])
    batch = X, Y, weights
    # a row of weight zero holds another example's inputs
    x = np.where(weights[:, None] > 0, X, X[:1])
    flat, unravel = ravel_pytree(PARAMS)
    run = jax.jit(lambda v: ROLL(unravel(v), x))
    jacobian = np.asarray(jax.jacobian(run)(flat))
    dense = 4 * np.einsum("n,ncd,nce->de", weights, jacobian, jacobian)
    for structure in (STRUCTURES[0], STRUCTURES[2]):
        chunked = ff.estimators.exact(ROLL, LIKELIHOOD, structure, chunk_size=4)
        found = ff.information.to_dense(chunked(PARAMS, batch), PARAMS)
        expected = jax.jit(
            lambda of=structure: ff.information.to_dense(
                of.from_matvec(lambda v: unravel(dense @ ravel_pytree(v)[0]), PARAMS),
                PARAMS,
            )
        )()
        np.testing.assert_allclose(found, expected, 1e-10, 1e-10)
    scores = 4 * np.einsum("nc,ncd->nd", Y - np.asarray(run(flat)), jacobian)
    empirical = ff.estimators.empirical(ROLL, LIKELIHOOD, STRUCTURES[0])
    found = ff.information.to_dense(empirical(PARAMS, batch), PARAMS)
    np.testing.assert_allclose(found, (scores.T * weights) @ scores, 1e-10)


def test_what_cuts_a_batch_is_refused_by_name():
    batch, key = (X, Y), 0
    equinox = MODELS["equinox"].apply_fn
    hutchinson = functools.partial(
        ff.estimators.hutchinson, equinox, LIKELIHOOD, ff.structures.diagonal()
    )
    hutchinson()(PARAMS, batch, key)  # groups=1: one pass of the batch
    refused = {
        "groups must be None or 1": lambda: hutchinson(groups=2)(PARAMS, batch, key),
        "chunk_size must be None": lambda: hutchinson(chunk_size=2)(PARAMS, batch, key),
        "chunk_size=2 would cut": lambda: ff.estimators.observed(
            equinox, LIKELIHOOD, ff.structures.full(), chunk_size=2
        )(PARAMS, batch),
        "no row has a score.*batched=True, of ff.layers.find_layers and of est": (
            lambda: ff.scores(equinox, LIKELIHOOD, PARAMS, batch)
        ),
    }
    state = ff.posterior(
        PARAMS, ff.structures.Scalar(jnp.ones(())), prior_precision=1.0
    )
    for interacting in (equinox, ROLL):
        end = "" if interacting is ROLL else ":"
        refused |= {
            f"predicted as it is alone .one row is x.None..{end}": (
                lambda f=interacting: ff.predict(state, f, LIKELIHOOD, X)
            ),
        }
    layers = ff.layers.find_layers(equinox, PARAMS, X)
    refused["robust=True keeps"] = lambda: ff.fisher_flow(
        equinox, LIKELIHOOD, structure=ff.structures.diagonal(layers), robust=True
    )
    refused["alone .one row is x.None..: give a model"] = lambda: ff.predictions.joint(
        state, equinox, X
    )
    for match, call in refused.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_the_batch_as_one_example_is_the_way_out():
    def one(params, inputs):
        return ROLL(params, inputs[0])[None]

    state = ff.posterior(
        PARAMS, ff.structures.Scalar(jnp.ones(())), prior_precision=1.0
    )
    outputs = ff.predictions.linearized_outputs(state, one, X[None])
    variance = np.einsum("ncd->nc", of_jacobian("roll")[0] ** 2) / 2
    np.testing.assert_allclose(outputs.variance[0], variance, 1e-10)


def fresh():
    """A function of its own, of which nothing is known."""
    return lambda p, x: ROLL(p, x)


def test_a_trace_asks_for_batched():
    """Until it is said, or values that were at hand have told."""

    def traced(apply_fn, **options):
        full = ff.structures.full()
        estimator = ff.estimators.exact(apply_fn, LIKELIHOOD, full, **options)
        information = jax.jit(lambda x: estimator(PARAMS, (x, None)))(X)
        return ff.information.to_dense(information, PARAMS)

    with pytest.raises(ValueError, match=r"through slice.*batched=True"):
        traced(fresh())
    np.testing.assert_allclose(traced(fresh(), batched=True), fisher("roll"), 1e-10)
    single = fisher("roll") - traced(fresh(), batched=False)
    assert np.abs(single).max() > 1  # as it was asked
    told = fresh()
    with pytest.raises(AssertionError, match="6 of 6 rows"):
        ff.testing.check_examples(told, PARAMS, X)
    np.testing.assert_allclose(traced(told), fisher("roll"), 1e-10)


@pytest.mark.slow
def test_flows_ask_values_once():
    calls = []

    def counted(params, x):
        calls.append(None)
        return ROLL(params, x)

    flow = ff.fisher_flow(counted, LIKELIHOOD, robust=True)
    state, _ = flow.update(flow.init(PARAMS), (X, Y))
    first = len(calls)
    state, _ = flow.update(state, (X, Y))
    assert len(calls) == first  # and nothing is traced again
    assert ff.information.trace(state.meat, PARAMS) > 0

    stack = (X[None], Y[None])
    known, _ = jax.lax.scan(flow.update, flow.init(PARAMS), stack)
    assert known.num_skipped == 0
    other = ff.fisher_flow(fresh(), LIKELIHOOD)
    with pytest.raises(ValueError, match="batched"):
        jax.lax.scan(other.update, other.init(PARAMS), stack)


def test_one_example_gives_one_row():
    graph = MODELS["graph, segments"].apply_fn
    exact = functools.partial(ff.estimators.exact, structure=ff.structures.full())
    estimator = exact(graph, LIKELIHOOD, batched=False)
    with pytest.raises(ValueError, match=r"\(6, 2\), not one row.*batched=True"):
        estimator(PARAMS, (X, None))

    def sized(params, x):
        return x.reshape(COUNT, 4) @ params["w"]

    with pytest.raises(TypeError, match=r"(?s)reshape.*batched=True"):
        exact(sized, LIKELIHOOD)(PARAMS, (X, None))
    with pytest.raises(TypeError, match=r"(?s)reshape.*batched=True"):
        ff.layers.find_layers(sized, PARAMS, X)


def test_what_was_said_agrees_with_the_layers():
    alone = ff.layers.find_layers(ROLL, PARAMS, X, batched=False)
    diagonal = ff.structures.diagonal(alone)
    with pytest.raises(ValueError, match=r"single examples, and .* batched=True"):
        ff.estimators.exact(ROLL, LIKELIHOOD, diagonal, batched=True)
    # layers of single examples by request are an answer too
    by_row = ff.estimators.exact(fresh(), LIKELIHOOD, diagonal)(PARAMS, (X, None))
    asked = ff.estimators.exact(
        fresh(), LIKELIHOOD, ff.structures.diagonal(), batched=False
    )
    np.testing.assert_allclose(
        ravel_pytree(by_row)[0], ravel_pytree(asked(PARAMS, (X, None)))[0], 1e-10
    )
