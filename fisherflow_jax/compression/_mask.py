"""How much each parameter matters, and which are kept."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.compression._state import (
    check_finite,
    compressible,
    earlier,
    kernels_of,
    quadratic,
)
from fisherflow_jax.layers import Layers

PyTree = Any

RULES = ("marginal", "conditional")


def saliency(
    state: Any, *, rule: str = "marginal", mask: PyTree | None = None
) -> PyTree:
    r"""By how much the objective rises if one parameter is set to zero.

    .. math:: \frac{\theta_i^2}{2 (I^{-1})_{ii}} \text{ (marginal)}, \qquad
       \tfrac12 \theta_i^2 I_{ii} \text{ (conditional)}

    Marginal: the others move to where they are best (optimal brain surgeon).
    Conditional: they stay (optimal brain damage). Which scores a mask is made of
    matters less than that the kept parameters then move (`prune`): the magnitudes,
    `jax.tree.map(jnp.abs, state.mean)`, are as good as either.

    Args:
      state: anything with `.mean` and `.information`, with the prior in it.
      rule: "marginal" or "conditional".
      mask: of an earlier pruning, True where a parameter is kept: the others have no
        saliency. Marginal ones are as if these could move, too.

    Returns:
      A tree like the parameters, in nats of the summed objective. Cost: the diagonal of
      the inverse, or that of the information.

    Raises:
      TypeError: for a mixture.
      ValueError: for another rule; a state or a mask of other parameters; a saliency
        that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> information = ff.structures.Full(jnp.array([[1.5, 1.0], [1.0, 1.5]]))
      >>> state = ff.posterior(jnp.array([1.0, 2.0]), information, prior_precision=0.5)
      >>> ff.compression.saliency(state)
      Array([0.75, 3.  ], dtype=float32)
      >>> ff.compression.saliency(state, rule="conditional")
      Array([1., 4.], dtype=float32)

    References:
      LeCun, Denker, Solla, "Optimal brain damage", 1989.
      Hassibi, Stork, "Second order derivatives for network pruning: optimal brain
      surgeon", 1992.
    """
    if rule not in RULES:
        raise ValueError(f"rule is one of {RULES}; got {rule!r}.")
    mean, information, factor = quadratic(state)
    kept = earlier(mask, mean)
    if rule == "conditional":
        precision = ops.diagonal(information, mean)
    else:
        variance = ops.inverse_diagonal(information, mean)
        precision = jax.tree.map(lambda x: 1 / x, variance)

    def leaf(x: jax.Array, precision: jax.Array, kept: jax.Array) -> jax.Array:
        return jnp.where(kept, factor * precision * jnp.square(x) / 2, 0)

    found = jax.tree.map(leaf, trees.widen(mean), precision, kept)
    check_finite(found, "the saliency", ": give the state a larger prior precision")
    return found


def mask(
    saliency: PyTree,
    sparsity: Any,
    *,
    chosen: Any = None,
    groups: Mapping[str, Any] | None = None,
    layers: Layers | None = None,
    mask: PyTree | None = None,
) -> PyTree:
    """Which parameters are kept: the rest have the least saliency.

    Args:
      saliency: a tree like the parameters, such as that of `ff.compression.saliency`,
        or the magnitudes, `jax.tree.map(jnp.abs, params)`.
      sparsity: which share is to be zero, in [0, 1), of all chosen entries together,
        those of the earlier mask among them; with `groups`, of the groups. Or text such
        as "2:4": of every four entries along the inputs of an output two are kept; the
        entries of a last, shorter row are all kept.
      chosen: a predicate of a parameter's name, a list of names, booleans like the
        parameters, or a prefix of them. None: the kernels of `layers` or, without
        these, all arrays of two axes or more: no biases and no norms.
      groups: entries that are kept or removed together, such as all that belongs to a
        hidden unit: for the name of a parameter whole numbers that broadcast to its
        shape, -1 for what is in no group. The saliencies of those that the earlier
        mask keeps are summed. What must go together (channels that meet in a residual
        sum) is for you to say.
      layers: from `ff.layers.find_layers`: which arrays are kernels, and which of their
        axes are inputs. None: all axes but the last are.
      mask: an earlier mask, whose zeros stay.

    Returns:
      A tree like the parameters of booleans, True for what is kept. Of equals the first
      is removed. Cost: a sort.

    Raises:
      ValueError: for a sparsity outside [0, 1), or text that is no pattern; a mask of
        another tree; nothing chosen; groups that do not fit, by name; a saliency that
        is not finite.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> params = {"w": jnp.array([[1.0], [-4.0], [3.0], [2.0]]), "b": jnp.zeros(1)}
      >>> magnitudes = jax.tree.map(jnp.abs, params)
      >>> kept = ff.compression.mask(magnitudes, 0.25)
      >>> kept["w"][:, 0], kept["b"]
      (Array([False,  True,  True,  True], dtype=bool), Array([ True], dtype=bool))
      >>> ff.compression.mask(magnitudes, "2:4")["w"][:, 0]
      Array([False,  True,  True, False], dtype=bool)
    """
    saliency = trees.real_arrays(saliency, "saliency")
    check_finite(saliency, "the saliency")
    kept = dict(trees.named_leaves(earlier(mask, saliency)))
    # what is removed already comes first
    scores = {
        name: jnp.where(kept[name], leaf, -jnp.inf)
        for name, leaf in trees.named_leaves(saliency)
    }
    if groups is not None:
        if chosen is not None or isinstance(sparsity, str):
            raise ValueError(
                "groups say themselves which parameters are pruned, by a share of "
                f"them: got chosen={chosen!r} and sparsity={sparsity!r}."
            )
        found = _by_groups(scores, groups, sparsity)
    else:
        own = {name: scores[name] for name in compressible(saliency, chosen, layers)}
        if isinstance(sparsity, str):
            kernels = kernels_of(layers)
            found = {n: _by_rows(x, sparsity, kernels.get(n)) for n, x in own.items()}
        else:
            found = trees.unravel(_largest(trees.ravel(own), sparsity), own)
    leaves = [found.get(name, True) & leaf for name, leaf in kept.items()]
    return jax.tree.unflatten(jax.tree.structure(saliency), leaves)


def _largest(scores: jax.Array, sparsity: Any) -> jax.Array:
    """All of `(n,)` but a share, the least."""
    checks.decay(sparsity, "sparsity", one=False)
    count = sparsity * scores.size
    count = round(count) if checks.is_concrete(count) else jnp.round(count)
    return jnp.argsort(jnp.argsort(scores)) >= count


def _by_rows(scores: jax.Array, pattern: str, layer: Any) -> jax.Array:
    """The n largest of every m along the inputs, of one array."""
    numbers = re.fullmatch(r"(\d+):(\d+)", pattern)
    count, length = map(int, numbers.groups()) if numbers else (0, 0)
    if not 0 < count < length:
        raise ValueError(
            'sparsity is a share in [0, 1), or how many of how many are kept, as "2:4";'
            f" got {pattern!r}."
        )
    width = scores.shape[-1] if scores.ndim > 1 else 1
    rows = scores.reshape((1, scores.size // max(width, 1), width))
    if layer is not None:
        rows = layer.kernel_layout.from_leaf(scores)
    whole = rows.shape[1] // length * length
    of_each = len(rows), whole // length, length, rows.shape[2]
    cut = rows[:, :whole].reshape(of_each)
    best = jnp.argsort(jnp.argsort(cut, axis=2), axis=2) >= length - count
    kept = (
        jnp.ones(rows.shape, bool)
        .at[:, :whole]
        .set(best.reshape((len(rows), whole, rows.shape[2])))
    )
    return (
        kept.reshape(scores.shape)
        if layer is None
        else layer.kernel_layout.to_leaf(kept)
    )


def _by_groups(
    scores: dict[str, jax.Array], groups: Mapping[str, Any], sparsity: Any
) -> dict[str, jax.Array]:
    numbers = {}
    for name, given in groups.items():
        if name not in scores:
            raise ValueError(f"groups name {name}; the parameters are {[*scores]}.")
        own, shape = np.asarray(given), scores[name].shape
        try:
            numbers[name] = np.broadcast_to(own, shape)
        except ValueError:
            own = own.astype(object)
        if own.dtype.kind not in "iu":
            raise ValueError(
                f"groups of {name} are whole numbers that broadcast to its shape "
                f"{shape}; got {checks.described(given)}."
            )
    flat = np.concatenate([np.zeros(0, int), *(x.ravel() for x in numbers.values())])
    used, places = np.unique(flat, return_inverse=True)
    free = int(np.sum(used < 0))
    if free == used.size:
        raise ValueError("groups hold no number from 0 on: nothing would be pruned.")
    grouped = [scores[name] for name in numbers]
    flat_scores, sums = trees.ravel(grouped), jax.ops.segment_sum
    # of a group of which some are removed already the rest counts
    left = jnp.isfinite(flat_scores)
    totals = sums(jnp.where(left, flat_scores, 0), places, used.size)
    some = sums(left.astype(jnp.int32), places, used.size) > 0
    kept = _largest(jnp.where(some, totals, -jnp.inf)[free:], sparsity)
    kept = jnp.concatenate([jnp.ones(free, bool), kept])
    parts = trees.unravel(kept[places], grouped)
    return dict(zip(numbers, parts, strict=True))
