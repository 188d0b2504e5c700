"""EK-FAC within an optimiser: exact squares in a basis that moves, against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
from fisherflow_jax.structures import _moving_kronecker as correction
from fisherflow_jax.transforms import scale_by_fisher

EXACT = {"rtol": 1e-8, "atol": 1e-10}
LIKELIHOOD = ff.likelihoods.categorical()
DAMPING = 0.1


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


# ---- a network with two layers and a parameter of none


def network(params, x):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return params["scale"] * (hidden @ params["last"])


PARAMS = {
    "first": {"b": draw(3, seed=1), "w": draw(2, 3, seed=2)},
    "last": draw(3, 3, seed=3),
    "scale": np.asarray(1.3),
}
BATCH = draw(8, 2, seed=4), np.arange(8) % 3
LAYERS = ff.layers.find_layers(network, PARAMS, BATCH[0])
STRUCTURE = ff.structures.kronecker(LAYERS)
LOSS = ff.negative_log_likelihood(network, LIKELIHOOD)
PLACES = [slice(0, 9), slice(9, 18), slice(18, 19)]


def exact(structure):
    return ff.estimators.exact(network, LIKELIHOOD, structure)


def optimizer(**options):
    options = {"memory": ff.memories.windowed(1), "damping": DAMPING} | options
    return scale_by_fisher(exact(STRUCTURE), eigenvalue_correction=True, **options)


def flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def trajectory():
    """Three steps that remember one batch, and at each the matrices to compare."""
    transformation, dense = optimizer(), ff.information.to_dense

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(LOSS)(params, BATCH)
            updates, state = transformation.update(
                gradients, state, params, batch=BATCH
            )
            factored = exact(STRUCTURE)(params, BATCH)
            offline = exact(
                ff.structures.kronecker(LAYERS, eigenvalue_correction=factored)
            )
            found = {
                "updates": flat(updates),
                "gradients": flat(gradients),
                "corrected": dense(ff.get_information(state, 8)),
                "trace": ff.information.trace(ff.get_information(state, 8)),
                "offline": dense(offline(params, BATCH)),
                "factored": dense(factored),
                "exact": dense(exact(ff.structures.full())(params, BATCH)),
            }
            params = jax.tree.map(lambda p, u: p - 0.5 * u, params, updates)
            return (params, state), found

        start = params, transformation.init(params)
        return jax.lax.scan(step, start, length=3)[1]

    found = jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, PARAMS)))
    blocks = np.zeros_like(found["exact"])
    for place in PLACES:
        blocks[:, place, place] = found["exact"][:, place, place]
    return found | {"exact": blocks}


@pytest.mark.slow
def test_the_trace_is_that_of_the_exact_blocks():
    found = trajectory()
    expected = np.trace(found["exact"], axis1=1, axis2=2)
    np.testing.assert_allclose(found["trace"], expected, **EXACT)
    assert np.ptp(expected) > 1  # the parameters do move


def test_it_is_closer_to_the_exact_blocks_than_the_factors_alone():
    found = trajectory()
    corrected, factored = (
        np.linalg.norm(found[name] - found["exact"], axis=(1, 2))
        for name in ("corrected", "factored")
    )
    assert np.all(corrected < factored)


def test_it_is_the_correction_by_an_information_of_the_same_batch():
    found = trajectory()
    np.testing.assert_allclose(found["corrected"], found["offline"], **EXACT)


def test_an_update_is_a_solve_with_exact_damping():
    found = trajectory()
    damped = found["corrected"] / 8 + DAMPING * np.eye(19)
    expected = np.linalg.solve(damped, found["gradients"][..., None])[..., 0]
    np.testing.assert_allclose(found["updates"], expected, **EXACT)


# ---- one layer, all by hand in numpy


def linear(params, x):
    return x @ params["w"]


STREAM = draw(4, 6, 3, seed=6)
WEIGHTS = {"w": draw(3, 3, seed=5)}
LINEAR_LAYERS = ff.layers.find_layers(linear, WEIGHTS, STREAM[0])


def linear_optimizer(**options):
    estimator = ff.estimators.exact(
        linear, LIKELIHOOD, ff.structures.kronecker(LINEAR_LAYERS)
    )
    return scale_by_fisher(
        estimator, damping=DAMPING, eigenvalue_correction=True, **options
    )


def vectors_of(inputs):
    """Each example's inputs, and the root of its output Fisher (columns g)."""
    logits = inputs @ WEIGHTS["w"]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    roots = np.stack([np.linalg.cholesky(np.diag(q) + 1e-300) for q in p])
    return np.stack(
        [root - q[:, None] * root.sum(0) for q, root in zip(p, roots, strict=True)]
    )


