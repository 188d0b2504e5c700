"""Only the last batches are remembered."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fisherflow_jax.memories._memory import Belief, Memory, Prior, Site, fuse, total


class Window(NamedTuple):
    """A ring of the last sites."""

    sites: Site  # leaves (size, ...)
    head: jax.Array  # () int32, sites written so far


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
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive whole number; got {size!r}.")

    def predict(storage: Window, belief: Belief, prior: Prior) -> Belief:
        # the oldest site leaves now: its place is where the next one goes
        place = storage.head % size
        live = (jnp.arange(size, dtype=jnp.int32) != place).astype(belief.count.dtype)
        return fuse(prior, total(storage.sites, live), belief)

    def remember(storage: Window, belief: Belief, site: Site, prior: Prior):
        return push(storage, site, size), belief, ()

    def init(zeros: Site) -> Window:
        return empty_window(zeros, size)

    return Memory(f"windowed({size})", init, predict, remember)


def empty_window(zeros: Site, size: int) -> Window:
    sites = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), zeros)
    return Window(sites, jnp.zeros((), jnp.int32))


def push(window: Window, site: Site, size: int) -> Window:
    place = window.head % size
    sites = jax.tree.map(lambda ring, x: ring.at[place].set(x), window.sites, site)
    return Window(sites, window.head + 1)
