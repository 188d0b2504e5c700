"""A model: traced once a shape, its log-likelihood, its loss, and parts of it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import calling, checks, choices, screening, trees
from fisherflow_jax._ground import sharding as meshes
from fisherflow_jax._ground.batch import Batch
from fisherflow_jax.layers import (
    Layers,
    Undecided,
    expecting,
    interaction,
    moves,
    one_row,
)
from fisherflow_jax.layers._compat import as_function, has_tangents
from fisherflow_jax.likelihoods import Likelihood

PyTree = Any


# What to do with a model whose examples interact, where each row stands for itself.
_WAYS_OUT = (
    "give a model that is evaluated row by row, such as batch normalisation with its "
    "statistics in ff.Shared; or make the batch one example, as `lambda params, "
    "inputs: apply_fn(params, inputs[0])[None]` does of inputs[None]. batched=True, of "
    "ff.layers.find_layers and of estimators, is for informations of whole batches"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The pair of apply_fn and likelihood, and what shapes alone tell of it.

    `batched`: what was said of whether its examples interact; None: nothing.
    """

    apply_fn: Callable
    likelihood: Likelihood
    batched: bool | None = None
    known: dict[Any, Any] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        check_choices(self.apply_fn, self.likelihood)

    def traced_once(self) -> "Model":
        """For one computation, in which `apply_fn` is traced once a shape."""
        return dataclasses.replace(self, apply_fn=once(self.apply_fn))

    def told(self, what: str, given: PyTree, tell: Callable) -> Any:
        """`tell(*given)`, of which shapes decide: once for each."""
        return _told(self.known, what, given, tell)

    def outputs(self, params: PyTree, inputs: PyTree) -> Any:
        """The outputs' shapes."""

        def shapes(*given: PyTree) -> Any:
            _, arrays, rebuild = by_shapes(given)
            return jax.eval_shape(lambda *x: self.apply_fn(*rebuild(x)), *arrays)

        with calling.telling(self.apply_fn, params, inputs):
            return self.told("outputs", (params, batches.unshare(inputs)), shapes)

    def interaction(self, params: PyTree, inputs: PyTree) -> str | None:
        """What takes the examples of a batch together, if anything does.

        Raises:
          Undecided: where neither the program nor values say it.
        """
        if self.batched is not None:
            return "batched=True" if self.batched else None
        own = plain(self.apply_fn)
        tell = functools.partial(interaction, self.apply_fn, of=own)
        if isinstance(self.apply_fn, Once):  # which several models may share
            return self.apply_fn.told("interaction", (params, inputs), tell)
        return self.told("interaction", (params, inputs), tell)

    def check_alone(self, params: PyTree, inputs: PyTree, why: str) -> None:
        """Raises where rows cannot be evaluated one by one, as is needed (why)."""
        together = self.interaction(params, inputs)
        if together is not None:
            raise ValueError(
                f"the model's examples interact ({together}), {why}: {_WAYS_OUT}."
            )
        self.outputs_alone(params, inputs)

    def outputs_alone(self, params: PyTree, inputs: PyTree) -> Any:
        """The outputs' shapes of the first example, a row.

        Raises:
          ValueError: where the model fails on one example, or gives it no one row.
        """
        shapes = functools.partial(jax.eval_shape, lambda x: x[:1])
        one = batches.map_inputs(shapes, inputs)
        return one_row(lambda: self.outputs(params, one), one)

    def screen(
        self, params: PyTree, batch: Batch, *, left_out: bool = True
    ) -> screening.Screen:
        """What tells the bad rows of batches of this shape, which may be left out."""

        def tell(params: PyTree, batch: Batch) -> screening.Screen:
            likelihood = self.likelihood.at_start
            model = dataclasses.replace(self.traced_once(), likelihood=likelihood)
            if left_out:
                model.check(params, batch)
            outputs, targets = model.outputs(params, batch.inputs), batch.targets
            screen = screening.Screen(likelihood.name, together=False)
            if left_out:
                try:
                    together = model.interaction(params, batch.inputs) is not None
                except Undecided:  # then it may be
                    together = True
                screen = dataclasses.replace(screen, together=together)
            if targets is None:
                return screen
            shape = jax.eval_shape(likelihood.log_prob, outputs, targets).shape
            if likelihood.observing is not None:  # a target may be missing
                shape = likelihood.shape_of_targets(outputs)
            return dataclasses.replace(
                screen,
                support=likelihood.support,
                num_classes=likelihood.num_classes(outputs),
                shape=shape,
            )

        return self.told(f"screen, {left_out}", (params, batch), tell)

    def admitted(
        self, params: PyTree, given: Any, bad_rows: str, where: str = "the batch"
    ) -> tuple[Batch, jax.Array]:
        """A batch without its bad rows, and how many these are, `()` int32.

        Where they are at hand they raise, or not.
        """
        batch = batches.as_batch(given, values=False)
        screen = self.screen(params, batch)
        told = screen.together or bad_rows == "raise"
        if checks.is_traced(given):
            return screen(batch)
        clean, skipped, nothing_bad = screening.at_hand(screen, batch)
        if told and checks.is_traced(skipped):  # what a trace closes over
            with jax.ensure_compile_time_eval():
                screen.refuse(given, where)
        elif told and not nothing_bad:
            screen.refuse(given, where)
        return clean, skipped

    def check(self, params: PyTree, batch: Batch, layers: Layers | None = None) -> None:
        """Raises where the outputs do not fit the batch or the likelihood.

        Inputs other than those that `layers` were found for are named where it fails.
        """
        with expecting(layers, batch.inputs):
            outputs = self.outputs(params, batch.inputs)
        count = batches.num_examples(batch)
        shape = getattr(outputs, "shape", None)
        if not shape or shape[0] != count:
            raise ValueError(
                "apply_fn(params, inputs) must return one array of outputs whose "
                f"leading axis is the examples' (n = {count}); got {outputs}."
                f"{calling.several(outputs)}"
            )
        self.likelihood.check(outputs, batch.targets)
        self._check_known(params, batch.inputs)
        _check_observed(self.likelihood, batch)
        if batch.weights.ndim > 1:
            shape = self.likelihood.shape_of_targets(outputs)
            if batch.weights.shape != shape:
                raise ValueError(
                    f"weights have shape {batch.weights.shape}: give one an example, "
                    f"({count},), or one a target, {shape}."
                )

    def _check_known(self, params: PyTree, inputs: PyTree) -> None:
        """Raises where parameters move what the likelihood takes as known."""
        known = self.likelihood.known
        if known is None:
            return

        def tell(params: PyTree, inputs: PyTree) -> bool:
            return moves(lambda *at: known(self.apply_fn(*at)), params, inputs)

        if self.told("known", (params, batches.unshare(inputs)), tell):
            raise ValueError(
                f"{self.likelihood}: the outputs behind the mean are noise that is "
                "known, and here the parameters move them: their information would "
                "lack what the noise tells of them. Noise that is to be learned has "
                "ff.likelihoods.gaussian_location_scale(); jax.lax.stop_gradient(noise)"
                " takes it as known at the present estimate."
            )

    def log_likelihood(self, params: PyTree, batch: Batch) -> jax.Array:
        """The weighted sum of the examples' log-likelihoods, a number."""
        return log_likelihood(self.apply_fn, self.likelihood, params, batch)

    def loss(self, params: PyTree, batch: Batch) -> jax.Array:
        """Minus its mean."""
        total = self.log_likelihood(params, batch)
        return -total / jnp.sum(batch.weights).astype(total.dtype)


