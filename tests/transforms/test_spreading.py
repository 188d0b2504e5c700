"""Inverses renewed by turns: the same numbers, and no factorisation out of turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
import transform_cases as cases
from fisherflow_jax.transforms import scale_by_fisher
from fisherflow_jax.transforms.preconditioner import renew as spreading

PERIOD = 2
FACTORISATIONS = {"cholesky", "eigh"}


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def network(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


PARAMS = {"a": draw(2, 3, seed=1), "b": draw(3, 2, seed=2)}
BATCH = draw(5, 2, seed=4), None
GRADIENT = {name: draw(*x.shape, seed=5) for name, x in PARAMS.items()}
LAYERS = ff.layers.find_layers(network, PARAMS, BATCH[0])
MODEL = network, ff.likelihoods.gaussian()
KINDS = {
    "kronecker": (ff.structures.kronecker(LAYERS), {}),
    "factored": (
        ff.structures.kronecker(LAYERS),
        {"factorise": ff.transforms.factored_damping},
    ),
    "corrected": (ff.structures.kronecker(LAYERS), {"eigenvalue_correction": True}),
    "groups": (ff.structures.block(lambda path: path), {}),
    "units": (ff.structures.block(), {"power": -0.5}),
}


def preconditioner(kind, **options):
    structure, more = KINDS[kind]
    return scale_by_fisher(
        ff.estimators.exact(*MODEL, structure),
        memory=ff.memories.windowed(1),
        damping=0.2,
        **({"inverse_period": PERIOD} | more | options),
    )


def updated(optimizer, state, params=PARAMS):
    return optimizer.update(GRADIENT, state, params, batch=BATCH)


@pytest.mark.parametrize("kind", ["corrected", "units"])
def test_of_a_constant_curvature_the_updates_are_the_same(kind):
    @jax.jit
    def run():
        found = []
        for spread in (False, True):
            optimizer = preconditioner(kind, spread_inverses=spread)

            def step(state, _, optimizer=optimizer):
                return updated(optimizer, state)[::-1]

            state = optimizer.init(PARAMS)
            found.append(jax.lax.scan(step, state, length=PERIOD + 2)[1])
        return found

    together, spread = run()
    for x, y in zip(jax.tree.leaves(spread), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)
        assert np.ptp(x, axis=0).max() < 1e-9 < np.abs(x).max()


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["factored", "corrected"])
def test_each_layer_is_renewed_once_in_a_period(kind):
    optimizer = preconditioner(kind, spread_inverses=True)

    @jax.jit
    def run():
        def step(state, factor):
            # the curvature changes at every step
            params = jax.tree.map(lambda x: factor * x, PARAMS)
            _, state = updated(optimizer, state, params)
            return state, state.factorisation

        return jax.lax.scan(step, optimizer.init(PARAMS), jnp.linspace(1, 2, 5))[1]

    kept = run()
    names = [name for name, _ in ff.information.parts(kept)]
    changes = {name: np.zeros(4, bool) for name in names}
    for name, leaf in zip(names, jax.tree.leaves(kept), strict=True):
        moved = np.any(np.diff(leaf, axis=0) != 0, axis=tuple(range(1, leaf.ndim)))
        changes[name] |= moved
    # layer by layer, steps 1 to 4
    turns = np.stack(list(changes.values()))
    np.testing.assert_array_equal(turns.sum(0), np.ones(4))
    np.testing.assert_array_equal(turns.sum(1), 2 * np.ones(2))


def factorisations(jaxpr, within=False):
    """Names of the factorisations in a program, and whether a branch holds them."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in FACTORISATIONS:
            found.append((name, within))
        # the branches by platform are no condition
        conditional = within or (
            name == "cond" and "branches_platforms" not in str(equation.params.keys())
        )
        for value in jax.tree.leaves(tuple(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += factorisations(inner, conditional)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_factorised_out_of_turn(kind):
    optimizer = preconditioner(kind, spread_inverses=True)
    state = jax.eval_shape(optimizer.init, PARAMS)
    program = jax.make_jaxpr(lambda s: updated(optimizer, s))(state)
    found = factorisations(program.jaxpr)
    assert found and all(within for _, within in found)


def test_groups_are_of_about_equal_cost():
    costs = {"a": 1, "b": 8, "c": 5, "d": 4, "e": 0}
    # 8 + 1 and 5 + 4
    assert spreading.balanced(costs, 2) == [["b", "a", "e"], ["c", "d"]]
    alone = [["b"], ["c"], ["d"], ["a"], ["e"]]
    assert spreading.balanced(costs, 9) == alone


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("full", "of a Full information, which has one matrix, there is nothing to s"),
        ("scalar", "of an elementwise information there is nothing to spread"),
        ("diagonal", "of an elementwise information there is nothing to spread"),
        ("low_rank", "Unfactorised there is nothing to spread"),
    ],
)
@pytest.mark.parametrize("periods", [{"inverse_period": 2}, {"period": 2}])
def test_where_there_is_nothing_to_spread(structure, message, periods):
    optimizer = scale_by_fisher(
        cases.given(cases.STRUCTURES[structure]),
        memory=ff.memories.stationary(),
        damping=0.1,
        spread_inverses=True,
        **periods,
    )
    with pytest.raises(ValueError, match=message):
        optimizer.init(cases.tree(cases.flat(cases.PARAMS)))


@pytest.mark.parametrize(
    "periods",
    [
        {"inverse_period": 1},
        {"period": 2, "inverse_period": 2, "eigenvalue_correction": True},
    ],
)
def test_there_must_be_several_turns(periods):
    with pytest.raises(ValueError, match="of which there must be several; got inv"):
        preconditioner("kronecker", spread_inverses=True, **periods)
