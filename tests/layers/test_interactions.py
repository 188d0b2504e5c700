"""Models whose examples interact are seen, and those that do not are left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fisherflow_jax as ff
from fisherflow_jax.layers import find_layers
from interacting_models import MODELS
from layer_cases import IDS, STEPS, X, draw

W = {"w": draw(4, 3)}


def layer(p, x):
    return jnp.tanh(x @ p["w"])


def dropout(p, inputs):
    h = layer(p, inputs["x"])
    return h * jax.random.bernoulli(inputs["key"], 0.5, h.shape).astype(h.dtype)


def mask_of_tokens(p, inputs):
    h = layer(p, inputs["x"].reshape(-1, 4))
    mask = jax.random.bernoulli(inputs["key"], 0.5, h.shape)
    return jnp.sum((h * mask).reshape(-1, 5, 3), 1)


def noise_of_each(p, inputs):
    def one(key):
        return jax.random.normal(jax.random.split(key)[0], (3,))

    noise = jax.vmap(one)(inputs["keys"])
    return layer(p, inputs["x"]) + noise


def running_mean(p, x):
    start = jnp.zeros((1, 4))
    _, h = lax.scan(
        lambda mean, step: ((mean + jnp.mean(step, 0)) / 2, step - mean),
        start[0],
        x.swapaxes(0, 1),
    )
    return h[-1] @ p["w"]


def normalise(x, axis):
    mean = jnp.mean(x, axis, keepdims=True)
    return (x - mean) / jnp.std(x, axis, keepdims=True)


@jax.custom_jvp
def centred(x):
    return x - jnp.mean(x, 0)


centred.defjvp(lambda x, t: (centred(*x), centred(*t)))
DROPOUT = {"x": X, "key": ff.Shared(jax.random.key(0))}

INTERACTING = {
    "batch statistics": (lambda p, x: normalise(layer(p, x), 0), X, "reduce_sum"),
    "jitted": (jax.jit(lambda p, x: normalise(layer(p, x), 0)), X, "reduce_sum"),
    "checkpointed": (
        jax.checkpoint(lambda p, x: normalise(layer(p, x), 0)),
        X,
        "reduce_sum",
    ),
    "own derivative": (lambda p, x: centred(layer(p, x)), X, "reduce_sum"),
    "batch and space": (
        lambda p, x: normalise(x @ p["w"], (0, 1)),
        STEPS,
        "reduce_sum",
    ),
    "in a scan": (running_mean, STEPS, "reduce_sum"),
    "maximum": (lambda p, x: layer(p, x) - jnp.max(x), X, "reduce_max"),
    "products of examples": (
        lambda p, x: jax.nn.softmax(x @ x.T) @ layer(p, x),
        X,
        "dot_general",
    ),
    "whitened": (
        lambda p, x: jnp.linalg.solve(x.T @ x, x.T).T @ p["w"],
        draw(9, 4),
        "dot_general",
    ),
    "sorted": (lambda p, x: layer(p, jnp.sort(x, 0)), X, "sort"),
    "cumulative": (lambda p, x: jnp.cumsum(layer(p, x), 0), X, "cumsum"),
    "one mask": (dropout, DROPOUT, "random numbers drawn for the batch"),
    "one mask of merged tokens": (
        mask_of_tokens,
        DROPOUT | {"x": STEPS},
        "random numbers drawn for the batch",
    ),
}
SEPARATE = {
    "normalised features": (lambda p, x: normalise(layer(p, x), -1), X),
    "statistics that are not used": (
        lambda p, x: (normalise(layer(p, x), 0), layer(p, x))[1],
        X,
    ),
    "given statistics": (
        lambda p, i: layer(p, i["x"] - jnp.mean(i["all"], 0)),
        {"x": X, "all": ff.Shared(draw(9, 4))},
    ),
    "a key for each": (
        noise_of_each,
        {"x": X, "keys": jax.random.split(jax.random.key(0), 3)},
    ),
    "a raw key for each": (
        noise_of_each,
        {"x": X, "keys": jax.random.split(jax.random.PRNGKey(0), 3)},
    ),
    # as many examples as the kernel has columns
    "weights with noise": (
        lambda p, i: i["x"] @ (p["w"] + jax.random.normal(i["key"], (4, 3))),
        DROPOUT,
    ),
    "attention": (
        lambda p, x: jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x)) @ x @ p["w"],
        STEPS,
    ),
    "looked up": (
        lambda p, x: jnp.sum(jnp.sort(p["w"][x], axis=1), 1),
        IDS,
    ),
    "own positions": (
        lambda p, x: jnp.take_along_axis(x, jnp.argsort(x, -1), -1) @ p["w"],
        X,
    ),
    "mapped": (lambda p, x: lax.map(lambda one: layer(p, one[None])[0], x), X),
}


@pytest.mark.parametrize("name", INTERACTING)
def test_what_takes_examples_together_is_named(name):
    apply_fn, inputs, reason = INTERACTING[name]
    layers = find_layers(apply_fn, W, inputs)
    assert layers.batched and layers.together.startswith(reason)
    last = str(layers).splitlines()[-1]
    assert last == f"examples: run together ({layers.together})"
    alone = find_layers(apply_fn, W, inputs, batched=False)
    assert not alone.batched
    assert str(alone).endswith("examples: run one by one (as asked)")


@pytest.mark.parametrize("name", SEPARATE)
def test_examples_on_their_own_are_left_alone(name):
    layers = find_layers(SEPARATE[name][0], W, SEPARATE[name][1])
    assert not layers.batched and layers.together is None


H = {"w": draw(4, 3), "h": draw(3, 2)}


def changed(change):
    """A network whose hidden values, (n, 3), are changed."""
    return lambda p, x: jnp.tanh(change(x @ p["w"])) @ p["h"]


def rows(change):
    return changed(jax.vmap(change))


def outer(h):
    return h[:, :, None] * h[:, None] + jnp.eye(3)


# what is followed: none of these needs values, or a word of whoever asks
FOLLOWED = {
    "parts of features": changed(lambda h: jnp.concatenate([h[:, 1:], h[:, :1]], 1)),
    "rolled features": changed(lambda h: jnp.roll(h, 1, 1)),
    "padded": changed(lambda h: jnp.pad(h[:, 1:], ((0, 0), (1, 0)))),
    "written over": changed(lambda h: h.at[:, 0].set(0.0)),
    "updated": changed(lambda h: lax.dynamic_update_slice(h, h[:, :2], (0, 1))),
    "its own place": rows(lambda a: a.at[jnp.argmax(a)].set(0.0)),
    "its own entry": rows(lambda a: a[jnp.argmax(a)] * a),
    "sorted by itself": changed(lambda h: jnp.take_along_axis(h, jnp.argsort(h, 1), 1)),
    "largest": changed(lambda h: lax.top_k(h, 3)[0]),
    "one-hot": changed(lambda h: jax.nn.one_hot(jnp.argmax(h, 1), 3) * h),
    "fourier": changed(lambda h: jnp.fft.irfft(jnp.fft.rfft(h), 3)),
    "cholesky": changed(lambda h: jnp.linalg.cholesky(outer(h))[:, 0]),
    "eigenvalues": changed(lambda h: jnp.linalg.eigh(outer(h))[0]),
    "triangular": changed(
        lambda h: lax.linalg.triangular_solve(outer(h), h[..., None], left_side=True)[
            ..., 0
        ]
    ),
    "solved": rows(lambda a: jnp.linalg.solve(jnp.outer(a, a) + jnp.eye(3), a)),
    "in turn": changed(lambda h: lax.map(jnp.sort, h)),
    "in turn by threes": changed(lambda h: lax.map(jnp.sort, h, batch_size=3)),
    "loop": changed(lambda h: lax.fori_loop(0, 3, lambda i, c: 2 * c + i, h)),
    "loops": rows(
        lambda a: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, a)
        )[1]
    ),
    "branches": changed(
        lambda h: lax.cond(jnp.array(True), lambda a: 2 * a, lambda a: a, h)
    ),
    "own branch": rows(lambda a: lax.cond(a[0] > 0, lambda a: 2 * a, lambda a: a, a)),
    "windows": changed(
        lambda h: lax.reduce_window(h, -np.inf, lax.max, (1, 2), (1, 1), "SAME")
    ),
    "derivative": rows(jax.grad(lambda a: jnp.sum(jnp.tanh(a)))),
    "derivative of a sum": changed(jax.grad(lambda h: jnp.sum(jnp.tanh(h)))),
    "curvature": rows(lambda a: jax.hessian(lambda a: jnp.sum(jnp.tanh(a)))(a)[0]),
    "repeated parameter": lambda p, x: (
        x.ravel() * jnp.tile(p["w"][:, 0], len(x))
    ).reshape(x.shape),
    "masked": lambda p, x: (
        jnp.where(jnp.tril(jnp.ones((4, 4), bool)), x[:, :, None] * x[:, None], -1.0)
        @ p["w"]
    ),
    "the same for all": lambda p, x: jnp.broadcast_to(p["w"][0], (len(x), 3)),
}


def test_ordinary_models_are_followed():
    lost = {}
    for name, apply_fn in FOLLOWED.items():
        try:
            layers = find_layers(apply_fn, H, jax.ShapeDtypeStruct((6, 4), float))
        except ValueError as error:
            lost[name] = str(error)
        else:
            if layers.batched or layers.row_by_row is not None:
                lost[name] = str(layers)
    assert lost == {}


def shuffled(h):
    return lax.ppermute(h, "all", [(i, (i + 1) % 6) for i in range(6)])


COLLECTIVES = {
    "psum": lambda h: lax.psum(h, "all"),
    "pmean": lambda h: lax.pmean(h, "all"),
    "pmax": lambda h: lax.pmax(h, "all"),
    "pmin": lambda h: lax.pmin(h, "all"),
    "psum_scatter": lambda h: lax.psum_scatter(jnp.tile(h, 2), "all"),
    "all_gather": lambda h: lax.all_gather(h, "all")[0],
    "all_to_all": lambda h: lax.all_to_all(jnp.tile(h, 2), "all", 0, 0)[:3],
    "ppermute": shuffled,
    "axis_index": lambda h: lax.axis_index("all"),
}
MOVED = {
    "flipped": lambda h: h + h[::-1],
    "outputs flipped": lambda h: h[::-1],
    "permuted": lambda h: h - h[np.array([1, 0, 3, 2, 5, 4])],
    "halves": lambda h: jnp.repeat(h[::2] - h[1::2], 2, axis=0),
    "first written over": lambda h: h.at[0].set(0.0),
    "numbered": lambda h: h * jnp.arange(6.0)[:, None],
    "carried": lambda h: lax.scan(lambda c, r: (c + r, c - r), h[0], h)[1],
}


@pytest.mark.slow
def test_interacting_models_are_found_or_refused():
    """By the program, or by values; without values they are refused."""

    def collected(take):
        def one(p, x):
            h = x @ p["w"]
            return jnp.tanh(h - take(h)) @ p["h"]

        return lambda p, x: jax.vmap(one, (None, 0), axis_name="all")(p, x)

    models = {name: (f, params) for name, (f, params, _) in MODELS.items()}
    models |= {name: (collected(take), H) for name, take in COLLECTIVES.items()}
    models |= {name: (changed(change), H) for name, change in MOVED.items()}
    seen = {name for name, model in MODELS.items() if model.seen}
    seen |= {"psum", "pmean", "pmax", "pmin", "psum_scatter"}
    inputs, wrong = draw(6, 4), {}
    for name, (apply_fn, params) in models.items():
        layers = find_layers(apply_fn, params, inputs)
        reason = layers.together or ""
        shown = not reason.startswith("not followed through")
        if not (layers.batched and reason) or shown != (name in seen):
            wrong[name] = str(layers)
        if shown:
            continue
        with pytest.raises(ValueError, match=r"cannot be followed.*batched=True"):
            find_layers(apply_fn, params, jax.ShapeDtypeStruct((6, 4), float))
        assert find_layers(apply_fn, params, inputs, batched=True).batched
    assert wrong == {}


def test_zeros_and_rows_that_are_alike_hide_nothing():
    def first(p, x):
        return (x - x[:1]) @ p["w"]

    zero = {"w": np.zeros((4, 3))}
    for inputs in (draw(3, 4), np.ones((3, 4))):
        assert find_layers(first, zero, inputs).batched
    looked_up = {"w": draw(7, 3)}
    with pytest.raises(ValueError, match="all rows of the inputs are alike"):
        find_layers(lambda p, ids: p["w"][ids[::-1]], looked_up, np.ones((3, 2), int))


def test_values_tell_what_a_program_does_not():
    def last(p, x):
        """The largest entry of each row, looked up by the numbers of the rows."""
        h = x @ p["w"]
        return h[jnp.arange(len(x)), jnp.argmax(h, 1)][:, None] * p["h"][0]

    layers = find_layers(last, H, X)
    told = "run one by one (not followed through gather, and by their values)"
    assert str(layers).endswith(told)
    assert find_layers(last, H, X) == layers


def masked(key_of):
    def one(p, x, key):
        drawn = jax.random.bernoulli(key_of(key), 0.5, (3,))
        return jnp.tanh(x @ p["w"]) * drawn

    return lambda p, i: jax.vmap(one, (None, 0, 0))(p, i["x"], i["keys"])


def test_a_key_for_each_example_is_no_interaction():
    ways = {
        "itself": lambda key: key,
        "split": lambda key: jax.random.split(key)[0],
        "folded": lambda key: jax.random.fold_in(key, 7),
        "wrapped": lambda key: jax.random.wrap_key_data(
            key if key.dtype == jnp.uint32 else jax.random.key_data(key)
        ),
    }
    raw, typed = jax.random.PRNGKey(0), jax.random.key(0)
    for start in (raw, typed):
        inputs = {"x": X, "keys": jax.random.split(start, 3)}
        for name, key_of in ways.items():
            layers = find_layers(masked(key_of), W, inputs)
            assert not layers.batched and layers.row_by_row is None, name


def test_where_numbers_are_drawn_decides_and_not_their_shape():
    key = jax.random.key(0)

    def noisy_weights(p, x):  # as many rows of weights as there are examples
        return x @ (p["w"] + jax.random.normal(key, (4, 3)))

    def by_feature(p, x):
        return x @ p["w"] * jax.random.bernoulli(key, 0.5, (3,))

    def merged(p, x):  # one mask for all tokens of all examples
        tokens = x.reshape(-1, 4) @ p["w"]
        kept = tokens * jax.random.bernoulli(key, 0.5, tokens.shape)
        return kept.reshape(*x.shape[:2], 3)

    def split_inside(p, x):
        keys = jax.random.split(key, len(x))
        return masked(lambda key: key)(p, {"x": x, "keys": keys})

    square = draw(4, 4)
    assert not find_layers(noisy_weights, W, square).batched
    assert not find_layers(by_feature, W, draw(3, 4)).batched
    for apply_fn, inputs in ((merged, STEPS), (split_inside, X)):
        reason = find_layers(apply_fn, W, inputs).together
        assert reason == "random numbers drawn for the batch"


def test_arrays_of_other_lengths_are_named_with_shared():
    inputs = {"x": draw(12, 4), "mask": draw(4, 4)}
    for batched in (None, False, True):
        with pytest.raises(ValueError, match=r"ff\.Shared.*\(4, 4\), \(12, 4\)"):
            find_layers(
                lambda p, i: i["x"] @ i["mask"] @ p["w"], W, inputs, batched=batched
            )


def test_asked_for_where_nothing_is_seen():
    layers = find_layers(layer, W, X, batched=True)
    assert layers.batched and layers.together is None
    assert str(layers).endswith("examples: run together (as asked)")
    assert layers.layers == find_layers(layer, W, X).layers
    assert layers != find_layers(layer, W, X)


def test_one_square_a_batch_is_told():
    def bent(p, x):
        return normalise(x @ jnp.tanh(p["w"]), 0)

    assert "no layer: used in tanh; one square a batch" in str(find_layers(bent, W, X))
    assert "one square" not in str(find_layers(bent, W, X, batched=False))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (X[:1], r"two or more .*\[1\]"),
        ((X, draw(2, 1)), r"agree in their leading axis.*ff.Shared"),
    ],
)
def test_one_example_does_not_tell_its_axis(inputs, match):
    with pytest.raises(ValueError, match=match):
        find_layers(lambda p, x: layer(p, x), W, inputs, batched=True)


class Linen(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(not self.train)(nn.Conv(4, (3,))(x)))
        return nn.Dense(2)(nn.avg_pool(x, (5,))[:, 0])


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_linen(train):
    module = Linen(train)
    shapes = jax.eval_shape(module.init, jax.random.key(0), STEPS)

    def apply_fn(params, inputs):
        variables = {"params": params, "batch_stats": inputs["statistics"]}
        return module.apply(variables, inputs["x"], mutable=["batch_stats"])[0]

    statistics = jax.tree.map(lambda x: np.ones(x.shape), shapes["batch_stats"])
    inputs = {"x": STEPS, "statistics": ff.Shared(statistics)}
    layers = find_layers(apply_fn, shapes["params"], inputs)
    assert layers.batched == train
    assert [x.kind for x in layers.layers] == ["convolution", "dense"]
    assert all(x.bias is not None for x in layers.layers)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_of_nnx(train):
    model = Nnx(nnx.Rngs(0))
    (model.train if train else model.eval)()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, inputs):
        return nnx.merge(graph, params, inputs["rest"])(inputs["x"])

    inputs = {"x": X.astype(np.float32), "rest": ff.Shared(rest)}
    layers = find_layers(apply_fn, params, inputs)
    assert layers.batched == train
    assert len(layers.layers) == 2
