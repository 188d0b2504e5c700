"""Parameters of a family that are not known: a flow estimates them beside the mean."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from fisherflow_jax.likelihoods._likelihood import Likelihood

_UNKNOWN = "log_prob", "variance", "sample", "root", "kl", "distance"


class Nuisance(NamedTuple):
    """Positive parameters beside the outputs, handled by their logarithms.

    One is made by `ff.likelihoods.negative_binomial`.

    Attributes:
      names: what they are called.
      start: their logarithms where a search begins, and the means of their priors.
      spread: the standard deviations of these.
      known: `{name: logarithm} -> Likelihood`.
      expected: `{name: logarithm} -> (k, k)`, the Fisher information of one target
        about the logarithms, if it does not depend on the outputs. None: the observed
        one is taken.
    """

    names: tuple[str, ...]
    start: tuple[float, ...]
    spread: tuple[float, ...]
    known: Callable[[dict[str, jax.Array]], Likelihood]
    expected: Callable[[dict[str, jax.Array]], jax.Array] | None = None


def unknown(nuisance: Nuisance) -> Likelihood:
    """The likelihood before they are known: its mean, and no probabilities."""
    start = map(jnp.asarray, nuisance.start)
    family = nuisance.known(dict(zip(nuisance.names, start, strict=True)))
    what = " and ".join(nuisance.names)

    def refuse(*arguments: Any, **options: Any) -> NoReturn:
        raise ValueError(
            f"the {what} of {family.name} is estimated by ff.fisher_flow alone: give "
            "numbers, or likelihood.nuisance.known(state.nuisance.mean)."
        )

    refused: dict[str, Any] = dict.fromkeys(_UNKNOWN, refuse)
    return family._replace(**refused, nuisance=nuisance)
