"""How well influences foretell what models trained on parts of the data do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisherflow_jax._ground import checks


def linear_datamodelling_score(effects: Any, masks: Any, losses: Any) -> jax.Array:
    r"""The rank correlation of summed influences with losses of models trained anew.

    .. math:: \mathrm{LDS}_q = \mathrm{Spearman}_m \Big( \sum_{n \notin S_m}
       \mathrm{effect}_{qn}, \; \ell_q(\hat\theta_{S_m}) \Big)

    over subsets :math:`S_m` of the training rows, with the model fitted to each by
    whoever asks. It is the measure by which attributions are compared: 1 where the sum
    of the effects of the rows that are left out orders the losses without fault, 0
    where it says nothing. What a second training from another start reaches is the
    ceiling.

    Args:
      effects: `(q, n)`, as `ff.influence.effects` returns them: the rise of a query's
        loss when a row is removed.
      masks: `(m, n)` booleans, or ones and zeros: the rows that each subset kept.
      losses: `(m, q)`: each query's loss under the model of each subset.

    Returns:
      `(q,)`, in [-1, 1]; equal values share their mean rank. NaN for a query whose
      losses, or whose predictions, are all the same.

    Raises:
      ValueError: for shapes that do not go together, fewer than three subsets, masks
        that are neither booleans nor ones and zeros, and, where they are at hand,
        values that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> effects = jnp.array([[3.0, 1.0, -2.0]])  # without row 0 the loss rises most
      >>> masks = jnp.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
      >>> losses = jnp.array([[0.9], [0.3], [0.4]])
      >>> ff.testing.linear_datamodelling_score(effects, masks, losses)
      Array([0.5], dtype=float32)

    References:
      Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: attributing model behavior at
      scale", 2023.
    """
    dtype = jnp.result_type(float)
    effects, kept, losses = (jnp.asarray(x, dtype) for x in (effects, masks, losses))
    shapes = [x.shape for x in (effects, kept, losses)]
    if [len(shape) for shape in shapes] != [2, 2, 2] or (
        (kept.shape[0], *effects.shape) != (*losses.shape, kept.shape[1])
    ):
        raise ValueError(
            "effects (q, n), masks (m, n) and losses (m, q) go together; got shapes "
            f"{shapes}."
        )
    if len(kept) < 3:
        raise ValueError(
            f"a rank correlation needs 3 subsets or more; got {len(kept)}."
        )
    if not checks.holds((kept == 0) | (kept == 1)):
        raise ValueError(
            "masks say which rows each subset kept, True or False (1 or 0); got "
            f"{np.unique(np.asarray(masks))[:5]}."
        )
    for name, values in (("effects", effects), ("losses", losses)):
        if not checks.holds(jnp.isfinite(values)):
            raise ValueError(f"{name} must be finite; got a NaN or an infinite one.")
    predicted = jax.vmap(_ranks)(effects @ (1 - kept).T)
    measured = jax.vmap(_ranks)(losses.T)
    products = jnp.sum(predicted * measured, 1)
    sizes = jnp.sum(jnp.square(predicted), 1) * jnp.sum(jnp.square(measured), 1)
    return products / jnp.sqrt(sizes)


def _ranks(values: jax.Array) -> jax.Array:
    """Ranks around their mean, those of equal values at the middle of their places."""
    ordered = jnp.sort(values)
    below, upto = (jnp.searchsorted(ordered, values, side=s) for s in ("left", "right"))
    return (below + upto - len(values)).astype(values.dtype) / 2
