"""Every outcome of an estimator's random signs or labels, in place of a simulation.

An estimator asks for the probe of an example with a key of that example. A probe that
looks its key up among those keys, and answers with the signs it was given, lets a test
run through all signs: means and variances are then exact.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

KEY = 0


def signs(entries):
    """All sign patterns, `(2^entries, entries)`."""
    return np.array(list(itertools.product([-1.0, 1.0], repeat=entries)))


def example_keys(count):
    """The keys which the estimators derive for `count` examples from `KEY`."""
    indices = jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(KEY), i))(indices)


def probe_keys(count, num_probes=1):
    """`(count, num_probes)` keys which reach the probe function."""
    keys = example_keys(count)[:, None]
    if num_probes > 1:
        keys = jax.vmap(lambda k: jax.random.split(k[0], num_probes))(keys)
    return jax.vmap(jax.vmap(lambda k: jax.random.split(k)[1]))(keys)


def lookup(keys, values):
    """A function of a key: the entry of `values` at the place of the key in `keys`."""
    table = jax.random.key_data(keys).reshape((keys.size, -1))

    def find(key):
        found = jnp.all(table == jax.random.key_data(key)[None], axis=1)
        return jnp.tensordot(found.astype(values.dtype), values, 1)

    return find


def given(values, num_probes=1):
    """A probe that answers with `values (n, num_probes, entries)`."""
    count, entries = values.shape[0], values.shape[-1]
    flat = values.reshape((count * num_probes, entries))
    find = lookup(probe_keys(count, num_probes), flat)

    def probe(key, shape, dtype):
        return find(key).astype(dtype).reshape(shape)

    return probe


def outcomes(factory, model, structure, entries, num_probes=1, weights=None, **options):
    """The dense information for every pattern of signs, `(patterns, d, d)`."""
    import fisherflow_jax as ff

    count = len(model.inputs)
    patterns = signs(count * num_probes * entries)
    patterns = patterns.reshape((-1, count, num_probes, entries))
    weights = np.ones(count) if weights is None else weights

    @jax.jit
    @jax.vmap
    def run(pattern):
        estimator = factory(
            model.apply_fn,
            model.likelihood,
            structure,
            probe=given(pattern, num_probes),
            num_probes=num_probes,
            **options,
        )
        batch = model.inputs, model.targets, weights
        information = estimator(model.params, batch, KEY)
        return ff.information.to_dense(information, model.params)

    return np.asarray(run(patterns))
