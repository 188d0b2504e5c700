"""States of every kind, and the comparison of what was loaded with what was saved."""

import jax
import jax.numpy as jnp
import numpy as np

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)))
Y = jnp.asarray((RNG.normal(size=12) > 0).astype(int))
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2), "h": jnp.ones((2, 2))}


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["h"]


def line(params, x):
    return x @ params


def assert_same(loaded, saved):
    """The same types, and the same bytes."""
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert isinstance(one, jax.Array) == isinstance(other, jax.Array)
        if not hasattr(other, "dtype"):
            assert one == other
            continue
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def noisy(state):
    """With numbers of its own in every array, so that none is taken for another."""
    rng = np.random.default_rng(1)

    def drawn(x):
        return jnp.asarray((rng.uniform(0, 100, x.shape)).astype(x.dtype))

    return jax.tree.map(drawn, state)


def flows():
    """A flow of every structure and memory, and one of every option that keeps more."""
    structures, memories = ff.structures, ff.memories
    layers = ff.layers.find_layers(network, PARAMS, X)
    kinds = [structures.full(), structures.diagonal(), structures.diagonal(layers)]
    kinds += [structures.scalar(), structures.block(), structures.low_rank(2)]
    kinds += [structures.block(lambda name: "all"), structures.kronecker(layers)]
    kept = [memories.stationary(), memories.exponential(0.9), memories.windowed(2)]
    everywhere = [
        ff.fisher_flow(
            network, ff.likelihoods.categorical(), structure=kind, memory=one
        )
        for kind in kinds
        for one in kept
    ]
    for memory in (
        memories.adaptive(100.0, size=4, guard=2),
        memories.random_walk(0.1),
    ):
        everywhere.append(
            ff.fisher_flow(network, ff.likelihoods.categorical(), memory=memory)
        )
    gaussian = ff.likelihoods.gaussian(1.0)
    options = [
        {"robust": True},
        {"robust": True, "num_clusters": 3},
        {"compensated": True},
        {"likelihood": ff.likelihoods.gaussian(None)},
        {"likelihood": ff.likelihoods.student_t(None, None)},
        {"estimator": ff.estimators.monte_carlo()},
    ]
    return everywhere + [
        ff.fisher_flow(line, **{"likelihood": gaussian, **one}) for one in options
    ]


def begun(flow):
    """The form of a flow's state, and numbers in it: no search is compiled."""
    params = jnp.zeros(3) if flow.recipe.apply_fn is line else PARAMS
    return noisy(jax.eval_shape(lambda: flow.init(params, key=0)))