def seen_from(bases, old, left, right, moments):
    """The second moments of an old basis in a new one, by the stated rule."""
    overlaps = [(new.T @ before) ** 2 for new, before in zip(bases, old, strict=True)]

    def turn(values):
        return overlaps[0] @ values @ overlaps[1].T

    def product(basis):
        sides = [
            np.diag(u.T @ f @ u) for u, f in zip(basis, (left, right), strict=True)
        ]
        return np.outer(*sides)

    there = turn(product(old))
    ratio = np.where(there > 0, product(bases) / there, 1)
    seen = turn(moments) * ratio
    return seen * moments.sum() / seen.sum()


def by_hand(memory, inverse_period):
    """The remembered mean information after each batch, dense."""
    sites, bases, moments, results = [], None, [], []
    for step, inputs in enumerate(STREAM):
        gradients = vectors_of(inputs)
        a = np.einsum("ni,nj->ij", inputs, inputs)
        g = np.einsum("nor,npr->op", gradients, gradients)
        sites.append((a, g))
        if memory == "windowed":
            weights = np.array([float(i > step - 2) for i in range(step + 1)])
        else:
            weights = 0.5 ** np.arange(step, -1, -1)
        left, right = (np.tensordot(weights, x, 1) for x in zip(*sites, strict=True))
        if step % inverse_period == 0:
            old, bases = bases, [np.linalg.eigh(m)[1] for m in (left, right)]
            if old is not None:
                if memory == "windowed":
                    moments = [seen_from(bases, old, left, right, m) for m in moments]
                else:
                    # a sum moves as one
                    past = np.tensordot(weights[:-1], np.stack(moments), 1)
                    past = seen_from(bases, old, left, right, past)
                    zero = np.zeros_like(past)
                    moments = [*[zero] * (step - 1), past / weights[-2]]
        squares = np.einsum(
            "nj,npr->jp",
            (inputs @ bases[0]) ** 2,
            (np.einsum("op,nor->npr", bases[1], gradients)) ** 2,
        )
        moments.append(squares)
        mean = np.tensordot(weights, np.stack(moments), 1) / (6 * weights.sum())
        columns = np.kron(*bases)
        results.append(columns * mean.ravel() @ columns.T)
    return np.stack(results)


MEMORIES = {
    "windowed": ff.memories.windowed(2),
    "exponential": ff.memories.exponential(0.5),
}


def linear_step(transformation, state, inputs):
    zeros = jax.tree.map(jnp.zeros_like, WEIGHTS)
    batch = inputs, None
    return transformation.update(zeros, state, WEIGHTS, batch=batch)[1]


@pytest.mark.parametrize(
    ("memory", "inverse_period"), [("windowed", 2), ("exponential", 1)]
)
def test_second_moments_move_with_the_basis(memory, inverse_period):
    transformation = linear_optimizer(
        memory=MEMORIES[memory], inverse_period=inverse_period
    )

    def step(state, inputs):
        state = linear_step(transformation, state, inputs)
        return state, ff.information.to_dense(ff.get_information(state, 1))

    start = transformation.init(WEIGHTS)
    found = jax.jit(lambda: jax.lax.scan(step, start, STREAM)[1])()
    np.testing.assert_allclose(found, by_hand(memory, inverse_period), **EXACT)


@pytest.mark.slow
def test_without_compiling_it_is_the_same():
    step = functools.partial(
        linear_step, linear_optimizer(memory=MEMORIES["exponential"])
    )
    start = linear_optimizer(memory=MEMORIES["exponential"]).init(WEIGHTS)
    state = step(jax.jit(step)(start, STREAM[0]), STREAM[1])
    found = ff.information.to_dense(ff.get_information(state, 1))
    np.testing.assert_allclose(found, by_hand("exponential", 1)[1], **EXACT)


