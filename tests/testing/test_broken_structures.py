"""The kit sees what is wrong: copies of a right structure with one thing broken."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax._ground import trees
from fisherflow_jax.structures import Diagonal, Scalar
from fisherflow_jax.testing._structures import LAWS

ops = ff.information
PARAMS = {"b": np.zeros(2), "w": np.zeros((2, 2))}


def _map(function, information, *rest):
    entries = jax.tree.map(
        function, information.numbers, *(other.numbers for other in rest)
    )
    return type(information)(entries)


def _add(left, right):
    if isinstance(right, Scalar):
        return _map(lambda a: a + right.value.astype(a.dtype), left)
    return _map(jnp.add, left, right) if type(right) is type(left) else NotImplemented


def _plain(operation):
    return lambda i, like=None: operation(Diagonal(i.numbers))


RIGHT = {
    "matvec": lambda i, v: ops.matvec(Diagonal(i.numbers), v),
    "solver": lambda i, damping=0.0: ops.solver(Diagonal(i.numbers), damping),
    "sample": lambda i, key, like=None: ops.sample(Diagonal(i.numbers), key),
    "add_to": _add,
    "scale": lambda i, factor: _map(lambda a: a * factor, i),
    "total": lambda i, w: _map(lambda a: jnp.tensordot(w, a, 1), i),
} | {
    name: _plain(getattr(ops, name))
    for name in ("logdet", "trace", "diagonal", "inverse_diagonal", "to_dense")
}


def reduce_by(of_squares):
    def reduce(kind, stack):
        def leaf(x):
            wide = x.astype(np.promote_types(x.dtype, np.float32))
            return of_squares(jnp.square(wide))

        return kind(jax.tree.map(leaf, stack))

    return reduce


def filled(kind, params, value):
    def leaf(x):
        return jnp.full(x.shape, value, np.promote_types(x.dtype, np.float32))

    return kind(jax.tree.map(leaf, params))


def structure(*, reduce=None, isotropic=filled, field="numbers", **broken):
    kind: Any = NamedTuple("Entries", [(field, Any)])
    # operations read `numbers`, whatever the field is called
    if field != "numbers":
        kind.numbers = property(lambda self: self[0])
    for name, function in (RIGHT | broken).items():
        getattr(ops, name).register(kind, function)
    reduce = reduce or reduce_by(lambda squares: jnp.sum(squares, axis=0))
    return ff.structures.Structure(
        "copy()",
        lambda stack: reduce(kind, stack),
        lambda params, value: isotropic(kind, params, value),
        from_full=lambda full: kind(ops.diagonal(full)),
    )


def check(made, skip=None):
    return ff.testing.check_structure(
        made, PARAMS, float_types=["float64"], num_samples=1000, skip=skip
    )


@pytest.mark.slow
def test_the_unbroken_copy_holds_all_laws():
    report = check(structure())
    assert "its own part" in report.checked
    assert set(report.not_applicable) >= {"sandwich", "propagate"}


def _narrow(kind, stack):
    return kind(jax.tree.map(lambda x: jnp.sum(jnp.square(x), axis=0), stack))


def _inverse_root(information, key, like=None):
    return ops.sample(Diagonal(jax.tree.map(jnp.ones_like, information.numbers)), key)


def _asymmetric(information, like=None):
    dense = ops.to_dense(Diagonal(information.numbers))
    return dense + jnp.eye(6, k=1, dtype=dense.dtype)


def _cannot_add_numbers(left, right):
    return NotImplemented if isinstance(right, Scalar) else _add(left, right)


def _root(information):
    inverse = jax.tree.map(lambda a: 1 / a, information.numbers)
    return ops.whitener(Diagonal(inverse))


def _adds_diagonals_twice(left, right):
    if isinstance(right, Diagonal):
        return _map(lambda a, b: a + 2 * b, left, type(left)(right.entries))
    return _add(left, right)


BROKEN = {
    "a mean instead of a sum": (
        {"reduce": reduce_by(lambda squares: jnp.mean(squares, axis=0))},
        {"its own part", "sums over parts"},
    ),
    "a factor of two": (
        {"reduce": reduce_by(lambda squares: 2 * jnp.sum(squares, axis=0))},
        {"its own part"},
    ),
    "not a square": (
        {"reduce": reduce_by(lambda squares: jnp.sum(jnp.sqrt(squares), axis=0))},
        {"squares"},
    ),
    "not finite at zero": (
        {"reduce": reduce_by(lambda s: jnp.sum(s, axis=0) ** 2 / jnp.sum(s, axis=0))},
        {"zero vectors"},
    ),
    "kept in half precision": ({"reduce": _narrow}, {"float32 or wider"}),
    "damping with the wrong sign": (
        {"solver": lambda i, damping=0.0: ops.solver(Diagonal(i.numbers), -damping)},
        {"damped solve"},
    ),
    "damping forgotten": (
        {"solver": lambda i, damping=0.0: ops.solver(Diagonal(i.numbers))},
        {"damped solve"},
    ),
    "samples of unit variance": ({"sample": _inverse_root}, {"sample"}),
    "a key that is not used": (
        {
            "sample": lambda i, key, like=None: ops.sample(
                Diagonal(i.numbers), jax.random.key(0)
            )
        },
        {"keys"},
    ),
    "half the log-determinant": (
        {"logdet": lambda i, like=None: ops.logdet(Diagonal(i.numbers)) / 2},
        {"logdet"},
    ),
    "standard errors for variances": (
        {
            "inverse_diagonal": lambda i, like=None: jax.tree.map(
                lambda a: 1 / jnp.sqrt(a), i.numbers
            )
        },
        {"inverse_diagonal"},
    ),
    "the mean of the diagonal for a trace": (
        {"trace": lambda i, like=None: ops.trace(Diagonal(i.numbers)) / 6},
        {"trace"},
    ),
    "not symmetric": ({"to_dense": _asymmetric}, {"positive", "matvec"}),
    "a scale squared": (
        {"scale": lambda i, factor: _map(lambda a: a * factor**2, i)},
        {"scale"},
    ),
    "weights forgotten in a total": (
        {"total": lambda i, w: _map(lambda a: jnp.sum(a, axis=0), i)},
        {"total"},
    ),
    "the right operand doubled": (
        {"add_to": lambda left, right: _add(left, ops.scale(right, 2.0))},
        {"addition", "swapped", "any order", "copies"},
    ),
    "no sum with a number": ({"add_to": _cannot_add_numbers}, {"a number to add"}),
    "half the identity": (
        {"isotropic": lambda kind, p, value: filled(kind, p, value / 2)},
        {"isotropic"},
    ),
    "values needed where shapes must do": (
        {
            "isotropic": lambda kind, p, value: kind(
                jax.tree.map(lambda x: x * 0 + jnp.asarray(value, x.dtype), p)
            )
        },
        {"shapes alone"},
    ),
    "a field's name that states use": ({"field": "information"}, {"arrays"}),
    "a spectrum of half the size": (
        {
            "spectral": lambda i, like=None: ops.spectral(
                Diagonal(jax.tree.map(lambda a: a / 2, i.numbers))
            )
        },
        {"spectral", "eigenvalues", "whiten and color", "white rows"},
    ),
    "a root of the information for one of its inverse": (
        {"whitener": lambda i, damping=0.0, like=None: _root(i)},
        {"whiten and color", "white rows"},
    ),
    "colored by another root": (
        {
            "whitener": lambda i, damping=0.0, like=None: ops.whitener(
                Diagonal(i.numbers)
            )._replace(color=_root(i).color)
        },
        {"whiten and color"},
    ),
    "factors without damping": (
        {"factorise": lambda i, damping: ops.factorise(Diagonal(i.numbers), 0.0)},
        {"factors"},
    ),
    "a restriction twice as large": (
        {
            "restrict": lambda i, shown, like=None: Diagonal(
                jax.tree.map(lambda a: 2 * a, trees.punch(i.numbers, shown))
            )
        },
        {"restrict"},
    ),
    "columns twice as large": (
        {
            "by_columns": lambda i, like=None: ops.by_columns(
                Diagonal(jax.tree.map(lambda a: 2 * a, i.numbers))
            )
        },
        {"columns"},
    ),
    "a diagonal added twice": (
        {"add_to": _adds_diagonals_twice},
        {"a diagonal to add"},
    ),
    "a mean for a trace where no template is given": (
        {
            "trace": lambda i, like=None: (
                ops.trace(Diagonal(i.numbers)) / (1 if like is not None else 6)
            )
        },
        {"without like"},
    ),
    "a flat vector for a tree": (
        {"diagonal": lambda i, like=None: jnp.concatenate([i.numbers["b"]] * 3)},
        {"diagonal"},
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
    parts, laws = BROKEN[name]
    # of the others some may be broken too, and are not looked at
    others = dict.fromkeys(LAWS.keys() - laws, "another law's case")
    with pytest.raises(AssertionError, match="breaks") as caught:
        check(structure(**parts), others)
    message = str(caught.value)
    missed = {law for law in laws if f"- {law}: " not in message}
    assert not missed, message


@pytest.mark.slow
def test_the_message_has_the_rule_and_the_numbers():
    with pytest.raises(AssertionError) as caught:
        check(structure(trace=lambda i, like=None: jnp.asarray(1.0)))
    message = str(caught.value)
    # the trace, and that of each part of a sum
    assert "structure copy() breaks 2 of" in message
    assert "trace is that of the matrix\n  trace is 1, expected" in message
    assert "allowed 1e-09" in message


def test_bad_arguments():
    made = ff.structures.diagonal()
    with pytest.raises(ValueError, match=r"skip names \['adition'\], which"):
        ff.testing.check_structure(made, PARAMS, skip={"adition": "why"})
    with pytest.raises(ValueError, match="fewer than 100 samples; num_samples is 1"):
        ff.testing.check_structure(made, PARAMS, num_samples=1)
    with pytest.raises(ValueError, match="params have 300 entries"):
        ff.testing.check_structure(made, np.zeros(300))
    with pytest.raises(ValueError, match="int64"):
        ff.testing.check_structure(made, np.zeros(3, np.int64))


@pytest.mark.slow
def test_settings_are_left_as_they_were():
    for enabled in (True, False):
        with jax.enable_x64(enabled):
            skip = dict.fromkeys(LAWS.keys() - {"arrays", "matvec", "jit"}, "settings")
            ff.testing.check_structure(
                ff.structures.scalar(), np.zeros(2), num_samples=100, skip=skip
            )
            assert jax.config.jax_enable_x64 is enabled
    assert jax.config.jax_numpy_dtype_promotion == "standard"
