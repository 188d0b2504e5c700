"""What two processes find, each with rows of its own.

    python two_processes.py ADDRESS INDEX FOLDER NAME ...

runs the functions of these names and writes what they give, or raise, to a file INDEX.

A program of its own, since a process is one of several from its start or not at all.
Imported, in one process, the same functions are given all rows and no mesh.
"""

import pickle
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fisherflow_jax as ff
from fisherflow_jax._ground.processes import on_host

if __name__ == "__main__":  # before anything asks for a device
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

COUNTS = 24, 24, 8  # rows of three batches, the last one ragged
SHARE = 5 / 8  # of them what process 0 reads


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def network(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"]


def line(params, x):
    return x @ params


def followed_by_none(params, x):
    """Whether its examples interact, values must tell."""
    return jax.lax.while_loop(lambda z: z[0, 0] > 9, lambda z: z * 0.5, x) @ params


PARAMS = {
    "b": np.zeros(6, np.float32),
    "v": draw(6, 3, seed=0),
    "w": draw(4, 6, seed=1),
}
START = np.zeros(4, np.float32)
CLASSES = network, ff.likelihoods.categorical()
REGRESSION = line, ff.likelihoods.gaussian()


def loader_of(targets, seed):
    """Batches of inputs, targets, and weights that are not all one."""
    loader = []
    for number, count in enumerate(COUNTS):
        x = draw(count, 4, seed=seed + number)
        weights = np.random.default_rng(number).uniform(0.5, 2, count)
        loader.append((x, targets(x), weights.astype(np.float32)))
    return loader


LABELLED = loader_of(lambda x: np.argmax(x[:, :3], 1).astype(np.int32), seed=10)
MEASURED = loader_of(lambda x: x @ np.arange(4, dtype=np.float32) + x[:, 0] ** 2, 20)


class Alone:
    """One process, which has all rows."""

    mesh = None

    def own(self, batch, axis=0):
        return batch

    def batches(self, loader, share=None):
        return loader

    def spread(self, tree):
        return jax.tree.map(jnp.asarray, tree)


class Together:
    """One of two processes, which has a part of each batch's rows."""

    def __init__(self):
        # of axes that are not explicit: the compiler places what operations give
        auto = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)

    def own(self, batch, axis=0, share=SHARE):
        cut = round(share * batch[0].shape[axis])
        return tuple(np.split(x, [cut], axis)[jax.process_index()] for x in batch)

    def batches(self, loader, share=SHARE):
        parts = [self.own(batch, share=share) for batch in loader]
        return ff.global_batches(parts, self.mesh)

    def spread(self, tree):
        """Leaves of which each process holds some rows, or all where they are odd."""

        def put(x):
            axes = P("data") if np.ndim(x) and len(x) % 2 == 0 else P()
            sharding = NamedSharding(self.mesh, axes)
            return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

        return jax.tree.map(put, tree)


# ---- numbers that must be those of one process


FLOW = ff.fisher_flow(*CLASSES, structure=ff.structures.diagonal(), prior_precision=0.5)
LINE = ff.fisher_flow(*REGRESSION, robust=True)
UPDATE = jax.jit(FLOW.update)


def learnt(world, flow=FLOW, start=PARAMS, loader=LABELLED, update=None):
    state, infos = flow.init(start), []
    for batch in world.batches(loader):
        state, info = (update or flow.update)(state, batch)
        infos.append(info.decrement)
    return state, infos


def plain(tree):
    """Without what compensated sums keep of their rounding."""
    kind = ff.information.is_information
    return jax.tree.map(
        lambda x: ff.information.plain(x) if kind(x) else x, tree, is_leaf=kind
    )


def flow(world):
    return plain(
        {
            "diagonal": learnt(world),
            "full": learnt(world, LINE, START, MEASURED),
            "compiled": learnt(world, LINE, START, MEASURED, jax.jit(LINE.update)),
        }
    )


