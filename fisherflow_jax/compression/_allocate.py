"""How many bits each kernel gets, of a budget for all."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fisherflow_jax import information as ops
from fisherflow_jax._ground import checks, trees
from fisherflow_jax.compression._grid import laid_over
from fisherflow_jax.compression._round import check_inputs, named_bits, rounded
from fisherflow_jax.compression._state import earlier, quadratic

PyTree = Any


class Allocation(NamedTuple):
    """Bits by name. Made by `ff.compression.allocate_bits`.

    Attributes:
      bits: of each parameter that is rounded; `round_to_grid` takes it.
      predicted_rise: the sum of their predicted rises, each pruned and rounded by
        itself, in nats.
      mean_bits: a parameter that is rounded, at most the budget.
    """

    bits: dict[str, int]
    predicted_rise: float
    mean_bits: float


def allocate_bits(
    state: Any,
    choices: Sequence[int],
    budget: float,
    *,
    chosen: Any = None,
    mask: PyTree | None = None,
    dead_inputs: str = "raise",
) -> Allocation:
    r"""The bits of each kernel that cost least, of a budget for all of them.

    .. math:: \min_b \sum_g c_g(b_g) \quad\text{with}\quad
       \sum_g n_g b_g \le \text{budget} \sum_g n_g

    c is the predicted rise of `round_to_grid` for one kernel alone, with compensation:
    no assumption on its errors. The minimum is exact, by dynamic programming over the
    sums that no other choice beats; a sweep of multipliers can be far worse than the
    same bits for all, as few kernels of unlike size leave gaps between its answers.

    Args:
      state: as that of `round_to_grid`. Outside `jax.jit`: the answer is a dict.
      choices: bits that a kernel may get, such as (2, 3, 4, 8).
      budget: bits a rounded parameter, on average.
      chosen: as that of `round_to_grid`.
      mask: of an earlier pruning. What is pruned takes its bits like the rest.
      dead_inputs: as that of `round_to_grid`.

    Returns:
      An `Allocation(bits, predicted_rise, mean_bits)`. Cost: a rounding for each kernel
      and choice.

    Raises:
      TypeError: for a mixture.
      ValueError: for choices that are no bits, or none; a budget below the least of
        them; and as `round_to_grid` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> kernels = dict.fromkeys("uv", jnp.array([[0.3], [1.0]]))
      >>> known = {"u": jnp.full((2, 1), 9.0), "v": jnp.ones((2, 1))}
      >>> information = ff.structures.Diagonal(known)
      >>> state = ff.posterior(kernels, information, prior_precision=1e-3)
      >>> ff.compression.allocate_bits(state, (2, 4), 3.0).bits
      {'u': 4, 'v': 2}

    References:
      Dong, Yao, Gholami, Mahoney, Keutzer, "HAWQ: Hessian aware quantization of neural
      networks with mixed-precision", 2019.
    """
    around = quadratic(state)
    layers = ops.facts(around.information).layers
    if not len(choices):
        raise ValueError("choices of bits are one or more; got none.")
    options = sorted(set(choices))
    named = [named_bits(c, around.mean, chosen, layers) for c in options]
    checks.positive(budget, "budget")
    if budget < options[0]:
        raise ValueError(
            f"a budget of {budget:g} bits a parameter is below the least of the "
            f"choices, {options[0]}: none meets it."
        )
    kept, names = earlier(mask, around.mean), [*named[0]]
    check_inputs(around, kept, names, dead_inputs)

    pruned = dict(trees.named_leaves(kept))

    def cost(name: str, number: int) -> float:
        # zeros of the others are not this one's rise
        alone = laid_over(kept, {name: pruned[name]}, True)
        return float(rounded(around, alone, {name: number}).predicted_rise)

    costs = np.array([[cost(name, number) for number in options] for name in names])
    leaves = dict(trees.named_leaves(around.mean))
    sizes = np.array([leaves[name].size for name in names])
    spent = np.outer(sizes, options)
    picked = cheapest(costs, spent, budget * sizes.sum() + 1e-6)
    places = np.arange(len(names)), picked
    return Allocation(
        bits={name: options[k] for name, k in zip(names, picked, strict=True)},
        predicted_rise=float(costs[places].sum()),
        mean_bits=float(spent[places].sum() / sizes.sum()),
    )


def cheapest(costs: np.ndarray, sizes: np.ndarray, limit: float) -> list[int]:
    """Of each row one column: the least sum of costs whose sizes are within a limit.

    Of partial sums only those are kept that no other beats in both.
    """
    spent, paid = np.zeros(1, np.int64), np.zeros(1)
    least = sizes.min(1)
    picks: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(len(costs)):
        ahead = least[row + 1 :].sum()
        all_spent = (spent[:, None] + sizes[row]).ravel()
        all_paid = (paid[:, None] + costs[row]).ravel()
        order = np.lexsort((all_paid, all_spent))
        order = order[all_spent[order] + ahead <= limit]
        before = np.minimum.accumulate(np.r_[np.inf, all_paid[order][:-1]])
        order = order[all_paid[order] < before]
        picks.append(np.divmod(order, sizes.shape[1]))
        spent, paid = all_spent[order], all_paid[order]
    place, found = int(np.argmin(paid)), []
    for parents, columns in reversed(picks):
        found.append(int(columns[place]))
        place = int(parents[place])
    return found[::-1]
