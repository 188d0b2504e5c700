"""What is known of a model that grows stays, beside a prior of what is new."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff

extend, ops = ff.continual.extend, ff.information
RNG = np.random.default_rng(3)
both_dense = jax.jit(lambda x, like: [*map(ops.to_dense, x, like)])


def draw(*shape):
    return np.asarray(RNG.normal(size=shape))


def network(inputs, outputs, width=4, **more):
    first = {"w": draw(inputs, width), "b": draw(width)}
    head = {"w": draw(width, outputs), "b": draw(outputs)}
    return {"first": first, "gain": draw(), "head": head} | more


def features(params, x):
    first = params["first"]
    return params["gain"] * jnp.tanh(x @ first["w"] + first["b"])


def apply_fn(params, x):
    heads = [params[name] for name in ("head", "other") if name in params]
    hidden = features(params, x)
    outputs = [hidden @ head["w"] + head["b"] for head in heads]
    return jnp.concatenate(outputs, 1)


def names(tree):
    return dict(ff._ground.trees.named_leaves(tree))


def former_places(old, new):
    """Of each entry of `old` in ravelled order, its place in `new`."""
    ends = np.cumsum([x.size for x in jax.tree.leaves(new)])
    numbers = {
        name: np.arange(end - x.size, end).reshape(x.shape)
        for end, (name, x) in zip(ends, names(new).items(), strict=True)
    }
    corners = (
        numbers[name][tuple(map(slice, x.shape))] for name, x in names(old).items()
    )
    return np.concatenate([x.ravel() for x in corners])


def check(old_state, found, new, precision):
    """The old matrix and mean at their places, and nothing but the prior elsewhere."""
    places = former_places(old_state.mean, new)
    expected = precision * np.eye(sum(x.size for x in jax.tree.leaves(new)))
    expected[np.ix_(places, places)], dense = both_dense(
        (old_state.information, found.information), (old_state.mean, new)
    )
    np.testing.assert_allclose(dense, expected, rtol=1e-12, atol=1e-12)
    flat, old = (
        np.concatenate([*map(np.ravel, jax.tree.leaves(x))])
        for x in (found.mean, old_state.mean)
    )
    start = np.concatenate([*map(np.ravel, jax.tree.leaves(new))])
    start[places] = old
    np.testing.assert_array_equal(flat, start)


STRUCTURES = {
    "scalar": ff.structures.scalar(),
    "diagonal": ff.structures.diagonal(),
    "units": ff.structures.block(),
    "block": ff.structures.block(lambda name: name[0]),
    "full": ff.structures.full(),
    "low_rank": ff.structures.low_rank(2),
}
OLD, NEW = network(3, 2), network(5, 4, other={"w": draw(2, 3), "b": draw(3)})


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", STRUCTURES)
def test_what_was_known_stays_exactly(name):
    structure = STRUCTURES[name]
    stack = jax.tree.map(lambda x: draw(5, *x.shape), OLD)
    given = structure if name == "block" else None

    @jax.jit
    def grown(stack):
        state = ff.posterior(OLD, structure.reduce(stack), prior_precision=0.7)
        found = extend(state, NEW, prior_precision=2.0, structure=given)
        return state, found, ops.to_dense(found.prior_precision, NEW)

    state, found, prior = grown(stack)
    check(state, found, NEW, 2.0)
    kind = type(found.information)
    assert kind is (ff.structures.Diagonal if name == "scalar" else type(state[1]))
    # the prior, which a decay keeps, has grown with it
    places = former_places(OLD, NEW)
    expected = np.full(len(prior), 2.0)
    expected[places] = 0.7
    np.testing.assert_array_equal(prior, np.diag(expected))


WIDE = network(4, 2)


def kronecker(params):
    inputs = params["first"]["w"].shape[0]
    layers = ff.layers.find_layers(apply_fn, params, jnp.ones((2, inputs)))
    return ff.structures.kronecker(layers)


def measure(params, structure, x):
    likelihood = ff.likelihoods.categorical()
    estimator = ff.estimators.exact(apply_fn, likelihood, structure)
    return jax.jit(estimator)(params, (x, None))


def known(params, temperature=1.0):
    information = measure(params, kronecker(params), draw(6, 4))
    return ff.posterior(
        params, information, prior_precision=0.5, temperature=temperature
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("temperature, sizes", [(2.0, (4, 4, 4)), (1.0, (5, 2, 6))])
def test_kronecker_factors_grow_with_their_side(temperature, sizes):
    state = known(WIDE, temperature)
    new = network(*sizes)
    structure = kronecker(new)
    found = extend(state, new, prior_precision=0.5, structure=structure)
    check(state, found, new, 0.5 / temperature)
    assert found.prior_precision == state.prior_precision
    assert found.information.layers == structure.layers
    # with as many classes as hidden units the two layers are alike
    old, now = (x.information.output_factors for x in (state, found))
    assert len(old) == 2
    assert len(now) == (1 if sizes[0] == sizes[1] else 2)


@pytest.mark.slow
def test_a_new_layer_has_a_prior_of_its_own():
    state = known(WIDE)
    new = WIDE | {"other": {"w": draw(4, 3), "b": draw(3)}}
    structure = kronecker(new)
    found = extend(state, new, prior_precision=7.0, structure=structure)
    check(state, found, new, 7.0)
    with pytest.raises(
        ValueError, match=r"of head.w is 0.5, and new entries .* \[7.\]"
    ):
        wider = network(4, 3)
        extend(state, wider, prior_precision=7.0, structure=kronecker(wider))
    with pytest.raises(ValueError, match=r"give structure=ff\.structures\.kronecker"):
        extend(state, new, prior_precision=7.0)
    with pytest.raises(ValueError, match="must be known before tracing"):
        jax.jit(lambda p: extend(state, new, prior_precision=p, structure=structure))(
            7.0
        )


@pytest.mark.slow
def test_classes_that_appear_are_held_by_a_penalty_that_is_not_zero():
    """A head that grows, and one compiled program a shape."""
    loss = ff.negative_log_likelihood(apply_fn, ff.likelihoods.categorical())
    optimizer = optax.chain(
        ff.continual.add_elastic_penalty(12, strength=3.0), optax.adam(0.05)
    )

    @jax.jit
    def train(params, anchor, batch):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(loss)(params, batch)
            updates, state = optimizer.update(gradient, state, params, anchor=anchor)
            return (optax.apply_updates(params, updates), state), None

        end = jax.lax.scan(step, (params, optimizer.init(params)), None, 20)[0][0]
        return end, ff.continual.elastic_penalty(anchor, end, num_observations=12)

    params = network(4, 2)
    information = measure(params, kronecker(params), draw(12, 4))  # of the first task
    belief, penalties = ff.posterior(params, information, prior_precision=0.1), []
    for classes in (4, 6):
        params = network(4, classes)
        structure = kronecker(params)
        belief = extend(belief, params, prior_precision=0.1, structure=structure)
        batch = draw(12, 4), classes - 2 + RNG.integers(0, 2, 12)
        params, penalty = train(belief.mean, belief, batch)
        penalties.append(float(penalty))
        information = measure(params, structure, batch[0])
        belief = ff.continual.consolidate(belief, params, information)
    assert min(penalties) > 1e-3


def test_a_flows_state_and_a_flow_of_the_grown_model():
    model = lambda params, x: x @ params["w"], ff.likelihoods.gaussian(0.5)
    flow = ff.fisher_flow(*model, prior_precision=0.3, num_steps=1)
    x, y, more = draw(8, 2), draw(8), draw(8, 3)
    state, _ = flow.update(flow.init({"w": jnp.zeros(2)}), (x, y))
    found = extend(state, {"w": jnp.zeros(3)}, prior_precision=0.3)
    check(state, found, {"w": jnp.zeros(3)}, 0.3)
    grown = ff.fisher_flow(*model, prior_precision=found.information, num_steps=1)
    after, _ = grown.update(grown.init(found.mean), (more, y))
    # as if the rows before had had a zero there
    rows = np.concatenate([np.pad(x, [(0, 0), (0, 1)]), more])
    matrix = 4 * rows.T @ rows + 0.3 * np.eye(3)
    np.testing.assert_allclose(ops.to_dense(after.information), matrix, rtol=1e-9)
    mean = np.linalg.solve(matrix, 4 * rows.T @ np.concatenate([y, y]))
    np.testing.assert_allclose(after.mean["w"], mean, rtol=1e-9)


def test_types_of_the_parameters():
    state = ff.posterior(
        {"w": jnp.ones(2, jnp.bfloat16)}, ff.structures.full(), prior_precision=1.0
    )
    for dtype, kept in ((jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.float32)):
        new = {"w": jnp.zeros(3, dtype), "empty": jnp.zeros((0, 2), dtype)}
        found = extend(state, new, prior_precision=2.0)
        assert found.mean["w"].dtype == kept
        assert found.information.rows["w"].dtype == jnp.float32
        np.testing.assert_array_equal(ops.diagonal(found.information)["w"], [1, 1, 2])


def test_what_is_refused():
    state = ff.posterior(OLD, ff.structures.diagonal(), prior_precision=1.0)
    with pytest.raises(ValueError, match="params lack gain, of which"):
        extend(state, {k: OLD[k] for k in ("first", "head")}, prior_precision=1.0)
    with pytest.raises(
        ValueError, match=r"head.b has shape \(1,\), .* former .*\(2,\)"
    ):
        extend(state, network(3, 1), prior_precision=1.0)
    with pytest.raises(ValueError, match=r"gain has shape \(1,\)"):
        extend(state, OLD | {"gain": jnp.ones(1)}, prior_precision=1.0)
    with pytest.raises(ValueError, match="prior_precision must be positive and finite"):
        extend(state, OLD, prior_precision=0.0)
    with pytest.raises(
        ValueError, match="a number, or a pytree prefix of numbers; got"
    ):
        extend(state, OLD, prior_precision=ff.structures.full().isotropic(OLD, 1.0))
    with pytest.raises(TypeError, match="mixture"):
        extend([state, state], OLD, prior_precision=1.0)
    scalar = ff.posterior(OLD, ff.structures.scalar(), prior_precision=1.0)
    with pytest.raises(ValueError, match=r"scalar\(\) cannot hold .* takes a Diagonal"):
        extend(scalar, NEW, prior_precision=1.0, structure=ff.structures.scalar())
    parted = ff.posterior(
        OLD, ff.structures.block(lambda name: "all"), prior_precision=1.0
    )

    def shapes(state, structure=None):
        grown = functools.partial(extend, prior_precision=1.0, structure=structure)
        return jax.eval_shape(grown, state, NEW)

    with pytest.raises(ValueError, match=r"which block other\.b, other\.w"):
        shapes(parted)
    with pytest.raises(ValueError, match=r"gain and first\.b.* parts them: keep"):
        shapes(parted, ff.structures.block(lambda name: name[:3]))
    with pytest.raises(TypeError, match="structure comes from a call such as"):
        extend(state, NEW, prior_precision=1.0, structure=ff.structures.full)
