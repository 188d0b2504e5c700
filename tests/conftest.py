"""The suite computes in float64; its core also under strict promotion.

A test of float32 asks for it: ``with jax.enable_x64(False)``, or float32 arrays.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

# A global setting and not a fixture: it also holds while modules are imported, in
# fixtures of every scope, and in the threads that callbacks run in.
jax.config.update("jax_enable_x64", True)

TESTS = Path(__file__).parent
FIRST_STATES: dict[int, dict] = {}  # of generators of modules, by their ids
CORE = {"information", "structures", "likelihoods", "estimators", "memories"}


def is_core(path: Path) -> bool:
    """Whether a file is in a core folder, or is ``test_<core module>.py``."""
    room = path.relative_to(TESTS).parts[0]
    return room.removeprefix("test_").removesuffix(".py") in CORE


@pytest.fixture
def strict_promotion() -> Iterator[None]:
    """No implicit change of dtype or rank; tests outside the core may ask for it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def core_promotion(request: pytest.FixtureRequest) -> None:
    """Put every test of the core under strict promotion."""
    exempt = request.node.get_closest_marker("standard_promotion")
    if is_core(request.path) and not exempt:
        request.getfixturevalue("strict_promotion")


@pytest.fixture(autouse=True)
def own_draws(request: pytest.FixtureRequest) -> None:
    """What a test draws of its module's generator is the same whichever ran before."""
    for value in list(vars(request.module).values()):
        if isinstance(value, np.random.Generator):
            bits = value.bit_generator
            bits.state = FIRST_STATES.setdefault(id(value), bits.state)


@pytest.fixture(autouse=True, scope="module")
def bounded_compilation_cache() -> Iterator[None]:
    """Drop compiled functions before they meet Linux's limit of 65530 memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()
