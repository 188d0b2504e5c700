"""An estimator without a model: its options, to be bound by who has the model."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from fisherflow_jax._ground import checks
from fisherflow_jax._ground.choices import comparable, hashable
from fisherflow_jax._ground.telling import told
from fisherflow_jax.estimators._estimator import ByKey, Estimator
from fisherflow_jax.estimators._plan import Cotangents, Rule
from fisherflow_jax.estimators._pull import pulled
from fisherflow_jax.model import check_choices, plain
from fisherflow_jax.structures import Structure

# What an estimator is bound to.
_MODEL = "apply_fn", "likelihood", "structure"
# Options of a factory that are fields of its rule.
_OF_RULES = {"groups", "chunk_size", "fast_squares", "root", "batched"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Choice(ByKey):
    """An estimator's function and the options given to it; equal ones are equal.

    Called with a model and a structure, it is bound to them.

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

    __call__ = bind

    @functools.cached_property
    def _key(self) -> Any:
        return self.factory, comparable(dict(self.options))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={told(value)}" for name, value in self.options)
        return f"{self.factory.__name__}({options})"


def choosable(make: Callable[..., Any], needs_model: bool = True) -> Callable[..., Any]:
    """An estimator's function, of which a call with options alone is a `Choice`.

    `make` takes the options, and returns a `Rule` or a function of the model. Before
    its options stand `apply_fn`, `likelihood` and `structure`, which may be None.
    """
    signature, kind = inspect.signature(make), inspect.Parameter.POSITIONAL_OR_KEYWORD
    model = [inspect.Parameter(name, kind, default=None) for name in _MODEL]
    own = signature.parameters
    defaults = {(name, id(parameter.default)) for name, parameter in own.items()}
    signature = signature.replace(parameters=[*model, *own.values()])

    @functools.wraps(make)
    def factory(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        model, options = call.args, call.kwargs
        made, name = make(**options), make.__name__
        if isinstance(made, Rule):
            name = made.name or name
            fields = {key: options[key] for key in _OF_RULES & options.keys()}
            rule = dataclasses.replace(made, name=name, **fields)
            made = functools.partial(pulled, rule)
        given = [(k, v) for k, v in options.items() if (k, id(v)) not in defaults]
        choice = Choice(factory, tuple(given))
        if all(part is None for part in model):
            return choice
        apply_fn, likelihood, structure = model
        if needs_model:
            check_choices(apply_fn, likelihood)
        checks.made(structure, Structure, "structure", "ff.structures.diagonal()")
        estimator = made(*model)
        vars(estimator).update(  # which are frozen for all others
            bound=(choice, *model), rebuild=functools.partial(choice.bind, *model[:2])
        )
        return estimator

    factory.__signature__ = signature  # type: ignore[attr-defined]
    return factory


def rule(
    cotangents: Cotangents,
    *,
    name: str | None = None,
    random: bool = False,
    needs_targets: bool = False,
    num_columns: int = 1,
    groups: int | None = None,
    chunk_size: int | None = None,
    fast_squares: bool = True,
    batched: bool | None = None,
) -> Choice:
    r"""An estimator of one's own: the vectors that enter at the outputs of an example.

    .. math:: \sum_i w_i J_i^\top \Big(\sum_{r=1}^R c_{ir} c_{ir}^\top\Big) J_i

    with `J_i` the Jacobian of the outputs of example i and `c_ir` its cotangents. All
    estimators of this package that pull vectors back are made of such a rule.

    Args:
      cotangents: `(likelihood, outputs, targets, key) -> (R, *outputs.shape)`: of one
        example, with a leading axis of length 1 in `outputs` and `targets`; `key` is
        None unless `random`.
      name: for messages; None: that of the function.
      random: whether it draws from the key, of which each example has its own.
      needs_targets: whether a batch without targets is refused.
      num_columns: R, where `groups` is given.
      groups: None: squares of every example; G: the number of equal micro-batches whose
        vectors are summed before they are squared, for cotangents of mean zero that are
        independent between examples.
      chunk_size: examples whose vectors are held at once; None: about 64 MiB.
      fast_squares: square linear layers from their inputs and output gradients, where
        the structure does.
      batched: whether the model is run on whole batches, as in `exact`.

    Returns:
      A `Choice`, as `ff.estimators.exact()` is one: flows and optimisers take it, and
      called with `(apply_fn, likelihood, structure)` it is an `Estimator`. Cost: one
      forward and R backward passes an example.

    Raises:
      ValueError: for options that are not positive whole numbers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> def residual(likelihood, outputs, targets, key):
      ...     return (targets - outputs)[None]  # the score, clipped
      >>> clipped = ff.estimators.rule(
      ...     lambda *of: jnp.clip(residual(*of), -1, 1),
      ...     name="clipped",
      ...     needs_targets=True,
      ... )
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> estimator = clipped(*model, ff.structures.diagonal())
      >>> estimator(jnp.zeros(2), (jnp.array([[1.0, 2.0]]), jnp.array([3.0])))
      Diagonal(entries=Array([1., 4.], dtype=float32))
    """
    checks.whole(num_columns, "num_columns")
    fields = Rule(
        cotangents,
        random=random,
        needs_targets=needs_targets,
        num_columns=num_columns,
        name=name or str(getattr(cotangents, "__name__", "rule")),
        groups=groups,
        chunk_size=chunk_size,
        fast_squares=fast_squares,
        batched=batched,
    )
    return Choice(_of_rule, (("cotangents", fields),))


@choosable
def _of_rule(*, cotangents: Rule, **fields: Any) -> Rule:
    return dataclasses.replace(cotangents, **fields)


_of_rule.__name__ = "rule"


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

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn, likelihood = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> choice = ff.estimators.exact(chunk_size=2)
      >>> estimator = ff.estimators.bind(
      ...     choice, apply_fn, likelihood, ff.structures.diagonal()
      ... )
      >>> print(estimator(jnp.zeros(1), (jnp.ones((4, 1)), None)).entries)
      [4.]
    """
    model = apply_fn, likelihood, structure
    if apply_fn is not None:
        check_choices(apply_fn, likelihood)
    bound = estimator
    if isinstance(estimator, Estimator):
        _check_bound(estimator, model)
        if not estimator.bound:  # built by hand
            return estimator
        estimator = estimator.bound[0]
    if callable(estimator):
        bound = estimator(*model, **options)
    if not isinstance(bound, Estimator):
        raise ValueError(
            "estimator is a choice such as ff.estimators.hutchinson(num_probes=8), or "
            f"a function of (apply_fn, likelihood, structure); got {bound!r}."
        )
    return bound


def _check_bound(estimator: Estimator, model: tuple) -> None:
    # one that was built by hand does not say what model it is of
    own = estimator.bound or (None, None, None, estimator.structure)
    parts = zip(_MODEL, map(plain, own[1:]), map(plain, model), strict=True)
    for what, one, other in parts:
        if one is not None and one is not other and hashable(one) != hashable(other):
            raise ValueError(
                f"estimators.{estimator.name} is bound to another {what}, "
                f"{told(one)}, than the one here, {told(other)}: give it without a "
                f"model, as ff.estimators.{estimator.name}(...) with options alone."
            )