def of_batches(world):
    """Other functions of a flow."""
    batch, *_ = world.batches(LABELLED)
    first, *rest = batches = list(world.batches(MEASURED))
    state, _ = learnt(world, LINE, START, MEASURED)
    return plain(
        {
            "evaluated": FLOW.evaluate(PARAMS, batch),
            "started": ff.warm_start(LINE, LINE.init(START), first).mean,
            "refined": ff.refine(LINE, state, batches).mean,
        }
    )


def sharded(world):
    """Parameters and a prior of which each process holds a part."""
    params = world.spread(PARAMS)
    prior = world.spread(jax.tree.map(lambda x: 1 + np.abs(x), PARAMS))
    own = ff.fisher_flow(
        *CLASSES, structure=ff.structures.diagonal(), prior_precision=prior
    )
    state, batch = own.init(params), next(iter(world.batches(LABELLED)))
    for _ in range(2):
        state, _ = own.update(state, batch)
    given = ff.posterior(state.mean, state.information, prior_precision=prior)
    return state, ff.standard_error(state), given.mean


def run(world):
    """Of a loader each process reads its own rows; one of them shows a bar."""
    loader = [world.own(batch) for batch in MEASURED]
    state = ff.run(LINE, LINE.init(START), loader, mesh=world.mesh, progress=True)
    return plain(state)


SQUARES = ff.estimators.exact(*CLASSES, ff.structures.diagonal())


def accumulate(world):
    parts = [world.own(batch) for batch in LABELLED]
    first = ff.accumulate(SQUARES, PARAMS, parts[:1], mesh=world.mesh)
    return {
        "whole": ff.accumulate(SQUARES, PARAMS, parts, mesh=world.mesh),
        "resumed": ff.accumulate(
            SQUARES, PARAMS, parts[1:], mesh=world.mesh, state=first
        ),
    }


def accumulate_otherwise(world):
    low_rank = ff.estimators.exact(*CLASSES, ff.structures.low_rank(36))
    parts = [world.own(batch) for batch in LABELLED]
    stack = tuple(np.stack(x) for x in zip(*LABELLED[:2], strict=True))
    scanned = ff.Stacked(*world.own(stack, axis=1))
    found = ff.accumulate(low_rank, PARAMS, parts[:1], mesh=world.mesh)
    return {
        "stacked": ff.accumulate(SQUARES, PARAMS, scanned, mesh=world.mesh),
        "shared": ff.accumulate(SQUARES, PARAMS, list(world.batches(LABELLED))),
        "low_rank": ff.information.to_dense(found.information, PARAMS),
    }


LAYERS = ff.layers.find_layers(network, PARAMS, LABELLED[0][0])
OPTIMIZER = ff.kfac(0.1, *CLASSES, LAYERS, max_kl=0.03, key=0)
LOSS = ff.negative_log_likelihood(*CLASSES)


def train(params, state, batch):
    value, gradients = jax.value_and_grad(LOSS)(params, batch)
    updates, state = OPTIMIZER.update(gradients, state, params, batch=batch)
    return optax.apply_updates(params, updates), state, value


TRAIN = jax.jit(train)


def kfac(world, train=TRAIN):
    """Of halves: what is drawn for a row depends on its place in the batch."""
    params, losses = jax.tree.map(jnp.asarray, PARAMS), []
    state = OPTIMIZER.init(params)
    for batch in world.batches(LABELLED[:2] * 2, share=1 / 2):
        params, state, loss = train(params, state, batch)
        losses.append(loss)
    information = ff.get_information(state, 100)
    return params, losses, ff.information.diagonal(information, params)


def kfac_eagerly(world):
    return kfac(world, train)


def merge(world):
    start = LINE.init(START)
    workers = [LINE.update(start, batch)[0] for batch in world.batches(MEASURED)]
    models = [
        ff.posterior(one.mean, one.information, prior_precision=1.0) for one in workers
    ]
    return plain(ff.merge(workers, start)), ff.merge(models).mean


