"""Test set-up that doctests and the test suite share."""

import gc
import os
import re
import subprocess
import sys
import tempfile

import jax
import pytest

import doc_pages
import shared_context

# What makes the site is run by the site's stage of .ci/run.
collect_ignore_glob = ["docs/*.py", "docs/generated/*"]

# The suite is written for the CPU; JAX_PLATFORMS=cuda pytest asks for another device.
# Four devices let sharding be tested without an accelerator.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")

# The suite compiles thousands of small programs and runs most of them once: it takes
# half the time if the compiler tries less hard. Whoever sets XLA_FLAGS decides alone.
QUICK_COMPILER = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def known(flags: list[str]) -> list[str]:
    """Those that this XLA knows: another ends the process, which names it."""
    while flags:
        environment = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            text=True,
        )
        if done.returncode == 0:
            break
        left = [flag for flag in flags if flag not in done.stderr]
        flags = left if len(left) < len(flags) else []
    return flags


# Parallel workers find the flags in the environment and need not ask again.
if jax.config.jax_platforms == "cpu" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(known(QUICK_COMPILER.split()))

# Tests of equal programs compile them once. Each process keeps them in a folder of its
# own, since a file that another is writing may be read in part; they outlive the run
# in the folder that the variable names.
OWN_CACHE = tempfile.TemporaryDirectory(prefix="fisherflow_jax_")
CACHE = os.environ.get("FISHERFLOW_TEST_CACHE", OWN_CACHE.name)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

shared_context.install()

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 4)


def pytest_configure(config: pytest.Config) -> None:
    """Give each parallel worker one thread: the workers themselves fill the cores."""
    if config.getoption("numprocesses", None):
        for variable in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(variable, "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the collector what stays to the end: modules, and what they import.

    Tracing makes objects by the million, and each round would look at all of them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most pages and cases to .ci/run, before markers decide what runs."""
    doc_pages.mark(items)
    seen = set()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "slow_cases" in marks and "slow" not in marks:
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make expected output of doctests mean what a reader takes it to mean."""
    if not isinstance(item, pytest.DoctestItem):
        return
    for example in item.dtest.examples:
        if item.path.suffix == ".md":
            example.want = example.want.partition("```")[0]
        # NUMBER allows one unit of the last digit shown, so `3.` would also pass for 4.
        # A name, `layers.0.weight`, is no number; `3.e-5` is.
        if "..." not in example.want:
            ends = r"(?<=\d)\.(?!\d|(?!e[+-]?\d)[A-Za-z_])"
            example.want = re.sub(ends, ".0000", example.want)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Run doctests in JAX's default precision, so that readers get the same numbers."""
    if isinstance(item, pytest.DoctestItem):
        with jax.enable_x64(False):
            return (yield)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded, such as the lines of code."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
