"""SOAP and Shampoo against the papers' algorithms in numpy, and their symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
import transform_cases as cases

STEPS, RATE, B1, B2, EPS = 30, 0.1, 0.9, 0.8, 1e-8
# of the first gradient no side has more than one direction that it does not show, and
# so one eigenbasis
SHAPES = {
    "conv": (2, 2, 3),
    "square": (4, 4),
    "stack": (2, 3, 3),
    "vector": (5,),
    "wide": (3, 4),
}
STREAM = {
    name: cases.draw(STEPS, *shape, seed=k)
    for k, (name, shape) in enumerate(SHAPES.items())
}
PARAMS = {name: x[-1] for name, x in STREAM.items()}
COMMON = {"b1": B1, "b2": B2, "stacked": ["stack"]}
PERIOD = {"inverse_period": 3}
DECAY, DECAYING = 0.3, ("square", "vector", "wide")
NARROW = {
    "mu_dtype": "bfloat16",
    "store": "bfloat16",
    "weight_decay": DECAY,
    "mask": {name: name in DECAYING for name in SHAPES},
}
OPTIMIZERS = {
    "soap": ff.soap(RATE, **COMMON, **PERIOD),
    "soap, decomposed": ff.soap(RATE, **COMMON, **PERIOD, decomposition=True),
    "soap, all remembered": ff.soap(RATE, **COMMON | {"b2": 1}, **PERIOD),
    "shampoo": ff.shampoo(RATE, **COMMON, **PERIOD),
    "shampoo, the paper's sums": ff.shampoo(
        lambda step: RATE / jnp.sqrt(step + 1),
        b1=0.0,
        b2=1,
        damping=0.0,
        inverse_period=1,
        stacked=["stack"],
    ),
    "shampoo 1/2": ff.shampoo(
        RATE, **COMMON, exponent=0.5, damping=0.0, inverse_period=1
    ),
    "soap, one side": ff.soap(RATE, **COMMON, **PERIOD, widest=3),
    "shampoo, one side": ff.shampoo(RATE, **COMMON, **PERIOD, widest=3),
    "soap, narrow": ff.soap(RATE, **COMMON, **PERIOD, **NARROW),
    "shampoo, narrow": ff.shampoo(RATE, **COMMON, **PERIOD, **NARROW),
    "grafted to adam": ff.shampoo(RATE, **COMMON, **PERIOD, graft="adam"),
    "grafted to sgd": ff.shampoo(RATE, **COMMON, **PERIOD, graft="sgd"),
    "adam": optax.adam(RATE, B1, B2),
    "soap of width 0": ff.soap(RATE, B1, B2, widest=0),
    "shampoo of width 0": ff.shampoo(RATE, B1, B2, widest=0),
    # what the structure is within ff.scale_by_fisher
    "preconditioner": optax.chain(
        ff.scale_by_fisher(
            ff.estimators.squared_gradient(
                structure=ff.structures.two_sided(stacked=["stack"])
            ),
            memory=ff.memories.exponential(B2),
            damping=0.0,
            power=-0.5,
            root_damping=EPS,
            momentum=optax.ema(B1),
        ),
        optax.scale(-RATE),
    ),
}
LEFT, RIGHT = (np.linalg.qr(cases.draw(4, 4, seed=k))[0] for k in (7, 8))


# without damping, a side of the first gradient that is not of full rank has no root
UNDAMPED = ("shampoo, the paper's sums", "shampoo 1/2", "preconditioner")


def part(tree, name):
    """The arrays that an optimiser of the table has."""
    hidden = ("conv", "wide") if name in UNDAMPED else ()
    return {key: x for key, x in tree.items() if key not in hidden}


@functools.cache
def trained():
    """The updates of all optimisers, in one program; and of a rotated stream."""
    rotated = dict(STREAM, square=LEFT @ STREAM["square"] @ RIGHT)
    every = {name: (name, 0) for name in OPTIMIZERS}
    every |= {f"{name}, rotated": (name, 1) for name in ("soap", "shampoo")}

    @cases.compiled
    def run(*streams):
        def step(state, given):
            found = {
                key: OPTIMIZERS[name].update(
                    part(given[which], name), state[key], part(PARAMS, name)
                )
                for key, (name, which) in every.items()
            }
            updates = {key: update for key, (update, _) in found.items()}
            return {key: after for key, (_, after) in found.items()}, updates

        start = {
            key: OPTIMIZERS[name].init(part(PARAMS, name))
            for key, (name, _) in every.items()
        }
        return jax.lax.scan(step, start, streams)

    return run(STREAM, rotated)


def matrices(name):
    """The stream of an array as `(K, steps, I, O)`."""
    count = 2 if name == "stack" else 1
    rows = STREAM[name].reshape((STEPS, count, -1, SHAPES[name][-1]))
    return np.moveaxis(rows, 1, 0)


def expected(reference, name):
    steps = np.stack([reference(stream) for stream in matrices(name)], axis=1)
    return -RATE * steps.reshape((STEPS, *SHAPES[name]))


def exactly(x):
    return x


def rounded(x):
    """As it is kept in bfloat16."""
    return x.astype(jnp.bfloat16).astype(x.dtype)


def soap(stream, *, decay=B2, decomposition=False, period=3, widest=9, keep=exactly):
    """Vyas et al. 2024, algorithms 3 and 4; the first gradient makes the basis."""
    gain = 1.0 if decay == 1 else 1 - decay
    correction = (lambda t: t) if decay == 1 else (lambda t: 1 - decay**t)
    left, right, m, v = 0.0, 0.0, np.zeros_like(stream[0]), 0.0
    steps, bases = [], None
    for t, g in enumerate(stream):
        steps.append(np.zeros_like(g))
        if t > 0:
            p, q = bases
            m, v = B1 * m + (1 - B1) * g, decay * v + gain * (p.T @ g @ q) ** 2
            n = p.T @ (m / (1 - B1**t)) @ q / (np.sqrt(v / correction(t)) + EPS)
            steps[-1], m = p @ n @ q.T, keep(m)
        left, right = decay * left + gain * g @ g.T, decay * right + gain * g.T @ g
        if t % period == 0:
            old = bases
            if t == 0 or decomposition:
                bases = [np.linalg.eigh(x)[1][:, ::-1] for x in (left, right)]
            else:
                bases = [
                    np.linalg.qr(x @ b)[0]
                    for x, b in zip((left, right), old, strict=True)
                ]
            bases = [keep(b) if len(b) <= widest else np.eye(len(b)) for b in bases]
            if t > 0 and decomposition:
                v = moved(v, old, bases, (left, right))
    return np.stack(steps)


def moved(v, old, new, factors):
    """EK-FAC's second moments in a new basis: those of the factors' product exactly."""
    overlaps = [(b.T @ a) ** 2 for a, b in zip(old, new, strict=True)]
    truth = [np.diag(b.T @ x @ b) for x, b in zip(factors, new, strict=True)]
    guess = [
        o @ np.diag(a.T @ x @ a) for o, x, a in zip(overlaps, factors, old, strict=True)
    ]
    ratio = np.outer(truth[0] / guess[0], truth[1] / guess[1])
    seen = overlaps[0] @ v @ overlaps[1].T * ratio
    return seen * v.sum() / seen.sum()


def power(matrix, exponent, damping):
    values, columns = np.linalg.eigh(matrix)
    values = np.maximum(values, 0) + damping * np.trace(matrix) / len(matrix)
    return columns * values**-exponent @ columns.T


def shampoo(
    stream,
    *,
    exponent=0.25,
    damping=1e-6,
    period=3,
    graft=None,
    widest=9,
    keep=exactly,
):
    left, right, m, v = 0.0, 0.0, 0.0, 0.0
    steps = []
    for t, g in enumerate(stream):
        weight, m = 1 - B2 ** (t + 1), B1 * m + (1 - B1) * g
        left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g
        v = B2 * v + (1 - B2) * g**2
        if t % period == 0 or t < period:
            factors = [
                x if len(x) <= widest else np.diag(np.diag(x)) for x in (left, right)
            ]
            roots = [keep(power(x / weight, exponent, damping)) for x in factors]
            scale = (np.trace(left) / weight) ** (2 * exponent - 0.5)
        mean, m = m / (1 - B1 ** (t + 1)), keep(m)
        step = scale * roots[0] @ mean @ roots[1]
        adam = mean / (np.sqrt(v / weight) + EPS)
        if graft is not None:
            target = {"adam": adam, "sgd": mean}[graft]
            step = step * np.linalg.norm(target) / np.linalg.norm(step)
        steps.append(step)
    return np.stack(steps)


def papers_shampoo(stream):
    """Gupta, Koren, Singer 2018, algorithm 1, without epsilon: full rank."""
    left, right, steps = 0.0, 0.0, []
    for g in stream:
        left, right = left + g @ g.T, right + g.T @ g
        steps.append(power(left, 0.25, 0) @ g @ power(right, 0.25, 0))
    return np.stack(steps)


REFERENCES = {
    "soap": soap,
    "soap, decomposed": functools.partial(soap, decomposition=True),
    "soap, all remembered": functools.partial(soap, decay=1),
    "shampoo": shampoo,
    "shampoo, the paper's sums": papers_shampoo,
    "shampoo 1/2": functools.partial(shampoo, exponent=0.5, damping=0.0, period=1),
    "soap, one side": functools.partial(soap, widest=3),
    "shampoo, one side": functools.partial(shampoo, widest=3),
    "soap, narrow": functools.partial(soap, keep=rounded),
    "shampoo, narrow": functools.partial(shampoo, keep=rounded),
    "grafted to adam": functools.partial(shampoo, graft="adam"),
    "grafted to sgd": functools.partial(shampoo, graft="sgd"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_thirty_steps_are_those_of_the_paper(name):
    _, updates = trained()
    for array in set(part(SHAPES, name)) - {"vector"}:
        if "one side" in name and array == "square":  # both are too wide
            continue
        wanted = expected(REFERENCES[name], array)
        if "narrow" in name and array in DECAYING:
            wanted = wanted - RATE * DECAY * PARAMS[array]
        found = updates[name][array]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-8, err_msg=array)


def test_vectors_and_width_0_are_adam():
    _, updates = trained()
    for name in OPTIMIZERS:
        arrays = SHAPES if "width 0" in name else ["vector"]
        # other averages, and what is rounded
        if any(word in name for word in ("sums", "all", "narrow")):
            continue
        arrays = [*arrays, "square"] if "one side" in name else arrays
        for array in arrays:
            np.testing.assert_allclose(
                updates[name][array], updates["adam"][array], rtol=1e-6, err_msg=name
            )


def test_rotations_of_a_matrix_from_both_sides_turn_its_steps():
    _, updates = trained()
    for name in ("soap", "shampoo"):
        turned = LEFT @ updates[name]["square"] @ RIGHT
        found = updates[f"{name}, rotated"]["square"]
        np.testing.assert_allclose(found, turned, rtol=0, atol=1e-7)


def test_the_half_power_is_that_of_scale_by_fisher_in_the_structure():
    _, updates = trained()
    for array in part(SHAPES, "preconditioner"):
        np.testing.assert_allclose(
            updates["preconditioner"][array],
            updates["shampoo 1/2"][array],
            rtol=0,
            atol=1e-5,  # the one has an epsilon in its roots
        )
