"""Models of flax: linen's transforms of modules and parameters, nnx's split models."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from fisherflow_jax.layers import find_layers
from layer_cases import Bias, Sizes, dense, draw, treatments
from layer_gradients import compare

X = draw(2, 6, 4).astype(np.float32)  # two examples of six positions


class Block(nn.Module):
    """A residual block, as a body of `nn.scan`."""

    @nn.compact
    def __call__(self, h, _):
        return h + nn.Dense(4)(nn.gelu(nn.Dense(3)(nn.LayerNorm()(h)))), None


class Network(nn.Module):
    """Convolution, attention, scanned blocks, recurrence, a product over two axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,), feature_group_count=2, name="conv")(x)
        x = nn.avg_pool(x, (2,), (2,))
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        block = nn.remat(Block, prevent_cse=False)
        blocks = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = blocks(name="blocks")(x, None)
        x = nn.RNN(nn.SimpleCell(4, name="cell"))(x)
        return nn.DenseGeneral(2, axis=(-2, -1), name="head")(x)


@pytest.mark.slow
def test_linen():
    network = Network()
    # shapes from flax, numbers from numpy: its initialisers take long to compile
    shapes = jax.eval_shape(network.init, jax.random.key(0), X)["params"]
    params = jax.tree.map(lambda x: draw(*x.shape).astype(x.dtype), shapes)

    def apply_fn(params, x):
        return network.apply({"params": params}, x)

    found = treatments(find_layers(apply_fn, params, X))
    assert found == {
        "conv.kernel": Sizes("convolution", 6, 2, 2, 6),
        "conv.bias": Bias("conv.kernel"),
        **{
            f"attention.{name}.kernel": dense(4, 4, 1, 3)
            for name in ("query", "key", "value", "out")
        },
        **{
            f"attention.{name}.bias": Bias(f"attention.{name}.kernel")
            for name in ("query", "key", "value", "out")
        },
        "blocks.Dense_0.kernel": dense(3, 4, 2, 3),
        "blocks.Dense_0.bias": Bias("blocks.Dense_0.kernel"),
        "blocks.Dense_1.kernel": dense(4, 3, 2, 3),
        "blocks.Dense_1.bias": Bias("blocks.Dense_1.kernel"),
        "blocks.LayerNorm_0.scale": "used in mul",
        "blocks.LayerNorm_0.bias": "used in add",
        "cell.i.kernel": dense(4, 4, 1, 3),
        "cell.i.bias": Bias("cell.i.kernel"),
        "cell.h.kernel": dense(4, 4, 1, 3),
        "head.kernel": dense(12, 2),
        "head.bias": Bias("head.kernel"),
    }
    # in float32, which flax keeps in places
    compare(apply_fn, params, X, 1e-4)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.linear(x))


class Perceptron(nnx.Module):
    """Scanned layers, each handed back by `nnx.remat`, and a last one."""

    def __init__(self, rngs):
        self.hidden = nnx.split_rngs(splits=3)(nnx.vmap(Layer))(rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return self.out(run(x, self.hidden))


def test_nnx():
    graph, params, rest = nnx.split(Perceptron(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    assert treatments(find_layers(apply_fn, params, X[0])) == {
        "hidden.linear.kernel": dense(4, 4, stacked=3),
        "hidden.linear.bias": Bias("hidden.linear.kernel"),
        "out.kernel": dense(4, 2),
        "out.bias": Bias("out.kernel"),
    }
    compare(apply_fn, params, X[0], 1e-4)


class Language(nn.Module):
    """A language model of GPT-2's shape: twelve blocks, and one table at both ends."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(300, 96, name="embed")
        x = embed(ids) + nn.Embed(16, 96, name="position")(jax.numpy.arange(16))
        mask = nn.make_causal_mask(ids)
        for i in range(12):
            h = nn.LayerNorm(name=f"norm_{i}a")(x)
            x = x + nn.MultiHeadDotProductAttention(6, name=f"attention_{i}")(
                h, mask=mask
            )
            h = nn.LayerNorm(name=f"norm_{i}b")(x)
            h = nn.gelu(nn.Dense(384, name=f"up_{i}")(h))
            x = x + nn.Dense(96, name=f"down_{i}")(h)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def test_a_language_model_is_covered():
    network, ids = Language(), jax.ShapeDtypeStruct((1, 16), int)
    shapes = jax.eval_shape(network.init, jax.random.key(0), ids)["params"]
    layers = find_layers(lambda p, x: network.apply({"params": p}, x), shapes, ids)
    found = treatments(layers)
    assert found["embed.embedding"] == Sizes("embedding", 300, 96, 1, 16, 16)
    others = {name for name, how in found.items() if isinstance(how, str)}
    assert all(name.startswith("norm") for name in others) and len(others) == 50
    # of one kind each: into attention and out of it, both dense ones, the two tables
    kinds = [(x[0].num_inputs, x[0].num_outputs, len(x)) for x in layers.alike.values()]
    assert sorted(kinds) == [
        (16, 96, 1),
        (96, 96, 12),
        (96, 96, 36),
        (96, 384, 12),
        (300, 96, 1),
        (384, 96, 12),
    ]