def _told(known: dict, what: str, given: PyTree, tell: Callable) -> Any:
    key = what, by_shapes(given)[0]
    if key not in known:
        known[key] = tell(*given)
    return known[key]


def check_function(apply_fn: Any, call: str = "") -> None:
    """Raises unless it is one; `call` shows the order of arguments asked for."""
    if not callable(apply_fn):
        raise TypeError(
            "apply_fn is a function (params, inputs) -> outputs, and stands before "
            f"likelihood{'' if call else ', params'} and data; got "
            f"{checks.described(apply_fn)}.{call and f' The order is {call}.'}"
        )


def check_choices(apply_fn: Any, likelihood: Any, call: str = "") -> None:
    """Raises unless they are a function and a likelihood, in this order."""
    check_function(apply_fn, call)
    checks.made(
        likelihood,
        Likelihood,
        "likelihood stands after apply_fn and",
        "ff.likelihoods.categorical()",
        "A loss function is no likelihood: it is the log-probability of targets that "
        "makes one, ff.likelihoods.from_log_prob(log_prob, sample).",
    )


class Once:
    """An `apply_fn` that is traced once a shape. Made by `once`."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.traced: dict[Any, tuple[Callable, Any, bool]] = {}
        self.known: dict[Any, Any] = {}

    def told(self, what: str, given: PyTree, tell: Callable) -> Any:
        """As `Model.told`, of what depends on the function alone."""
        return _told(self.known, what, given, tell)

    def __call__(self, params: PyTree, inputs: PyTree) -> Any:
        run, output_tree, arrays, _ = self._traced(params, inputs)
        return output_tree.unflatten(run(*arrays))

    def has_tangents(self, params: PyTree, inputs: PyTree) -> bool:
        """Whether it can be differentiated forwards: no `jax.custom_vjp` is in it."""
        return self._traced(params, inputs)[3]

    def _traced(self, params: PyTree, inputs: PyTree) -> tuple:
        key, arrays, rebuild = by_shapes((params, inputs))
        key = key, jax.sharding.get_abstract_mesh()
        if key not in self.traced:
            with calling.telling(self.function, params, inputs):
                jaxpr, outputs = jax.make_jaxpr(
                    lambda *arrays: self.function(*rebuild(arrays)), return_shape=True
                )(*arrays)
            structure = jax.tree.structure(outputs)
            self.traced[key] = as_function(jaxpr), structure, has_tangents(jaxpr)
        run, output_tree, tangents = self.traced[key]
        return run, output_tree, arrays, tangents


class Traced(NamedTuple):
    """A function, run once, of one argument and of all arrays that it closes over."""

    run: Callable[[Sequence, PyTree], Any]
    arrays: Sequence

    @classmethod
    def of(cls, function: Callable[[PyTree], Any], like: PyTree) -> "Traced":
        """The function, for arguments with the shapes of `like`."""
        closed, outputs = jax.make_jaxpr(function, return_shape=True)(like)

        def run(arrays: Sequence, argument: PyTree) -> Any:
            call = as_function(closed, arrays)
            return jax.tree.unflatten(
                jax.tree.structure(outputs), call(*jax.tree.leaves(argument))
            )

        return cls(run, list(closed.consts))

    def __call__(self, argument: PyTree) -> Any:
        return self.run(self.arrays, argument)


def once(apply_fn: Callable) -> Once:
    """`apply_fn`, whose Python runs once a shape; its equations are those of each call.

    For one update, whose search, scores and curvature call the model again and again.
    It keeps what was traced, tracers that `apply_fn` closes over among it: make it anew
    for each update, within the trace of the update.
    """
    return apply_fn if isinstance(apply_fn, Once) else Once(apply_fn)


def plain(apply_fn: Any) -> Any:
    """The function that was given to `once`, or what never was."""
    return apply_fn.function if isinstance(apply_fn, Once) else apply_fn


def derivative(
    apply_fn: Once, params: PyTree, inputs: PyTree, direction: PyTree
) -> tuple[jax.Array, jax.Array]:
    r"""The outputs, and their derivative J u along a direction of the parameters.

    One tangent pass; of a model with a `jax.custom_vjp`, which has none, the difference
    of two forward passes, `(f(\theta + h u) - f(\theta)) / h`. There h is the root of
    the precision, on the scale of the parameters, and at most one: the relative error
    is about that root too.
    """

    def run(params: PyTree) -> jax.Array:
        return apply_fn(params, inputs)

    if apply_fn.has_tangents(params, inputs):
        return jax.jvp(run, (params,), (direction,))
    outputs = run(params)
    wide = trees.wide_dtype(outputs.dtype)
    coarsest = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
    size, length = (optax.tree.norm(trees.widen(tree)) for tree in (params, direction))
    share = coarsest**0.5 * jnp.where(size > 0, size, 1.0) / length
    share = jnp.minimum(share, 1.0).astype(wide)
    moved = jax.tree.map(
        lambda x, d: x + (share.astype(wide) * d).astype(x.dtype), params, direction
    )
    return outputs, (run(moved).astype(wide) - outputs.astype(wide)) / share


def by_shapes(tree: PyTree) -> tuple[Any, list, Callable[[Sequence], PyTree]]:
    """What tells a tree's shapes and types from others, its arrays, and its rebuilding.

    What is no array (a flag among shared inputs) is known by its identity.
    """
    leaves, treedef = jax.tree.flatten(tree)
    held = [None if trees.is_array(x) else _Held(x) for x in leaves]
    arrays = [x for x in leaves if trees.is_array(x)]

    def rebuild(arrays: Sequence) -> PyTree:
        rest = iter(arrays)
        filled = [next(rest) if x is None else x.value for x in held]
        return jax.tree.unflatten(treedef, filled)

    return (treedef, *held, *map(_type, arrays)), arrays, rebuild


def _type(array: Any) -> Any:
    return array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)


class _Held:
    """A value that equals itself alone, and stays while it is asked for."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def weighted_sum(
    apply_fn: Callable, function: Callable, params: PyTree, batch: Batch
) -> jax.Array:
    """`function(outputs, targets)`, weighted and summed over targets and examples.

    In float32 or wider, whatever the type of the outputs.
    """
    outputs = apply_fn(params, batches.unshare(batch.inputs))

    def total(outputs: PyTree, batch: Batch) -> jax.Array:
        values = function(outputs, batch.targets)
        values = values.astype(trees.wide_dtype(values.dtype))
        return batches.weighted_total(batch, values)

    weighed = batch._replace(inputs=None)  # of which it sees the outputs alone
    return meshes.replicated(total, outputs, weighed)


