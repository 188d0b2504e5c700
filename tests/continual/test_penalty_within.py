"""A penalty's curvature, told to what divides gradients by curvature."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff

continual = ff.continual
RNG = np.random.default_rng(5)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def linear(params, x):
    return x @ params["w"] + params["b"]


# with one output the Kronecker product is the information itself
MODEL = linear, ff.likelihoods.gaussian()
PARAMS, CENTRE = ({"w": draw(3, 1), "b": draw(1)} for _ in range(2))
BATCH, PAST = (draw(8, 3), draw(8, 1)), draw(20, 3)
LAYERS = ff.layers.find_layers(linear, PARAMS, PAST)
LOSS = ff.negative_log_likelihood(*MODEL)
NEWTON = {
    "estimator": ff.estimators.exact,
    "damping": 0.0,
    "max_kl": None,
    "momentum": None,
    "factorise": ff.transforms.factorise,
}
kfac = functools.partial(ff.kfac, 1.0, *MODEL, LAYERS, **NEWTON)


@functools.cache
def anchor(structure="kronecker"):
    kinds = {"kronecker": ff.structures.kronecker(LAYERS)}
    kinds |= {"full": ff.structures.full(), "diagonal": ff.structures.diagonal()}
    estimator = ff.estimators.exact(*MODEL, kinds[structure])

    @jax.jit
    def run(centre):
        information = estimator(PARAMS, (PAST, None))
        return ff.posterior(centre, information, prior_precision=0.3)

    return run(CENTRE)


def newton_step(strength):
    """The least of loss and penalty, by dense matrices in numpy."""
    rows, past = (np.column_stack([np.ones(len(x)), x]) for x in (BATCH[0], PAST))
    held = strength / 8 * (past.T @ past + 0.3 * np.eye(4))
    centre = np.concatenate([CENTRE["b"], CENTRE["w"][:, 0]])
    shift = rows.T @ BATCH[1][:, 0] / 8 + held @ centre
    return np.linalg.solve(rows.T @ rows / 8 + held, shift)


def step(optimizer, state):
    gradient = jax.grad(LOSS)(PARAMS, BATCH)
    updates, _ = optimizer.update(
        gradient, optimizer.init(PARAMS), PARAMS, batch=BATCH, anchor=state
    )
    return optax.apply_updates(PARAMS, updates)


@pytest.mark.parametrize("strength, max_kl", [(1.0, 1e9), (1e4, None)])
def test_one_step_is_newtons_of_loss_and_penalty(strength, max_kl):
    optimizer = continual.add_elastic_penalty(
        8, strength=strength, inner=kfac(max_kl=max_kl)
    )
    found = jax.jit(functools.partial(step, optimizer))(anchor())
    flat = np.concatenate([found["b"], found["w"][:, 0]])
    np.testing.assert_allclose(flat, newton_step(strength), rtol=1e-9)


def test_other_structures_of_the_preconditioner():
    estimator = ff.estimators.exact(*MODEL, ff.structures.full())
    inner = ff.natural_gradient(1.0, estimator, damping=0.0)
    optimizer = continual.add_elastic_penalty(8, strength=3.0, inner=inner)
    for kind in ("full", "diagonal"):  # which a matrix can hold, too

        @jax.jit
        def slope(state):
            def objective(params):
                numbers = {"num_observations": 8, "strength": 3.0}
                penalty = continual.elastic_penalty(state, params, **numbers)
                return LOSS(params, BATCH) + penalty

            return jax.grad(objective)(step(optimizer, state))

        chex.assert_trees_all_close(
            slope(anchor(kind)), optax.tree.zeros_like(PARAMS), atol=1e-12
        )


@pytest.mark.slow
def test_a_stiff_penalty_needs_no_damping_of_its_own():
    """A network: without the penalty's curvature steps overshoot it."""

    def network(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    model = network, ff.likelihoods.categorical()
    x, first, second = draw(64, 4), RNG.integers(0, 3, 64), RNG.integers(0, 3, 64)
    params = {"w": draw(4, 6) / 2, "v": draw(6, 3) / 2}
    layers = ff.layers.find_layers(network, params, x)
    estimator = ff.estimators.exact(*model, ff.structures.kronecker(layers))
    information = jax.jit(estimator)(params, (x, first))
    state = ff.posterior(params, information, prior_precision=0.1)
    optimizer = ff.kfac(
        0.5, *model, layers, estimator=ff.estimators.exact, max_kl=None, momentum=None
    )
    loss = ff.negative_log_likelihood(*model)
    numbers = {"num_observations": 64, "strength": 30.0}

    def objective(params):
        penalty = continual.elastic_penalty(state, params, **numbers)
        return loss(params, (x, second)) + penalty

    def descend(optimizer):
        def one(carry, _):
            params, opt_state = carry
            updates, opt_state = optimizer.update(
                jax.grad(loss)(params, (x, second)),
                opt_state,
                params,
                batch=(x, second),
                anchor=state,
            )
            return (optax.apply_updates(params, updates), opt_state), None

        start = optax.tree.add(params, jax.tree.map(lambda x: 0.3 * x, params))
        end = jax.lax.scan(one, (start, optimizer.init(start)), None, 40)[0][0]
        slopes = (optax.tree.norm(jax.grad(objective)(x)) for x in (start, end))
        return objective(end), *slopes

    told = continual.add_elastic_penalty(**numbers, inner=optimizer)
    chained = optax.chain(continual.add_elastic_penalty(**numbers), optimizer)
    value, before, after = jax.jit(lambda: descend(told))()
    assert after < 1e-2 * before
    without = jax.jit(lambda: descend(chained))()[0]
    assert not without < 10 * value


def test_numbers_of_the_state_and_what_is_refused():
    optimizer = continual.add_elastic_penalty(8, inner=optax.sgd(0.5))
    state = optax.tree.set(optimizer.init(PARAMS), strength=jnp.asarray(3.0))
    plain = continual.add_elastic_penalty(8, strength=3.0)

    @jax.jit
    def both(zero, state):
        updates, _ = optimizer.update(zero, state, PARAMS, anchor=anchor())
        expected, _ = plain.update(zero, plain.init(PARAMS), PARAMS, anchor=anchor())
        return updates, jax.tree.map(lambda x: -0.5 * x, expected)

    updates, expected = both(optax.tree.zeros_like(PARAMS), state)
    chex.assert_trees_all_close(updates, expected, rtol=1e-12)
    with pytest.raises(ValueError, match="implicit_rate is of gradient descent"):
        continual.add_elastic_penalty(8, implicit_rate=0.1, inner=optax.sgd(0.1))
    for options, kind in (
        ({}, "diagonal"),
        ({}, "full"),
        ({"eigenvalue_correction": True}, "kronecker"),
        ({"spread_inverses": True}, "kronecker"),
    ):
        told = continual.add_elastic_penalty(8, inner=kfac(**options))
        with pytest.raises(ValueError, match=r"the penalty's curvature is a .*, which"):
            jax.eval_shape(functools.partial(step, told), anchor(kind))
    told = continual.add_elastic_penalty(
        8, inner=ff.transforms.adapt_damping(kfac(damping=1.0), LOSS)
    )
    with pytest.raises(ValueError, match="take one of the two"):
        jax.eval_shape(functools.partial(step, told), anchor())
