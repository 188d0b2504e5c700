"""The state of a sum over batches, and the one update that takes a batch in."""

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fisherflow_jax import information as ops
from fisherflow_jax._ground import batch as batches
from fisherflow_jax._ground import checks, keys, screening, sharding, trees
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.structures import Structure
from fisherflow_jax.structures.capabilities import COMPENSATED

PyTree = Any


class Accumulation(NamedTuple):
    """An information gathered over batches, with all that it needs to go on.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: x @ params
      >>> estimator = ff.estimators.exact(
      ...     apply_fn, ff.likelihoods.gaussian(), ff.structures.diagonal()
      ... )
      >>> found = ff.accumulate(estimator, jnp.zeros(2), [(jnp.ones((4, 2)), None)] * 3)
      >>> print(found.count, found.information.entries, found.average.entries)
      12.0 [12. 12.] [1. 1.]
    """

    information: Any  # the (discounted) sum over observations
    count: jax.Array  # type: ignore[assignment]  # () observations, discounted alike
    num_batches: jax.Array  # () int32, batches seen, skipped ones among them
    num_skipped: jax.Array  # () int32, batches refused for a non-finite estimate
    rows_skipped: jax.Array  # () int32, bad rows, left out
    key: jax.Array | None  # key data, None if nothing is drawn

    @property
    def average(self) -> Any:
        """The information of one observation, `information / count`; NaN of none."""
        return ops.scale(self.information, 1 / self.count)


def gathered(given: Any) -> Any:
    """The information of an accumulation; anything else as it is."""
    return given.information if isinstance(given, Accumulation) else given


class Accumulator(NamedTuple):
    """An accumulation's functions. Made by `ff.accumulator`.

    Attributes:
      init: `(params, key=None) -> state`.
      update: `(state, params, batch) -> state`.
    """

    init: Callable[..., Accumulation]
    update: Callable[[Accumulation, PyTree, Any], Accumulation]


def accumulator(
    estimator: Estimator,
    *,
    decay: float | None = None,
    mesh: Mesh | None = None,
    bad_rows: str = "raise",
) -> Accumulator:
    r"""The pure functions behind `ff.accumulate`, for loops of one's own.

    .. math:: S_t = \beta S_{t-1} + \hat F_t, \quad n_t = \beta n_{t-1} + |B_t|,
       \quad \beta = 1 \text{ without decay}

    Batch t draws from `fold_in(key, t)`, counted from 0 by the state: a run that stops
    and goes on from its state is one run, bit for bit.

    Args:
      estimator: from `ff.estimators`, bound to a model, a likelihood and a structure.
      decay: None, or the factor in (0, 1) by which the past is discounted each batch.
      mesh: None, or devices that each square their own rows of a batch, with a key of
        their own, before informations are summed.
      bad_rows: of a row with a value that is not finite, or a target that cannot be:
        "raise", an error outside jit that names it; or "drop", weight 0, counted in
        `rows_skipped`, as under jit.

    Returns:
      An `Accumulator(init, update)`. `update` costs what the estimator costs and an
      addition; it is compiled once an estimator and shape, and may be used inside
      `jax.jit` and `jax.lax.scan`. A batch whose estimate is not finite moves nothing
      and is counted in `num_skipped`; so is one with a bad row where examples interact,
      or of an estimator that was built by hand.

    Raises:
      ValueError: for a decay outside (0, 1); at `init`, for a drawing estimator without
        a key; at `update`, for a batch that `ff.Batch` or the mesh does not take.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> estimator = ff.estimators.exact(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(),
      ...     ff.structures.diagonal(),
      ... )
      >>> gather, params = ff.accumulator(estimator), jnp.zeros(2)
      >>> stack = jnp.ones((5, 3, 2)), jnp.zeros((5, 3))  # five batches of three
      >>> state, _ = jax.lax.scan(
      ...     lambda state, batch: (gather.update(state, params, batch), None),
      ...     gather.init(params),
      ...     stack,
      ... )
      >>> print(state.information.entries, state.count, state.average.entries)
      [15. 15.] 15.0 [1. 1.]
    """
    if not isinstance(estimator, Estimator):
        raise ValueError(
            "accumulate runs an estimator that is bound to a model: give it "
            "estimator(apply_fn, likelihood, structure), such as "
            "ff.estimators.exact(apply_fn, likelihood, ff.structures.diagonal()); got "
            f"{estimator!r}."
        )
    if decay is not None:
        checks.fraction(decay, "decay")
    sharding.automatic(mesh)  # which says what is no mesh
    screening.check_option(bad_rows)

    def init(params: PyTree, key: Any = None) -> Accumulation:
        if estimator.random and key is None:
            raise ValueError(
                f"estimators.{estimator.name} draws at random: give it a key."
            )
        params = trees.real_arrays(params, "params")
        zero = jnp.zeros((), trees.float_dtype(params))
        return Accumulation(
            information=estimator.structure.empty(params),
            count=zero,
            num_batches=jnp.zeros((), jnp.int32),
            num_skipped=jnp.zeros((), jnp.int32),
            rows_skipped=jnp.zeros((), jnp.int32),
            key=keys.key_data(key) if estimator.random else None,
        )

    def update(state: Accumulation, params: PyTree, batch: Any) -> Accumulation:
        given, own = batches.by_name(batch), sharding.automatic(mesh)
        batch = batches.as_batch(given, values=False)
        after = taken_in(estimator, own, decay, state, params, batch)
        if bad_rows == "raise":
            refuse_bad_rows(estimator, params, (state, after), given)
        return after

    return Accumulator(init, update)