def log_likelihood(
    apply_fn: Callable, likelihood: Likelihood, params: PyTree, batch: Batch
) -> jax.Array:
    """The weighted sum of the examples' log-likelihoods, a number."""
    if batch.targets is None:
        raise ValueError("the log-likelihood needs targets; the batch's are None.")
    _check_observed(likelihood, batch)
    of_all, there = batches.observed(batch)
    if likelihood.observing is None or there is None:
        return weighted_sum(apply_fn, likelihood.log_prob, params, batch)
    observing = likelihood.observing

    def log_prob(outputs: PyTree, given: tuple) -> jax.Array:
        targets, there = given
        return observing(there).log_prob(outputs, targets)

    of_all = of_all._replace(targets=(batch.targets, there))
    return weighted_sum(apply_fn, log_prob, params, of_all)


def _check_observed(likelihood: Likelihood, batch: Batch) -> None:
    """Raises for weights that mean nothing, where they are at hand."""
    if likelihood.observing is None or batch.weights.ndim == 1:
        return
    if not checks.holds((batch.weights == 0) | (batch.weights == 1)):
        raise ValueError(
            f"{likelihood.name}: errors that go together have one weight an example: "
            "those of targets must be 0 (missing) or 1; give weights (n,), and "
            "ff.Batch(..., mask=...) for what is missing."
        )


