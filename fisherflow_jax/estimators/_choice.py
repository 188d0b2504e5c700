"""An estimator without a model: its options, to be bound by who has the model."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from fisherflow_jax.estimators._estimator import Estimator
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import plain
from fisherflow_jax.structures import Structure


@dataclasses.dataclass(frozen=True)
class Choice:
    """An estimator's function and the options given to it; equal ones are equal.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.estimators.hutchinson(num_probes=8)
      hutchinson(num_probes=8)
      >>> ff.estimators.exact() == ff.estimators.exact()
      True
    """

    factory: Callable[..., Any]
    options: tuple[tuple[str, Any], ...] = ()

    def bind(
        self, apply_fn: Any, likelihood: Any, structure: Any, **options: Any
    ) -> Estimator:
        """The estimator of a model, in a structure; `options` go before its own."""
        options = dict(self.options) | options
        return self.factory(apply_fn, likelihood, structure, **options)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={shown(value)}" for name, value in self.options)
        return f"{self.factory.__name__}({options})"


def shown(value: Any) -> str:
    """A function by its name, anything else as it is."""
    return getattr(value, "__name__", None) or repr(value)


def choosable(
    make: Callable[..., Estimator], needs_model: bool = True
) -> Callable[..., Any]:
    """An estimator's function, of which a call with options alone is a `Choice`."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def factory(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind_partial(*args, **kwargs)
        call.apply_defaults()
        apply_fn, likelihood, structure, *_ = call.args
        options = {
            name: value
            for name, value in call.kwargs.items()
            if value is not signature.parameters[name].default
        }
        choice = Choice(factory, tuple(options.items()))
        if apply_fn is None and likelihood is None and structure is None:
            return choice
        if needs_model:
            _check_model(make.__name__, apply_fn, likelihood, structure)
        estimator = make(apply_fn, likelihood, structure, **options)
        return dataclasses.replace(
            estimator,
            rebuild=functools.partial(choice.bind, apply_fn, likelihood),
            bound=(choice, apply_fn, likelihood, structure),
        )

    return factory


def bind(
    estimator: Any, apply_fn: Callable, likelihood: Any, structure: Any, **options: Any
) -> Estimator:
    """An estimator of this model in this structure, however it was chosen.

    Args:
      estimator: a choice such as `ff.estimators.hutchinson(num_probes=8)`; a function
        of `(apply_fn, likelihood, structure)`, such as `ff.estimators.exact` or one of
        your own; or an estimator that is bound to this very model and structure.
      apply_fn: `(params, inputs) -> outputs`.
      likelihood: from `ff.likelihoods`.
      structure: from `ff.structures`.
      **options: of the estimator, such as `chunk_size`, in place of its own.

    Raises:
      ValueError: for an estimator of another model or structure, by its name; for what
        is no estimator.
    """
    if isinstance(estimator, Estimator):
        _check_bound(estimator, apply_fn, likelihood, structure)
        if not estimator.bound:  # built by hand
            return estimator
        estimator = estimator.bound[0]
    if isinstance(estimator, Choice):
        return estimator.bind(apply_fn, likelihood, structure, **options)
    bound = estimator
    if callable(estimator):
        bound = estimator(apply_fn, likelihood, structure, **options)
    if not isinstance(bound, Estimator):
        raise ValueError(
            "estimator is a choice such as ff.estimators.hutchinson(num_probes=8), or "
            f"a function of (apply_fn, likelihood, structure); got {bound!r}."
        )
    return bound


def _check_bound(
    estimator: Estimator, apply_fn: Callable, likelihood: Any, structure: Any
) -> None:
    own = estimator.bound[1:] if estimator.bound else (None, None, estimator.structure)
    given = apply_fn, likelihood, structure
    for what, one, other in zip(
        ("apply_fn", "likelihood", "structure"), own, given, strict=True
    ):
        # one that was built by hand does not say what model it is of
        if one is not None and plain(one) != plain(other):
            raise ValueError(
                f"estimators.{estimator.name} is bound to another {what}, "
                f"{shown(one)}, than the one here, {shown(other)}: give it without a "
                f"model, as ff.estimators.{estimator.name}(...) with options alone."
            )


def _check_model(name: str, apply_fn: Any, likelihood: Any, structure: Any) -> None:
    for value, sound, what in (
        (apply_fn, callable(apply_fn), "apply_fn is a function of (params, inputs)"),
        (
            likelihood,
            isinstance(likelihood, Likelihood),
            "likelihood is from ff.likelihoods, such as ff.likelihoods.categorical()",
        ),
        (
            structure,
            isinstance(structure, Structure),
            "structure is from ff.structures, such as ff.structures.diagonal()",
        ),
    ):
        if not sound:
            raise ValueError(
                f"estimators.{name}(apply_fn, likelihood, structure): {what}; got "
                f"{value!r}."
            )