def taken_in(
    estimator: Estimator,
    mesh: Mesh | None,
    decay: float | None,
    state: Accumulation,
    params: PyTree,
    batch: Any,
) -> Accumulation:
    """`advance`, for which values may have to tell whether examples interact."""
    run = functools.partial(advance, estimator, mesh, decay, state, params, batch)
    return estimator.deciding(run, lambda: (params, batch.inputs))


# a function of the module, so that runs over the same estimator share what is compiled
@functools.partial(jax.jit, static_argnums=(0, 1))
def advance(
    estimator: Estimator,
    mesh: Mesh | None,
    decay: float | None,
    state: Accumulation,
    params: PyTree,
    batch: Any,
) -> Accumulation:
    """`state` with one more batch."""

    def take_in(state: Accumulation, params: PyTree, batch: Any) -> Accumulation:
        batch = batches.as_batch(batch, values=False)
        params = trees.real_arrays(params, "params")
        batch, rows_skipped = estimator.screen(params, batch)(batch)
        key = None
        if state.key is not None:
            key = jax.random.fold_in(keys.typed_key(state.key), state.num_batches)
        if mesh is None:
            information = estimator.compute(params, batch, key)
        else:
            information = _sum_over_shards(estimator, mesh, params, batch, key)
        before, count = state.information, state.count
        if decay is not None:
            before, count = ops.scale(before, decay), count * decay
        number = batches.num_observations(batch, each_target=False)
        gathered = ops.add(before, information), count + number.astype(count.dtype)
        sound = jnp.isfinite(number) & trees.all_finite(information)
        information, count = jax.tree.map(
            lambda new, old: jnp.where(sound, new.astype(old.dtype), old),
            gathered,
            (state.information, state.count),
        )
        return Accumulation(
            information=information,
            count=count,
            num_batches=state.num_batches + 1,
            num_skipped=state.num_skipped + jnp.where(sound, 0, 1).astype(jnp.int32),
            rows_skipped=state.rows_skipped + rows_skipped,
            key=state.key,
        )

    return sharding.in_auto_mode(take_in, state, state, params, batch)


def refuse_bad_rows(
    estimator: Estimator,
    params: PyTree,
    states: tuple[Accumulation, Accumulation],
    given: Any,
    where: str = "the batch",
) -> None:
    """Raises for what was left out, or refused, between two states that are at hand."""
    counts = [(state.rows_skipped, state.num_skipped) for state in states]
    if not checks.is_traced((counts, given)) and counts[0] != counts[1]:
        batch = batches.as_batch(given, values=False)
        estimator.screen(params, batch).refuse(given, where)


def _gathering(structure: Structure, axes: Any) -> Structure:
    """The structure of the vectors of all devices, which reduces them once."""

    def reduce(stack: PyTree) -> Any:
        return structure.reduce(jax.lax.all_gather(stack, axes, tiled=True))

    return structure._replace(reduce=reduce)


def _sum_over_shards(
    estimator: Estimator,
    mesh: Mesh,
    params: PyTree,
    batch: batches.Batch,
    key: jax.Array | None,
) -> Any:
    """The sum over the mesh's devices of `estimator(params, shard, its own key)`.

    Squares are taken before the sum: summing pulled-back vectors over devices and
    squaring once would throw away what each device knows on its own, for a drawing
    estimator the variance of as many groups as there are devices.
    """
    count = batches.num_examples(batch)
    if count % mesh.size:
        raise ValueError(
            f"a batch of {count} examples does not divide over the mesh's {mesh.size} "
            "devices: pad it with rows of weight zero."
        )
    if mesh.size > 1 and estimator.model is not None:
        why = f"so that {mesh.size} devices cannot each have a part of the batch"
        estimator.model.check_alone(params, batch.inputs, why)
    axes, structure = mesh.axis_names, estimator.structure
    together = structure.gathers and estimator.rebuild is not None
    if together:
        estimator = estimator.with_structure(_gathering(structure, axes))
    rows: Any = PartitionSpec(axes)
    whole = PartitionSpec()

    def of_shard(params: PyTree, shard: batches.Batch, key: jax.Array | None) -> Any:
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        information = estimator.compute(params, shard, key)
        if together:
            return information
        if COMPENSATED in structure.supports:  # adds entry by entry
            return jax.tree.map(lambda x: jax.lax.psum(x, axes), information)
        stack = jax.lax.all_gather(information, axes)
        parts = (jax.tree.map(itemgetter(i), stack) for i in range(mesh.size))
        return functools.reduce(ops.add, parts)

    # check_vma would make each shard's pull-back a sum over all shards, unsquared
    return jax.shard_map(
        of_shard,
        # within jax.set_mesh it is that mesh, whose axes in_auto_mode may have changed
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=(whole, batches.by_axis(batch, rows, whole), whole),
        out_specs=whole,
        check_vma=False,
    )(params, batch, key)
