"""Two processes learn one model; one of them dies; the run goes on from its checkpoint.

    python examples/distributed.py

Each process reads its own half of every batch. `ff.run` makes them arrays that both
share, takes them in, and saves the state after each. At batch 7 process 1 kills itself,
as a machine that is lost: the other gets an error, and leaves. One process, which reads
all rows, then goes on from the last checkpoint. It ends where one that was never
interrupted does, up to the order of sums.

On a cluster the launcher starts the processes, and `jax.distributed.initialize()` needs
no arguments: docs/distributed.md.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import fisherflow_jax as ff

NUM_BATCHES, ROWS, LOST_AT = 12, 64, 7
TRUTH = np.array([-0.5, 1.0, 0.0, 2.0], np.float32)


def apply_fn(params: jax.Array, x: jax.Array) -> jax.Array:
    return x @ params


def own_rows(index: int, count: int, *, dies: bool = False) -> Iterator[tuple]:
    """A stream of which process `index` of `count` reads its part."""
    for number in range(NUM_BATCHES):
        if dies and number == LOST_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        draw = np.random.default_rng(number)
        x = draw.normal(size=(ROWS, len(TRUTH))).astype(np.float32)
        y = (draw.logistic(size=ROWS) < x @ TRUTH).astype(np.float32)
        yield tuple(np.split(part, count)[index] for part in (x, y))


def learn(folder: str, *, dies: bool = False) -> ff.FlowState:
    """What every process runs, one or many."""
    index, count = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    flow = ff.fisher_flow(apply_fn, ff.likelihoods.bernoulli())
    manager = ocp.CheckpointManager(folder)
    loader = own_rows(index, count, dies=dies and index == 1)
    start = flow.init(jnp.zeros(len(TRUTH)))
    begun = manager.latest_step() or 0
    print(f"process {index} of {count} begins at batch {begun}", flush=True)
    try:
        state = ff.run(
            flow, start, loader, mesh=mesh, checkpoint=manager, progress=False
        )
    except Exception as error:
        print(f"process {index} stops: {error!r}", flush=True)
        os._exit(1)  # at once: an orderly end would wait for the process that is lost
    manager.close()
    return state


def one_of(address: str, index: int, folder: str) -> None:
    jax.distributed.initialize(address, 2, index)
    learn(folder, dies=True)


def start_two(folder: str) -> list[int]:
    """The exit codes of two processes of this program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--folder", folder, "--address", address]
    started = [subprocess.Popen([*command, "--index", str(i)]) for i in range(2)]
    try:
        lost = started[1].wait(timeout=300)
        begun = time.perf_counter()
        other = started[0].wait(timeout=60)
        print(f"process 0 ended {time.perf_counter() - begun:.1f} s after process 1")
        return [other, lost]
    finally:
        for process in started:  # jax.distributed catches a mere SIGTERM
            process.kill()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("two processes, of which one dies")
        print(f"exit codes {start_two(folder)}")
        print("one process, from their checkpoint")
        resumed = learn(folder)
    with tempfile.TemporaryDirectory() as folder:
        print("one process, never interrupted")
        alone = learn(folder)
    error = ff.standard_error(resumed)
    print(f"estimate       {np.round(resumed.mean, 4)}")
    print(f"standard error {np.round(error, 4)}")
    print(f"observations {resumed.count:g} and {alone.count:g}")
    print(f"means differ by {np.max(np.abs(resumed.mean - alone.mean)):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.index is None:
        main()
    else:
        one_of(given.address, given.index, given.folder)