def test_what_is_kronecker_factored_moves_without_error():
    def positive(seed):
        root = draw(1, 4, 4, seed=seed)
        return root @ root.swapaxes(1, 2)

    left, right = positive(7), positive(8)
    old = [np.linalg.qr(draw(1, 4, 4, seed=seed))[0] for seed in (9, 10)]
    along = [
        np.einsum("kij,kil,klj->kj", u, f, u)
        for u, f in zip(old, (left, right), strict=True)
    ]
    exactly = along[0][:, :, None] * along[1][:, None, :]
    moved = jax.jit(lambda *layer: correction.move_layers([layer])[0])
    inputs, outputs, (seen, stack) = moved(
        *map(jnp.asarray, (left, right, *old)),
        [jnp.asarray(exactly), jnp.asarray(np.stack([exactly, 2 * exactly]))],
    )
    values = [np.linalg.eigvalsh(f) for f in (left, right)]
    product = values[0][:, :, None] * values[1][:, None, :]
    total = exactly.sum()
    np.testing.assert_allclose(seen, product * total / product.sum(), **EXACT)
    np.testing.assert_allclose(stack, np.stack([seen, 2 * seen]), **EXACT)
    # the trace stays, also of what is not factored; and where the basis stays, all
    same = [jnp.asarray(draw(1, 4, 4, seed=11) ** 2) for _ in range(2)]
    turned = moved(*map(jnp.asarray, (left, right, *old)), [same[0], jnp.stack(same)])[
        2
    ]
    np.testing.assert_allclose(turned[0].sum(), same[0].sum(), **EXACT)
    assert np.abs(turned[0] - same[0]).max() > 0.1
    again = moved(
        jnp.asarray(left),
        jnp.asarray(right),
        inputs,
        outputs,
        [same[0], jnp.stack(same)],
    )[2]
    np.testing.assert_allclose(again[0], same[0], **EXACT)


# ---- in use


@pytest.mark.slow
def test_kfac_takes_it_and_its_information_makes_a_posterior():
    transformation = ff.kfac(
        0.1,
        linear,
        LIKELIHOOD,
        LINEAR_LAYERS,
        eigenvalue_correction=True,
        spread_inverses=True,
        damping=0.1,
        key=0,
    )
    loss = ff.negative_log_likelihood(linear, LIKELIHOOD)
    batch = STREAM[0], np.arange(6) % 3

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, state = transformation.update(
                gradients, state, params, batch=batch
            )
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, transformation.init(params)), length=40)

    (params, state), losses = run(jax.tree.map(jnp.asarray, WEIGHTS))
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.5 * losses[0]
    information = ff.get_information(state, 8)
    assert isinstance(information, ff.structures.EigenKronecker)
    assert optax.tree.get(state, "num_skipped") == 0
    posterior = ff.posterior(params, information, prior_precision=1.0)
    errors = ff.standard_error(posterior)
    assert all(np.all((x > 0) & (x <= 1)) for x in jax.tree.leaves(errors))


def test_an_overflow_changes_nothing_and_is_counted():
    transformation = linear_optimizer(memory=MEMORIES["exponential"])

    @jax.jit
    def update(state, inputs, weights):
        gradient = {"w": jnp.ones((3, 3))}
        batch = inputs, None, weights
        return transformation.update(gradient, state, WEIGHTS, batch=batch)

    ones = np.ones(6)
    _, state = update(transformation.init(WEIGHTS), STREAM[0], ones)
    broken = STREAM[1].copy()
    broken[0, 0] = 1e200
    updates, after = update(state, broken, ones)
    assert not np.any(updates["w"]) and after.num_skipped == 1
    _, unseen = update(state, STREAM[1], 0 * ones)
    assert unseen.num_skipped == 0
    for later in (after, unseen):
        for name in ("information", "factorisation", "observations"):
            jax.tree.map(
                np.testing.assert_array_equal,
                getattr(later, name),
                getattr(state, name),
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: linear_optimizer(
                memory=MEMORIES["windowed"], period=2, inverse_period=3
            ),
            "inverse_period is a multiple of period; .* inverse_period = 3 and period",
        ),
        (
            lambda: scale_by_fisher(
                exact(ff.structures.diagonal()),
                memory=MEMORIES["windowed"],
                damping=0.1,
                eigenvalue_correction=True,
            ).init(PARAMS),
            r"corrects the structure kronecker\(layers\); .* type Diagonal",
        ),
        (
            lambda: optimizer(factorise=ff.transforms.factored_damping).init(PARAMS),
            "factored damping is for the inverse of a Kronecker .* EigenKronecker",
        ),
        (
            lambda: scale_by_fisher(
                ff.estimators.Estimator("mine", lambda *_: None, STRUCTURE),
                memory=MEMORIES["windowed"],
                damping=0.1,
                eigenvalue_correction=True,
            ),
            "estimators.mine has no rebuild",
        ),
        (lambda: optimizer(spread_inverses=1), "True or False; got 1"),
    ],
)
def test_what_cannot_be_corrected_says_so(make, message):
    with pytest.raises(ValueError, match=message):
        make()
