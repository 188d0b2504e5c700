"""Factors, inverses and bases that a rule places over eight simulated devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisherflow_jax as ff
from fisherflow_jax._ground import placement
from simulated_devices import check_program

PROGRAM = Path(__file__).parent / "eight_devices_placed.py"


@pytest.mark.slow
def test_nothing_large_is_whole_on_a_device():
    check_program(PROGRAM, "large")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("kfac", "auto"),
        ("kfac", "explicit"),
        ("packed", "auto"),
        ("packed", "explicit"),
        ("ekfac", "auto"),
        ("ekfac", "explicit"),
        ("soap", "auto"),
        ("soap", "explicit"),
        ("last", "auto"),
        ("turns", "explicit"),
        ("exact", "auto"),
        ("shampoo", "auto"),
    ],
)
def test_the_same_numbers_where_the_rule_says(name, axes):
    check_program(PROGRAM, name, axes)


# ---- the rule, and work divided by it, on the devices that the tests simulate


def mesh_of(*shape, kind=AxisType.Auto):
    names = "ab"[: len(shape)]
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(names), axis_types=(kind,) * len(shape))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6, 6), P(("a", "b"))),  # the stack's axis first
        ((3, 8, 8), P(None, ("a", "b"))),
        ((2, 6, 6), P("a", "b")),  # each along an axis that it divides
        ((3, 5), P(None, None)),
        ((), P()),
    ],
)
def test_named_axes_are_laid_along_the_first_that_they_divide(shape, expected):
    rule = placement.rule_of(("a", "b"))
    found = NamedSharding(mesh_of(2, 2), rule(shape, mesh_of(2, 2)))
    assert found.is_equivalent_to(NamedSharding(mesh_of(2, 2), expected), len(shape))


def squared(matrices, numbers):
    """One by one along the stack: matrices, and a number of each."""
    product = jnp.einsum("kij,kjl->kil", matrices, matrices)
    return product * numbers[:, None, None], jnp.trace(matrices, axis1=1, axis2=2)


@pytest.mark.parametrize("rule", [("a", "b"), "b", lambda shape: P(None, "a")])
def test_divided_work_gives_what_each_call_gives(rule):
    rng = np.random.default_rng(0)
    sizes = [(3, 5), (2, 5), (4, 4), (1, 6)]  # of three kinds, the last one alone
    calls = [
        (jnp.asarray(rng.normal(size=(k, d, d))), jnp.asarray(rng.normal(size=k)))
        for k, d in sizes
    ]
    devices = set()

    def told(*call):
        devices.add(call[0].shape)
        return squared(*call)

    mesh = mesh_of(2, 2)
    with jax.set_mesh(mesh):

        @jax.jit
        def run(calls):
            with placement.holding(placement.rule_of(rule), calls):
                return placement.divided(told, calls)

        found = run(calls)
    number = {"b": 2, ("a", "b"): 4}.get(rule, 2)
    # five matrices of one size are filled up to six or eight
    assert (-(-5 // number), 5, 5) in devices and (5, 5, 5) not in devices
    for call, pair in zip(calls, found, strict=True):
        for x, y in zip(pair, squared(*call), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_a_function_of_the_shape_may_leave_an_array_alone():
    mesh = mesh_of(2)
    spread = NamedSharding(mesh, P("a"))
    params = {"w": jax.device_put(jnp.ones((4, 6)), spread)}

    def rule(shape):
        return spread if len(shape) == 2 else None

    state = ff.soap(0.1, factor_sharding=rule).init(params)
    squares = state[0].information.squares
    assert squares.left["w"].sharding.is_fully_replicated
    rows = NamedSharding(mesh, P(None, "a"))
    state = ff.soap(0.1, factor_sharding=lambda s: P(None, "a")).init(params)
    assert state[0].factorisation.inputs["w"].sharding.is_equivalent_to(rows, 3)


def test_what_no_axis_divides_is_told():
    params = {"w": jnp.ones((513, 4))}
    told = pytest.warns(ff.DataWarning, match=r"\(1, 513, 513\) are whole on each")
    with jax.set_mesh(mesh_of(2)), told:
        state = ff.soap(0.1, factor_sharding="a").init(params)
    squares = state[0].information.squares
    assert not squares.right["w"].sharding.is_fully_replicated


def test_what_is_no_rule():
    for wrong in (3, (), ("a", 1), P("a"), mesh_of(2)):
        with pytest.raises(ValueError, match="factor_sharding is the name of a mesh"):
            ff.soap(0.1, factor_sharding=wrong)
    params = {"w": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match="neither is one set nor do the parameters"):
        ff.soap(0.1, factor_sharding="a").init(params)
    with jax.set_mesh(mesh_of(2)):
        with pytest.raises(
            ValueError, match=r"names axes of the mesh, \('a',\); got 'b'"
        ):
            ff.soap(0.1, factor_sharding=("a", "b")).init(params)
        with pytest.raises(ValueError, match=r"returns a jax.sharding.*returned 'a'"):
            ff.soap(0.1, factor_sharding=lambda shape: "a").init(params)
