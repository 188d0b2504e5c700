"""Effects of removing rows, by the dense Newton step of explicit Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS
from program_size import largest

CATEGORICAL = ff.likelihoods.categorical()


def state_of(name, structure):
    """With a multiple of the information, so that no leverage is near one."""
    state = cases.state(name, structure)
    factor = 400.0 if name == "tokens" else 3.0
    return state._replace(information=ff.information.scale(state.information, factor))


def batch_of(name, seed):
    """Labels for each position; weights of rows, or of tokens; a row of weight zero."""
    model, rng = MODELS[name], np.random.default_rng(seed)
    shape = cases.jacobian(name).shape[:-1]
    targets = rng.integers(0, shape[-1], shape[:-1])
    weights = rng.uniform(0.5, 2.0, shape[:-1])
    weights[1] = 0.0
    return model.inputs, jnp.asarray(targets), jnp.asarray(weights)


class Reference:
    """Gradients of losses, Fisher informations of rows and Newton steps, in numpy."""

    def __init__(self, name, state, batch):
        model, (_, targets, weights) = MODELS[name], map(np.asarray, batch)
        jacobian = cases.jacobian(name)  # (n, ..., k, d)
        logits = np.asarray(model.apply_fn(model.params, model.inputs))
        count, classes = len(logits), logits.shape[-1]
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        each = (count, -1, classes)
        jacobian = jacobian.reshape((*each, jacobian.shape[-1]))
        chances = chances.reshape(each)
        residuals = chances - np.eye(classes)[targets.reshape((count, -1))]
        weights = np.broadcast_to(weights.reshape((count, -1)), chances.shape[:2])
        self.gradients = np.einsum("nt,ntk,ntkd->nd", weights, residuals, jacobian)
        fisher = chances[..., None] * (np.eye(classes) - chances[..., None, :])
        fisher = fisher * weights[..., None, None]
        blocks = np.einsum("ntkd,ntkl,ntle->nde", jacobian, fisher, jacobian)
        dense = jax.jit(ff.information.to_dense)(state.information, state.mean)
        information = np.asarray(dense)
        self.first = np.linalg.solve(information, self.gradients.T).T
        gradients = self.gradients[..., None]
        self.steps = np.linalg.solve(information - blocks, gradients)[..., 0]
        shares = np.linalg.solve(information, blocks)
        self.leverages = np.trace(shares, axis1=1, axis2=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("mlp", "full"),
        ("mlp", "eigen"),
        ("linear", "low_rank"),
        ("conv", "kronecker"),
        ("tokens", "eigen"),
        ("linear", "scalar"),
    ],
)
def test_newton_steps_by_the_jacobian(name, structure):
    model, state = MODELS[name], state_of(name, structure)
    batch, queries = batch_of(name, 0), batch_of(name, 1)

    @jax.jit
    def found(state, batch, queries):
        own = state, model.apply_fn, CATEGORICAL, batch
        influence = ff.influence
        return (
            influence.effects(*own, queries, first_order=False, chunk_size=2),
            influence.effects(*own, queries, first_order=True),
            influence.self_influence(*own, first_order=False),
            influence.leverage(*own),
            influence.leave_one_out(*own),
        )

    effects, first, own, leverage, left_out = found(state, batch, queries)
    expected = Reference(name, state, batch)
    asked = Reference(name, state, queries).gradients
    close = {"rtol": 1e-12, "atol": 1e-12 * np.abs(asked @ expected.steps.T).max()}
    assert expected.leverages.max() > 0.01
    np.testing.assert_allclose(effects, asked @ expected.steps.T, **close)
    np.testing.assert_allclose(first, asked @ expected.first.T, **close)
    diagonal = np.einsum("nd,nd->n", expected.gradients, expected.steps)
    np.testing.assert_allclose(own, diagonal, **close)
    np.testing.assert_allclose(leverage, expected.leverages, rtol=1e-12)
    np.testing.assert_allclose(left_out.leverage, expected.leverages, rtol=1e-12)
    jacobian = cases.jacobian(name)
    moved = np.einsum("n...d,nd->n...", jacobian, expected.steps)
    outputs = np.asarray(model.apply_fn(model.params, model.inputs)) + moved
    outputs[1] = 0  # of a row that is padding
    np.testing.assert_allclose(left_out.outputs, outputs, rtol=1e-11, atol=1e-11)
    log_prob = CATEGORICAL.log_prob(jnp.asarray(outputs), batch[1])
    log_prob = (batch[2] * log_prob).reshape((len(outputs), -1)).sum(1)
    np.testing.assert_allclose(left_out.log_prob, log_prob, rtol=1e-11)
    assert effects[1].tolist() == effects[:, 1].tolist() == [0.0] * len(outputs)


def test_no_gradient_of_a_kernel():
    """Of a wide network with Kronecker factors: what enters and returns, and I O."""
    params = {"w": jnp.zeros((30, 40)), "v": jnp.zeros((40, 2))}

    def apply_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    rows, queries = (
        (jnp.ones((16, 30)), jnp.zeros(16, int)),
        (jnp.ones((8, 30)), jnp.zeros(8, int)),
    )
    layers = ff.layers.find_layers(apply_fn, params, rows[0])
    state = ff.posterior(params, ff.structures.kronecker(layers), prior_precision=1.0)
    program = jax.make_jaxpr(
        lambda state: ff.influence.effects(state, apply_fn, CATEGORICAL, rows, queries)
    )(state)
    assert largest(program.jaxpr) <= 40 * 40 < 8 * 30 * 40


# ---- queries, contrasts and streams, on one small model


@pytest.fixture(scope="module")
def small():
    """A model, its state, rows, queries, and all effects."""
    model, state = MODELS["linear"], state_of("linear", "full")
    inputs, targets, weights = batch_of("linear", 0)
    queries = batch_of("linear", 1)[:2]
    own = state, model.apply_fn, CATEGORICAL
    rows = inputs, targets, weights
    return own, rows, queries, ff.influence.effects(*own, rows, queries)


@pytest.mark.slow
def test_loaders_of_ragged_batches_are_one_batch(small):
    own, rows, queries, expected = small
    cut = [
        [tuple(x[i : i + 4] for x in part) for i in (0, 4)] for part in (rows, queries)
    ]
    found = ff.influence.effects(*own, *cut, chunk_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    dicts = [{"x": x, "y": y, "w": w} for x, y, w in cut[0]]
    found = ff.influence.leave_one_out(
        *own, dicts, to_batch=lambda one: (one["x"], one["y"], one["w"]), progress=False
    )
    whole = ff.influence.leave_one_out(*own, rows)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), found, whole
    )


def test_the_rows_that_matter_most_from_a_stream(small):
    own, rows, queries, expected = small
    batches = [tuple(x[i : i + 2] for x in rows) for i in (0, 2, 4)]
    found = ff.influence.effects(*own, batches[:2], queries, top=3)
    found = ff.influence.effects(*own, batches[2:], queries, top=3, earlier=found)
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_array_equal(found.indices, order[:, :3])
    np.testing.assert_array_equal(found.lowest_indices, order[:, ::-1][:, :3])
    values = np.take_along_axis(np.asarray(expected), order, 1)
    np.testing.assert_allclose(found.values, values[:, :3], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        found.lowest_values, values[:, ::-1][:, :3], rtol=1e-12, atol=1e-15
    )
    assert int(found.num_rows) == 6
    few = ff.influence.effects(*own, rows, queries, top=100)
    assert few.values.shape == (6, 6)  # no more than there are


@pytest.mark.slow
def test_functions_of_outputs_and_contrasts(small):
    own, rows, (inputs, _), _ = small
    steps = Reference("linear", own[0], rows).steps
    jacobian = cases.jacobian("linear")

    def margin(outputs):
        return outputs[0] - outputs[2]

    found = ff.influence.effects(*own, rows, (inputs, None), on=margin)
    expected = (jacobian[:, 0] - jacobian[:, 2]) @ steps.T
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)
    mean = own[0].mean
    units = jax.vmap(lambda e: ff._ground.trees.unravel(e, mean))(jnp.eye(15))
    found = ff.influence.effects(*own, rows, on=units)
    np.testing.assert_allclose(found, steps.T, rtol=1e-11, atol=1e-14)
    one = jax.tree.map(lambda x: x[4], units)
    found = ff.influence.effects(*own, rows, on=one)
    np.testing.assert_allclose(found, steps.T[4:5], rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_contrasts_through_layers():
    """Their products with what enters and returns to layers."""
    model, state = MODELS["tokens"], state_of("tokens", "eigen")
    batch = batch_of("tokens", 0)
    contrast = jax.tree.map(
        lambda x: jnp.sin(jnp.arange(x.size).reshape(x.shape)), state.mean
    )
    found = ff.influence.effects(state, model.apply_fn, CATEGORICAL, batch, on=contrast)
    steps = Reference("tokens", state, batch).first
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(contrast)])
    np.testing.assert_allclose(found[0], steps @ flat, rtol=1e-11)


@pytest.mark.slow
def test_queries_of_another_length_than_rows():
    """Of one position: what their kernels are given is not what rows' are."""
    model, state = MODELS["tokens"], state_of("tokens", "eigen")
    inputs, targets, weights = batch_of("tokens", 0)
    short = inputs[:, :1], targets[:, :1]
    own = state, model.apply_fn, CATEGORICAL
    found = ff.influence.effects(*own, (inputs, targets, weights), short)
    turned = ff.influence.effects(*own, short, (inputs, targets))
    steps = Reference("tokens", state, (inputs, targets, weights)).first
    gradients = ff.scores(*own[1:], state.mean, short)
    flat = -np.concatenate(
        [np.reshape(x, (3, -1)) for x in jax.tree.leaves(gradients)], 1
    )
    np.testing.assert_allclose(found, flat @ steps.T, rtol=1e-11, atol=1e-14)
    first = Reference("tokens", state, (inputs, targets, jnp.ones(3))).first
    np.testing.assert_allclose(turned, first @ flat.T, rtol=1e-11, atol=1e-14)
