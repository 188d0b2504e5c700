"""Two real processes, over loopback, have the numbers and the errors of one."""

import ast
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import two_processes

# Starting two processes takes half a minute.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
TOLERANCE = 1e-5


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


try:
    free_port()
except OSError as error:
    pytest.skip(f"no sockets here: {error}", allow_module_level=True)


def environment() -> dict[str, str]:
    """The suite's compiler and cache, in JAX's default precision, and one device."""
    own = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return os.environ | own


def together(folder, *calls):
    """What each of two processes finds, and what it writes to its terminal."""
    address = f"127.0.0.1:{free_port()}"
    said = [folder / f"{index}.txt" for index in range(2)]
    names, started = [call.__name__ for call in calls], []
    program = sys.executable, two_processes.__file__, address
    try:
        for index, path in enumerate(said):
            command = [*program, str(index), str(folder), *names]
            with path.open("w") as file:
                started.append(
                    subprocess.Popen(command, env=environment(), stderr=file)
                )
        for process in started:
            process.wait(timeout=300)
    finally:
        for process in started:
            process.kill()
    for process, path in zip(started, said, strict=True):
        assert process.returncode == 0, path.read_text()[-3000:]
    results = [pickle.loads((folder / str(index)).read_bytes()) for index in range(2)]
    return results, [path.read_text() for path in said]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    calls = two_processes.NUMBERS + two_processes.ERRORS
    return together(tmp_path_factory.mktemp("found"), *calls)


@pytest.fixture(scope="module")
def more_found(tmp_path_factory):
    calls = two_processes.MORE_NUMBERS + two_processes.MORE_ERRORS
    return together(tmp_path_factory.mktemp("found"), *calls)


def check_numbers(call, results):
    """Those of one process, and in both the same to the bit."""
    with jax.enable_x64(False):
        expected = jax.tree.map(np.asarray, call(two_processes.Alone()))
    both = [result[call.__name__] for result in results]
    for result in both:
        assert not isinstance(result, str), result
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(
                x, y, rtol=TOLERANCE, atol=TOLERANCE
            ),
            result,
            expected,
        )
    jax.tree.map(np.testing.assert_array_equal, *both)


def name_of(call):
    return call.__name__


@pytest.mark.parametrize("call", two_processes.NUMBERS, ids=name_of)
def test_numbers_are_those_of_one_process(call, found):
    check_numbers(call, found[0])


@pytest.mark.long
@pytest.mark.parametrize("call", two_processes.MORE_NUMBERS, ids=name_of)
@pytest.mark.filterwarnings("ignore::fisherflow_jax.DataWarning")
def test_more_numbers_are_those_of_one_process(call, more_found):
    check_numbers(call, more_found[0])


def test_one_progress_bar(found):
    assert ["running" in said for said in found[1]] == [True, False]


WRONG = {
    "unequal_rows": r"ValueError: a batch that processes share .*process 0 has "
    r"\[\(24, 4\), \(24,\), \(24,\)\]; process 1 has \[\(22, 4\)",
    "a_bad_row_of_a_flow": r"ValueError: row 20 of the batch has inputs\[20, 1\] = nan",
    "a_bad_row_of_a_loss": r"ValueError: row 20 of the batch has inputs\[20, 1\] = nan",
    "a_bad_row_of_an_optimizer": r"ValueError: row 20 of the batch has inputs",
    "a_bad_row_of_a_sum": r"ValueError: row \d+ of batch 0 has inputs.* = inf",
    "other_columns": r"ValueError: the examples of batch 0 differ .*process 0 has "
    r"inputs: float32 \(4,\).*process 1 has inputs: float32 \(3,\)",
    "another_type": r"ValueError: the examples of batch 0 .*targets: int32.*float32",
    "fewer_batches": r"ValueError: processes have other numbers of batches: process 1 "
    "ended after 2",
    "a_prior_that_is_negative": r"ValueError: prior_precision must be positive",
}


def check_error(name, results):
    for result in results:
        assert re.match(WRONG[name], result[name], re.DOTALL), result[name]


QUICK = two_processes.ERRORS[:-1]


@pytest.mark.parametrize("call", QUICK, ids=name_of)
def test_what_is_wrong_in_one_process_raises_in_both(call, found):
    check_error(call.__name__, found[0])


@pytest.mark.parametrize("call", two_processes.MORE_ERRORS, ids=name_of)
def test_more_that_is_wrong_raises_in_both(call, more_found):
    check_error(call.__name__, more_found[0])


def test_a_loader_that_fails_is_told_to_the_others(found):
    told, own = (results["a_loader_that_fails"] for results in found[0])
    assert own.startswith("OSError: the disk is gone")
    assert "RuntimeError: process 1 could not read its part of batch 1" in told
    assert "the disk is gone" in told.partition("\n")[0]


def test_a_worker_is_lost_and_one_process_goes_on():
    """The example: process 1 is killed; from the checkpoint one process goes on."""
    program = str(TESTS.parent / "examples" / "distributed.py")
    process = subprocess.Popen(
        [sys.executable, program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said + errors[-3000:]
    assert re.search("process 0 stops: .*another process is lost", said), said
    codes = ast.literal_eval(re.search(r"exit codes (.*)", said).group(1))
    assert codes == [1, -9]
    # the last save may not have been on disk
    assert re.search("process 0 of 1 begins at batch [5-7]", said), said
    apart = float(re.search(r"means differ by (\S+)", said).group(1))
    assert apart <= 1e-6
    assert "observations 768 and 768" in said
