"""What K-FAC and EK-FAC say of input that does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from together import together

PARAMS = cases.network_params()
BATCH = cases.NETWORK_BATCH
LAYERS = ff.layers.find_layers(cases.network, PARAMS, BATCH[0])
GRADIENT = jax.tree.map(jnp.ones_like, PARAMS)
KINDS = {"K-FAC": {}, "EK-FAC": {"eigenvalue_correction": True}}
PARTS = {name: x for name, x in PARAMS.items() if name != "out"}


def optimizer(kind="K-FAC", **options):
    return ff.kfac(0.1, *cases.MODEL, LAYERS, **({"key": 0} | KINDS[kind] | options))


def update(kind="K-FAC", *, updates=GRADIENT, params=PARAMS, **extra):
    transformation = optimizer(kind)
    state = jax.eval_shape(transformation.init, PARAMS)
    return jax.eval_shape(
        functools.partial(transformation.update, **extra), updates, state, params
    )


@together
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "estimators.monte_carlo needs the batch: call update"),
        (
            {"batch": (np.ones((4, 3), np.float32), None)},
            ValueError,
            r"shape \(3,\) an example, .* found for inputs of shape \(2,\); the "
            r"first layer is w, dense, of 2 inputs .* \(2, 4\)\. It says: ",
        ),
        (
            {"batch": (np.ones(4, np.float32), None)},
            ValueError,
            r"inputs of shape \(\) an example, .* of shape \(2,\); the first layer",
        ),
        ({"batch": BATCH, "updates": PARTS}, ValueError, "must be one tree; at "),
        (
            {"batch": BATCH, "params": {**PARTS, "head": PARAMS["out"]}},
            ValueError,
            r"must be one tree; at head",
        ),
        (
            {
                "batch": BATCH,
                "params": {**PARTS, "out": jnp.ones((4, 2))},
                "updates": {**PARTS, "out": jnp.ones((4, 2))},
            },
            ValueError,
            r"leaf out has shape \(4, 2\), and the layers .* it has \(4, 3\)",
        ),
    ],
)
def test_updates_that_do_not_fit(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        update(kind, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_other_parameters_than_the_layers(kind):
    with pytest.raises(ValueError, match=r"leaf head is not like the parameters"):
        optimizer(kind).init({**PARTS, "head": PARAMS["out"]})
    with pytest.raises(ValueError, match=r"leaf out has shape \(5, 3\)"):
        optimizer(kind).init({**PARTS, "out": jnp.ones((5, 3))})


def test_a_model_whose_layers_are_others():
    def turned(params, x):
        return cases.network({**params, "w": jnp.sin(params["w"])}, x)

    transformation = ff.kfac(0.1, turned, cases.MODEL[1], LAYERS, key=0)
    state = jax.eval_shape(transformation.init, PARAMS)
    with pytest.raises(ValueError, match="whole vectors of w:"):
        jax.eval_shape(
            functools.partial(transformation.update, batch=BATCH),
            GRADIENT,
            state,
            PARAMS,
        )


@pytest.mark.parametrize("found", [{"inputs": BATCH[0]}, {"layers": LAYERS}])
def test_a_state_may_be_asked_for_by_shape_first(found):
    made = ff.kfac(0.1, *cases.MODEL, **found, key=0)
    shapes = jax.eval_shape(made.init, PARAMS)
    state = made.init(PARAMS)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)


def test_inputs_without_their_axis_of_examples():
    optimizer = ff.kfac(0.1, *cases.MODEL, inputs=BATCH[0][0], key=0)
    with pytest.raises(
        ValueError,
        match=r"need a leading axis of examples.* \[\(2,\)\], 2 examples, .*of shape "
        r"\(3,\)\. One is inputs\[None\]",
    ):
        optimizer.init(PARAMS)


@pytest.mark.parametrize("inputs", [jnp.ones(2), {"x": jnp.ones(2), "s": ff.Shared(0)}])
def test_a_model_that_fails_without_the_axis_of_examples(inputs):
    def mapped(params, x):
        rows = x["x"] if isinstance(x, dict) else x
        return jax.vmap(lambda row: cases.network(params, row[None])[0])(rows)

    with pytest.raises(
        TypeError, match=r"(?s)shapes .*\(2,\).* raised: .*axis.* alone is inputs\[None"
    ):
        ff.layers.find_layers(mapped, PARAMS, inputs)


def test_inputs_whose_first_axis_was_taken_for_examples():
    def attention(params, x):
        return jnp.tanh(x @ params @ jnp.swapaxes(x, -1, -2)) @ x

    steps, params = np.ones((4, 5, 2), np.float32), jnp.ones((2, 2))
    layers = ff.layers.find_layers(attention, params, steps[0])
    with pytest.raises(
        ValueError,
        match=r"found for inputs of shape \(5, 2\), which is one example of these: "
        r".* one alone is inputs\[None\]",
    ):
        ff.layers.tap(attention, layers, params, steps[:1])


def refusing_other_shapes(params, x):
    if x.shape[1] != 2:
        raise AssertionError("two columns")
    return cases.network(params, x)


def test_a_model_may_refuse_its_inputs_with_any_error():
    estimator = ff.estimators.exact(
        refusing_other_shapes, cases.MODEL[1], ff.structures.kronecker(LAYERS)
    )
    with pytest.raises(ValueError, match=r"found for .* \(2,\); .* says: two columns"):
        estimator(PARAMS, (np.ones((4, 3), np.float32), None))
    with pytest.raises(ValueError, match=r"found for .* \(2,\); .* says: two columns"):
        ff.layers.tap(refusing_other_shapes, LAYERS, PARAMS, np.ones((1, 3)))
    # of inputs like those of the layers the model's own error says enough
    with pytest.raises(ZeroDivisionError):
        ff.layers.tap(lambda params, x: 1 / 0, LAYERS, PARAMS, np.ones((1, 2)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (cases.network, cases.MODEL[1], str(LAYERS)),
            {},
            "layers is what .* got .par",
        ),
        (
            (*reversed(cases.MODEL), LAYERS),
            {},
            r"apply_fn is a function .* got categorical\(\)",
        ),
        (
            (cases.network, ff.likelihoods.categorical, LAYERS),
            {},
            r"got ff.likelihoods.categorical itself",
        ),
        (
            (*cases.MODEL, LAYERS),
            {"estimator": cases.diagonal_estimator()},
            "estimators.exact is bound to another structure, .*diagonal",
        ),
    ],
)
def test_what_is_no_model(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ff.kfac(0.1, *arguments, key=0, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_damping(kind):
    with pytest.raises(ValueError, match=r"damping must be finite .* got -0\.1"):
        optimizer(kind, damping=-0.1)


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_is_survived_and_counted(kind):
    transformation = optimizer(kind, momentum=None)

    @jax.jit
    def step(state, inputs):
        return transformation.update(GRADIENT, state, PARAMS, batch=(inputs, BATCH[1]))

    start = transformation.init(PARAMS)
    broken = BATCH[0].copy()
    broken[3, 1] = 1e30  # its square is beyond float32
    for state in (start, step(start, BATCH[0])[1]):
        updates, after = step(state, broken)
        assert not np.any(cases.flat(updates))
        skipped = after[0].num_skipped
        assert skipped == 1
        kept = after[0]._replace(num_skipped=state[0].num_skipped)
        jax.tree.map(np.testing.assert_array_equal, kept, state[0])
        again, _ = step(after, BATCH[0])
        assert np.all(np.isfinite(cases.flat(again))) and np.any(cases.flat(again))


@together
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, r"decay must be in .* got 1\.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1\.0"),
        ({"max_kl": 0.0}, r"max_kl is one positive number; got 0\.0"),
        ({"period": 0}, "period must be a positive whole number of steps; got 0"),
        ({"inverse_period": 2.5}, r"inverse_period must be a positive .* got 2\.5"),
        ({"spread_inverses": 1}, "spread_inverses is True or False; got 1"),
        ({"eigenvalue_correction": "yes"}, "eigenvalue_correction is .* got 'yes'"),
        ({"widest": -1}, "widest must be a whole number of units, .* got -1"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite .* got -0\.1"),
        ({"factorise": "factored"}, "factorise is a function .* got 'factored'"),
        ({"estimator": "exact"}, "estimator .* got 'exact'"),
        ({"key": 1.5}, "key must be an int, .* got an array of float"),
        ({"bad_rows": "keep"}, "bad_rows is .* got 'keep'"),
    ],
)
def test_every_option_is_checked_when_built(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer(**options)