def negative_log_likelihood(
    apply_fn: Callable, likelihood: Likelihood, *, bad_rows: str = "raise"
) -> Callable[[PyTree, Any], jax.Array]:
    r"""The mean loss of a batch, on the scale of the Fisher information.

    .. math:: \ell(\theta) = -\frac{1}{\sum_i w_i}
       \sum_i w_i \log p(y_i | f(\theta, x_i))

    Its gradient is minus the mean score and its expected Hessian the mean Fisher
    information, so that gradients from Optax and curvature from this package agree.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      bad_rows: a row with a value that is not finite, or a target that cannot be:
        "raise", an error that names it; or "drop", weight 0, as it has under jit.

    Returns:
      A function `(params, batch) -> ()`; the batch is `(inputs, targets)`, `(inputs,
      targets, weights)` or `ff.Batch`. The weights may be those of examples or of
      targets: the loss is divided by their sum. Cost: one forward pass.

    Raises:
      ValueError: for bad rows outside jit, unless they are dropped. NaN under jit where
        examples interact, so that no row can be left out.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> loss = ff.negative_log_likelihood(
      ...     lambda params, x: x @ params, ff.likelihoods.poisson()
      ... )
      >>> print(loss(jnp.zeros(2), (jnp.ones((3, 2)), jnp.array([0.0, 1.0, 1.0]))))
      1.0
    """

    screening.check_option(bad_rows)
    model = Model(apply_fn, likelihood)

    def loss(params: PyTree, batch: Any) -> jax.Array:
        traced = checks.is_traced(params)
        one = model.traced_once() if traced else model
        return one.loss(params, one.admitted(params, batch, bad_rows)[0])

    return loss