def read(world):
    """What is read off a state."""
    state, _ = learnt(world)
    state_of_line, _ = learnt(world, LINE, START, MEASURED)
    batch, *_ = world.batches(LABELLED)
    return {
        "predicted": ff.predict(state, *CLASSES, LABELLED[0][0]).mean,
        "loss": LOSS(state.mean, batch),
        "interval": ff.confidence_interval(state),
        "sandwich": ff.standard_error(state_of_line, robust=True),
        "summary": ff.summary(state_of_line).p_value,
        "test": ff.wald_test(state_of_line, lambda params: params).statistic,
    }


def told(world):
    """Values tell whether examples interact."""
    model = followed_by_none, ff.likelihoods.gaussian()
    own = ff.fisher_flow(*model)
    batch = next(iter(world.batches(MEASURED)))
    return own.update(own.init(START), batch)[0].mean


NUMBERS = flow, run, accumulate, kfac, merge
MORE_NUMBERS = of_batches, sharded, accumulate_otherwise, kfac_eagerly, read, told


# ---- errors, in both processes


def of(world, loader):
    return list(ff.global_batches(loader, world.mesh))


def own_or(world, batch, other):
    """Process 1 has another batch."""
    return world.own(batch) if jax.process_index() == 0 else other


def bad_row(world):
    x, *rest = LABELLED[0]
    x = x.copy()
    x[20, 1] = np.nan  # of process 1
    return next(iter(world.batches([(x, *rest)])))


def a_bad_row_of_a_flow(world):
    FLOW.update(FLOW.init(PARAMS), bad_row(world))


def a_bad_row_of_a_loss(world):
    LOSS(PARAMS, bad_row(world))


def a_bad_row_of_an_optimizer(world):
    params = jax.tree.map(jnp.asarray, PARAMS)
    OPTIMIZER.update(params, OPTIMIZER.init(params), params, batch=bad_row(world))


def a_bad_row_of_a_sum(world):
    x, *rest = LABELLED[0]
    exact = ff.estimators.exact(*CLASSES, ff.structures.diagonal())
    loader = [(np.where(x > 1, np.inf, x), *rest)]
    ff.accumulate(
        exact, PARAMS, [world.own(batch) for batch in loader], mesh=world.mesh
    )


def other_columns(world):
    batch = LABELLED[0]
    of(world, [own_or(world, batch, (batch[0][:, :3], *batch[1:]))])


def another_type(world):
    x, y, w = LABELLED[0]
    of(world, [own_or(world, (x, y, w), (x, y.astype(np.float32), w))])


def fewer_batches(world):
    of(world, [world.own(x) for x in LABELLED][: 3 - jax.process_index()])


def a_loader_that_fails(world):
    def loader():
        yield world.own(LABELLED[0])
        if jax.process_index() == 1:
            raise OSError("the disk is gone")
        yield world.own(LABELLED[1])

    of(world, loader())


def a_prior_that_is_negative(world):
    prior = world.spread(np.float32([1, 2, 3, -1]))
    ff.fisher_flow(*REGRESSION, prior_precision=prior).init(START)


def unequal_rows(world):
    """Arrays that are made without asking what other processes have."""
    rows = NamedSharding(world.mesh, P("data"))
    count = 12 - jax.process_index()
    batch = [
        jax.make_array_from_process_local_data(rows, x[:count]) for x in LABELLED[0]
    ]
    FLOW.update(FLOW.init(PARAMS), tuple(batch))


ERRORS = (
    unequal_rows,
    a_bad_row_of_a_flow,
    a_bad_row_of_a_sum,
    other_columns,
    another_type,
    fewer_batches,
    a_loader_that_fails,
)
MORE_ERRORS = (
    a_bad_row_of_a_loss,
    a_bad_row_of_an_optimizer,
    a_prior_that_is_negative,
)


def outcome(call, world):
    """What a call gives, or the error that it raises: no process waits for another."""
    try:
        return jax.tree.map(np.asarray, on_host(call(world)))
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def main(index, folder, *names):
    world, found = Together(), {}
    for name in names:
        begun = time.perf_counter()
        found[name] = outcome(globals()[name], world)
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    Path(folder, index).write_bytes(pickle.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[2:])
