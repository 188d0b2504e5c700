"""The front of the package: what it shows, and what a first import leaves alone."""

import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import fisherflow_jax as ff

LOADED_ON_USE = ["calibration", "comparison", "diagnostics", "metrics", "plots"]
HEAVY = ["scipy.stats", "flax", "chex", "matplotlib", "sklearn"]


def loaded(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_the_names_of_the_package():
    assert ff.__all__ == sorted(ff.__all__)
    assert len(ff.__all__) <= 75
    assert dir(ff) == ff.__all__
    assert [name for name in ff.__all__ if not hasattr(ff, name)] == []
    assert ff.__version__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'flwo'"):
        ff.flwo


@pytest.mark.slow
def test_rooms_are_loaded_on_first_use():
    first = loaded("import fisherflow_jax")
    rooms = {f"fisherflow_jax.{room}" for room in [*LOADED_ON_USE, "testing"]}
    assert first & rooms == set()
    assert "fisherflow_jax.metrics" in loaded("import fisherflow_jax as ff; ff.metrics")
    calibrated = loaded("from fisherflow_jax import calibrate")
    assert "fisherflow_jax.calibration" in calibrated
    assert "fisherflow_jax.plots" not in calibrated


def test_public_tuples_say_where_they_are_shown():
    assert ff.FlowState.__module__ == "fisherflow_jax"
    assert ff.Calibration.__module__ == "fisherflow_jax"
    assert ff.structures.Full.__module__ == "fisherflow_jax.structures"
    assert ff.calibration.Conformal.__module__ == "fisherflow_jax.calibration"
    wrong = [
        f"{room}.{name}: {value.__module__}"
        for room in [None, *ff.__all__]
        for module in [ff if room is None else getattr(ff, room)]
        if module is ff or type(module) is type(ff)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, tuple)
        if "._" in value.__module__
    ]
    assert wrong == []


def test_a_state_is_pickled():
    information = ff.structures.Diagonal(jnp.ones(()))
    state = ff.posterior(jnp.zeros(()), information, prior_precision=1.0)
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is ff.Posterior
    assert again.mean == state.mean


def test_docs_api_is_up_to_date():
    docs = Path(__file__).parents[1] / "docs"
    page = runpy.run_path(str(docs / "api.py"))["page"]()
    assert (docs / "api.txt").read_text() == page, "run python docs/api.py"
    listed = re.findall(r"^ff\.(\w+)", page, re.M)
    # an extra is imported by its own name, and no name of the package
    assert set(listed) == {*ff.__all__, "sklearn"}
