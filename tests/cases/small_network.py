"""A small network that is compressed."""

import jax
import jax.numpy as jnp
import numpy as np

import fisherflow_jax as ff

PRIOR = 0.3
LIKELIHOOD = ff.likelihoods.categorical()


def network(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return hidden @ params["v"] + params["c"]


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
