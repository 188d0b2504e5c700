"""Only the last batches are remembered."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import checks, choices
from fisherflow_jax.memories._memory import Memory, Sum, total


class Window(NamedTuple):
    """A ring of the last sites."""

    sites: Sum  # leaves (size, ...)
    reference: Any  # what their shifts are relative to: the last mean
    head: jax.Array  # () int32, sites written so far


@choices.choice
def windowed(size: int) -> Memory:
    r"""Remembers the last `size` batches and the prior.

    .. math:: I_t = I_0 + \sum_{j > t - W} F_j

    Each batch is kept as its site (information and shift), so old batches leave
    exactly; the sum is taken afresh at each update, so nothing is ever subtracted.
    Exact when linear-Gaussian; otherwise old sites keep the point at which they were
    linearised.

    Args:
      size: the number W of batches, at least 1.

    Returns:
      A `Memory`. Storage: W sites of the structure; cost of an update: their sum.

    Raises:
      ValueError: if `size` is not a positive whole number.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.memories.windowed(32).name
      'windowed(32)'
    """
    checks.whole(size, "size")

    def predict(storage: Window, believed: Any, batch: Any, like: Any) -> Any:
        # the oldest site leaves now: its place is where the next one goes
        place = storage.head % size
        weights = storage.sites.weight
        live = (jnp.arange(size, dtype=jnp.int32) != place).astype(weights.dtype)
        return believed.replaced_by(total(storage.sites, live), storage.reference)

    return Memory(
        name=f"windowed({size})",
        init=lambda zeros: empty_window(zeros, size),
        predict=predict,
        remember=lambda storage, believed, site: (
            push(storage, believed, site, size),
            believed,
            (),
        ),
    )


def empty_window(zeros: Sum, size: int) -> Window:
    sites = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), zeros)
    reference = getattr(zeros.linear, "vector", ())
    return Window(sites, reference, jnp.zeros((), jnp.int32))


def push(window: Window, believed: Any, site: Sum, size: int) -> Window:
    """The site of a batch written into the ring, `believed` having it in it."""
    # shifts follow the belief: far from it they would be large, and differ by little
    reference = believed.mean
    way = optax.tree.sub(window.reference, reference)
    sites = jax.vmap(lambda old: believed.referred(old, way))(window.sites)
    place, site = window.head % size, believed.referred(site, believed.rest)
    sites = jax.tree.map(lambda ring, x: ring.at[place].set(x), sites, site)
    return Window(sites, reference, window.head + 1)
