"""Values of the rows of a pool, each for itself."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisherflow_jax import products
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.chunks import map_slices
from fisherflow_jax.likelihoods import SOFTMAX, Likelihood, widen
from fisherflow_jax.model import derivative, once
from fisherflow_jax.posteriors import Gaussian, sample
from fisherflow_jax.selection._acquisitions import Gain, Value
from fisherflow_jax.selection._candidates import candidates, check_pool
from fisherflow_jax.selection._greedy import dispersion

PyTree = Any

# Numbers of draws held at once when no chunk_size is given: 16 MiB in float32.
_ENTRIES = 2**22


def values(
    state: Any,
    apply_fn: Callable,
    likelihood: Likelihood,
    pool: PyTree,
    acquisition: Gain | Value,
    *,
    rank: int | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    """What each row of a pool is worth by itself.

    The rows of the largest values (`jnp.argsort(-values)[:count]`) are no good batch:
    they repeat each other, and for the first labels of several classes are worse than
    random ones. `greedy` conditions on what it has chosen.

    Args:
      state: anything with `.mean` and `.information`.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`; of classes, save for the two gains.
      pool: inputs, leading axis n; parts in `ff.Shared` are passed whole.
      acquisition: `ff.selection.disagreement(key)`, `predictive_information(inputs,
        key)`, `entropy()`, `margin()`, or a gain: `information_gain()`,
        `variance_reduction(target)`.
      rank: for a gain, as in `greedy`.
      chunk_size: rows at a time; None: as many as keep 16 MiB.

    Returns:
      `(n,)`. Cost: a forward pass; S of them along draws of the parameters, which take
      S d numbers; for a gain r backward passes, a row.

    Raises:
      ValueError: for another likelihood than of classes, with draws; and as `greedy`.
      TypeError: for what is no acquisition.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x * params, ff.likelihoods.bernoulli()
      >>> structure = ff.structures.full()
      >>> state = ff.posterior(jnp.array(1.0), structure, prior_precision=1.0)
      >>> x = jnp.array([0.0, 1.0, 4.0])
      >>> print(ff.selection.values(state, *model, x, ff.selection.entropy()).round(3))
      [0.693 0.582 0.09 ]
      >>> told = ff.selection.disagreement(key=0, num_samples=1000)
      >>> int(jnp.argmax(ff.selection.values(state, *model, x, told)))  # unsure of p
      2
    """
    if not isinstance(acquisition, Gain | Value):
        raise TypeError(
            "an acquisition is made by a call such as ff.selection.entropy(); got "
            f"{checks.described(acquisition)}."
        )
    belief, pool, _ = check_pool(
        state, apply_fn, likelihood, pool, chunk_size=chunk_size
    )
    if isinstance(acquisition, Value):
        if not likelihood.is_classes:
            raise ValueError(
                f"{acquisition.of.__name__[1:]} is of classes (categorical, bernoulli),"
                f" not of {likelihood}: take ff.selection.information_gain(), the same "
                "as disagreement for normal errors, or variance_reduction(target)."
            )
        if acquisition.inputs is not None:
            found = products.check_inputs(state, acquisition.inputs, None)
            acquisition = dataclasses.replace(acquisition, inputs=found)
    model, options = (apply_fn, pool, likelihood), (rank, chunk_size)
    return products.deciding(_run, belief, *model, acquisition, *options)


# compiled once a model and shape, so that a second call compiles nothing
@functools.partial(jax.jit, static_argnums=(1, 3, 5, 6))
def _run(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    acquisition: Gain | Value,
    rank: int | None,
    chunk_size: int | None,
) -> jax.Array:
    if isinstance(acquisition, Value):
        return _of_classes(belief, apply_fn, pool, likelihood, acquisition, chunk_size)
    found = candidates(belief, apply_fn, pool, likelihood, acquisition, rank)

    def some(parts: list) -> jax.Array:
        return acquisition.gain(*jax.vmap(found.own)(parts))

    gains = map_slices(some, found.parts, found.sizes(chunk_size)[0])
    return gains * dispersion(acquisition, belief).astype(gains.dtype)


def _of_classes(
    belief: Gaussian,
    apply_fn: Callable,
    pool: PyTree,
    likelihood: Likelihood,
    value: Value,
    chunk_size: int | None,
) -> jax.Array:
    model = once(apply_fn)
    products.check_model(belief, model, pool, likelihood)
    parts, rebuild = batches.split(pool)
    draws = None
    if value.num_samples is not None:
        drawn = sample(belief, value.key, (value.num_samples,))
        draws = jax.tree.map(
            lambda x, wide, m: (x - wide[None]).astype(m.dtype),
            drawn,
            trees.widen(belief.mean),
            belief.mean,
        )
    of = functools.partial(_probabilities, model, belief.mean, draws, likelihood)
    at = None
    if value.inputs is not None:
        products.check_model(belief, model, value.inputs, likelihood)
        at = of(batches.unshare(value.inputs))

    def some(parts: list) -> jax.Array:
        return value.of(of(batches.unshare(rebuild(parts))), at)

    first = [jax.eval_shape(lambda x: x[:1], x) for x in parts]
    shape = jax.eval_shape(lambda x: of(batches.unshare(rebuild(x))), first)
    entries = shape.size
    if at is not None:
        entries = max(entries, shape.size * at.size // shape.shape[0] ** 2)
    size = chunk_size or max(_ENTRIES // entries, 1)
    return map_slices(some, parts, size)


def _probabilities(
    model: Any, mean: PyTree, draws: PyTree, likelihood: Likelihood, inputs: PyTree
) -> jax.Array:
    """Of classes `(S, c, T, C)`, T targets of a row; without draws S = 1."""
    if draws is None:
        outputs = widen(model(mean, inputs))[None]
    else:
        along = functools.partial(derivative, model, mean, inputs)
        base, moved = jax.vmap(along, out_axes=(None, 0))(draws)
        outputs = widen(base)[None] + moved.astype(widen(base).dtype)
    if likelihood.scale is SOFTMAX:
        p = jax.nn.softmax(outputs)
    else:
        p = jnp.stack([jax.nn.sigmoid(-outputs), jax.nn.sigmoid(outputs)], -1)
    return p.reshape((*p.shape[:2], -1, p.shape[-1]))
