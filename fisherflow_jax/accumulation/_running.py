"""Running an estimator over many batches."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fisherflow_jax._ground import batch as batch_parts
from fisherflow_jax._ground import checks, sharding, trees
from fisherflow_jax.accumulation import _feeding as feeding
from fisherflow_jax.accumulation import _loading as loading
from fisherflow_jax.accumulation import _spreading as spreading
from fisherflow_jax.accumulation._loading import Stacked
from fisherflow_jax.accumulation._updating import (
    Accumulation,
    accumulator,
    advance,
    refuse_bad_rows,
    taken_in,
)
from fisherflow_jax.estimators import Estimator

PyTree = Any


def accumulate(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable | Stacked,
    key: Any = None,
    *,
    decay: float | None = None,
    state: Accumulation | None = None,
    mesh: Mesh | None = None,
    progress: bool | None = None,
    bad_rows: str = "raise",
    to_batch: Callable[[Any], Any] | None = None,
) -> Accumulation:
    r"""The information of a whole data set, a batch at a time.

    .. math:: S = \sum_t \beta^{T - t} \hat F_t, \quad
       n = \sum_t \beta^{T - t} |B_t|, \quad
       \text{average} = S / n

    with the number of observations :math:`|B_t|` the sum of the batch's weights, and
    :math:`\beta = 1` unless a decay is given. Sum and count are discounted alike, so
    that the average of a constant is that constant from the first batch on, and a
    ragged batch counts by its size: a moving average without a bias to correct.

    Args:
      estimator: from `ff.estimators`, bound to a model, a likelihood and a structure.
      params: where the information is taken.
      batches: a list, a generator or a data loader of batches `(inputs, targets)` or
        `(inputs, targets, weights)`, each of which is one call of one compiled update;
        or `ff.Stacked(inputs, targets, weights)` of arrays `(num_batches, n, ...)`,
        which are scanned in one compiled program. A batch shorter than the longest so
        far is padded with rows of weight zero, and compiles nothing anew.
      key: an int or a key, for estimators that draw; batch t draws from
        `fold_in(key, t)`.
      decay: None for the sum, or the factor in (0, 1) by which the past is discounted
        at each batch.
      state: what an earlier call returned, to go on from: it holds the key. A run that
        stops and goes on equals one run, bit for bit (for equal sizes of batches).
      mesh: None, or a `jax.sharding.Mesh` over all of whose devices the rows of each
        batch are spread. Each device squares its own rows with its own key, and
        informations are summed: every device is a group. `groups` of the estimator are
        then those of one device. Without it a batch is one whole, wherever it lies.
        Of several processes each gives the rows that it has read itself, as to
        `ff.global_batches`, the mesh is over the devices of all, and so is the sum;
        arrays that span processes already are taken as they are. Without a mesh each
        process sums what it is given by itself.
      progress: whether a loader shows a bar (tqdm). None: on a terminal, once the run
        has taken two seconds. True draws it in a file, too, once a minute.
      bad_rows: of a row with a value that is not finite, or a target that cannot be:
        "raise", an error outside jit that names it; or "drop", weight 0, counted in
        `rows_skipped`, as under jit.
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["image"], item["label"])`.

    Returns:
      An `Accumulation` of arrays: `.information` (the sum), `.count`, `.num_batches`,
      `.num_skipped`, `.rows_skipped`, `.key`, and the property `.average`. Cost: the
      estimator's for each batch; memory: an information, and two batches in flight. A
      batch whose estimate is not finite moves nothing and is counted in `num_skipped`;
      so is one with a bad row where examples interact, or of an estimator that was
      built by hand.

    Raises:
      ValueError: for bad rows, unless they are dropped; without batches, for one batch
        that is in no list, a decay outside (0, 1), a missing key, parameters that are
        not finite, or a state that is not of this estimator and these parameters.
      ImportError: for `progress=True` without tqdm.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.diagonal(),
      ... )
      >>> loader = [(jnp.full((n, 1), 2.0), None) for n in (8, 8, 3)]
      >>> state = ff.accumulate(estimator, jnp.zeros(1), loader)
      >>> print(state.information.entries, state.count, state.average.entries)
      [76.] 19.0 [4.]
      >>> state = ff.accumulate(estimator, jnp.zeros(1), loader[:1], state=state)
      >>> print(state.count, state.num_batches)
      27.0 4

    References:
      Sun, "Deterministic Bounds and Random Estimates of Metric Tensors on
      Neuromanifolds", 2026.
    """
    mesh = sharding.automatic(mesh)
    functions = accumulator(estimator, decay=decay, mesh=mesh, bad_rows=bad_rows)
    params = trees.real_arrays(params, "params")
    _check_finite(params)
    if state is None:
        state = functions.init(params, key)
    else:
        state = _continued(state, estimator, params, key)
    if mesh is not None:  # whole on every device: the first batch compiles for all
        whole = NamedSharding(mesh, PartitionSpec())
        state, params = jax.device_put((state, params), whole)
    if isinstance(batches, Stacked):
        loading.converted(batches, to_batch)  # which refuses it
        if progress:
            raise ValueError(
                "progress=True needs a loader: ff.Stacked runs in one program."
            )
        stack = spreading.stack_of_batches(batches, mesh)
        run = functools.partial(_scan, estimator, mesh, decay, state, params, stack)
        after = estimator.deciding(
            run, lambda: (params, next(loading.each_of(stack)).inputs)
        )
        if bad_rows == "raise":
            for index, batch in enumerate(loading.each_of(stack)):
                where = f"batch {index}"
                refuse_bad_rows(estimator, params, (state, after), batch, where)
        return after
    batches = loading.converted(batches, to_batch)
    loading.check_loader(batches)
    start = state

    def step(state: Accumulation, batch: Any) -> tuple[Accumulation, Accumulation]:
        after = taken_in(estimator, mesh, decay, state, params, batch)
        return after, after

    def heard(number: int, batch: Any, after: Accumulation) -> None:
        if not checks.is_traced(after):
            jax.block_until_ready(after.num_batches)
        if bad_rows == "raise":
            where = f"batch {number}"
            refuse_bad_rows(estimator, params, (start, after), batch, where)

    given = spreading.laid_out(loading.with_bar(batches, progress), mesh)
    state = feeding.drive(step, state, given, heard)
    if state is start:
        raise ValueError(
            "batches is empty, so there is nothing to sum (a generator can be read "
            "only once)."
        )
    return state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan(
    estimator: Estimator,
    mesh: Mesh | None,
    decay: float | None,
    state: Accumulation,
    params: PyTree,
    stack: batch_parts.Batch,
) -> Accumulation:
    parts, rebuild = batch_parts.unpack(stack)

    def body(state: Accumulation, part: Any) -> tuple[Accumulation, None]:
        return advance(estimator, mesh, decay, state, params, rebuild(*part)), None

    return jax.lax.scan(body, state, parts)[0]


def _check_finite(params: PyTree) -> None:
    for name, leaf in trees.named_leaves(params):
        if not checks.is_finite(leaf):
            raise ValueError(
                f"parameter {name} holds a NaN or an infinite value: there is no "
                "information there."
            )


def _continued(
    state: Any, estimator: Estimator, params: PyTree, key: Any
) -> Accumulation:
    """The given state, checked to be one of this estimator at these parameters."""
    if not isinstance(state, Accumulation):
        raise ValueError(
            "state is an Accumulation, as ff.accumulate returns it (restore a "
            f"checkpoint into one); got {type(state).__name__}."
        )
    if key is not None:
        raise ValueError("a state holds its own key: leave out key to go on from it.")
    if estimator.random and state.key is None:
        raise ValueError(
            f"estimators.{estimator.name} draws at random, and the state has no key: "
            "it was made by an estimator that does not draw."
        )
    wanted = jax.eval_shape(lambda p: estimator.structure.isotropic(p, 0.0), params)
    rule = "the state's information must be of the estimator's structure and parameters"
    trees.check_shapes(state.information, wanted, rule)
    return jax.tree.map(jnp.asarray, state)