def scores(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batch: Any,
    *,
    bad_rows: str = "raise",
) -> PyTree:
    r"""The score of every example, weighted: the gradient of its log-probability.

    .. math:: w_i \nabla_\theta \log p(y_i | f(\theta, x_i))

    They sum to the score of the batch. A row of weight zero has a score of zero,
    whatever it holds; the log-probabilities of several targets of one example are
    summed.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      params: pytree of real arrays.
      batch: `(inputs, targets)`, `(inputs, targets, weights)` or `ff.Batch`.
      bad_rows: "raise", or "drop": a row with a value that is not finite, or a target
        that cannot be, has a score of zero, as it has under jit.

    Returns:
      A pytree like the parameters with leaves `(n, *leaf.shape)`, in float32 or wider.
      Cost: one forward and one backward pass an example; memory n times the parameters.

    Raises:
      ValueError: without targets; where outputs, targets and likelihood do not fit; for
        bad rows outside jit, unless they are dropped; for a model whose examples
        interact, of which no row has a score of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> model = lambda params, x: x @ params, ff.likelihoods.gaussian()
      >>> x, y = jnp.array([[1.0, 2.0], [1.0, 0.0]]), jnp.array([3.0, 1.0])
      >>> ff.scores(*model, jnp.zeros(2), (x, y))  # residuals times inputs
      Array([[3., 6.],
             [1., 0.]], dtype=float32)
    """
    screening.check_option(bad_rows)
    own = choices.shared(Model(apply_fn, likelihood))
    model = own.traced_once()
    params, given = trees.real_arrays(params, "params"), batches.by_name(batch)
    if given.targets is None:
        raise ValueError("scores need targets; the batch's are None.")
    batch, _ = model.admitted(params, given, bad_rows)

    def scored(params: PyTree, batch: Batch) -> PyTree:
        check_rows(model, params, batch)
        return choices.run(own, row_scores, params, batch)

    return meshes.replicated(scored, params, batch)


def check_rows(model: Model, params: PyTree, batch: Batch) -> None:
    """Raises where rows have no scores of their own."""
    model.check(params, batch)
    model.check_alone(params, batch.inputs, "so that no row has a score of its own")


def row_scores(model: Model, params: PyTree, batch: Batch) -> PyTree:
    """The weighted score of every row, leaves `(n, *leaf.shape)`."""
    parts, rebuild = batches.unpack(batch)

    def one(parts: tuple) -> PyTree:
        row = rebuild(*jax.tree.map(lambda x: x[None], parts))
        score = trees.widen(jax.grad(model.log_likelihood)(params, row))
        return batches.zero_if_missing(row, score)

    with calling.mapping("leave it out, or take ff.estimators with chunk_size=1"):
        return jax.vmap(one)(parts)


def only(
    apply_fn: Callable, params: PyTree, chosen: Callable[[str], bool] | PyTree
) -> tuple[Callable, PyTree]:
    """A model of some of its parameters, the others held at their values.

    The last layer, adapters, or any mask: everything in this package then sees the
    chosen parameters alone.

    Args:
      apply_fn: `(params, inputs) -> outputs`.
      params: all parameters.
      chosen: a function of a parameter's name (`layers.0.weight`), a list of names
        (`["head"]` chooses all that lies under it), booleans like the parameters, or a
        prefix of them.

    Returns:
      `(apply_chosen, chosen_params)`: a function `(chosen_params, inputs) -> outputs`,
      and the chosen parameters: `params` with None in place of the others. No pass of
      the model.

    Raises:
      ValueError: if no parameter is chosen, or `chosen` does not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["head"]
      >>> params = {"w": jnp.ones((2, 3)), "head": jnp.ones(3)}
      >>> model, head = ff.only(apply_fn, params, ["head"])
      >>> head
      {'head': Array([1., 1., 1.], dtype=float32), 'w': None}
      >>> model(head, jnp.zeros((1, 2)))
      Array([0.], dtype=float32)
    """
    mask = trees.chosen(params, chosen)
    kept = jax.tree.map(lambda keep, x: x if keep else None, mask, params)
    held = jax.tree.map(lambda keep, x: None if keep else x, mask, params)

    def apply_chosen(chosen_params: PyTree, inputs: PyTree) -> Any:
        whole = jax.tree.map(
            lambda keep, x, y: x if keep else y, mask, chosen_params, held
        )
        return apply_fn(whole, inputs)

    return apply_chosen, kept
