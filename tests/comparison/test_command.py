"""The command line, run in this process and once in one of its own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fisherflow_jax import comparison
from fisherflow_jax.comparison._command import main
from fisherflow_jax.comparison._problem import find_function, load_problem

FILE = """
import numpy as np

import fisherflow_jax as ff
import neighbour

def problem():
    return (
        lambda params, x: x @ params["w"],
        ff.likelihoods.categorical(),
        {"w": neighbour.weights()},
        [(np.arange(8.0).reshape(4, 2), np.array([0, 1, 2, 0]))] * 2,
    )

def nothing():
    return None

NUMBER = 3
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(FILE)
    neighbour = "import numpy as np\nweights = lambda: np.full((2, 3), 0.1)\n"
    (tmp_path / "neighbour.py").write_text(neighbour)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("neighbour", "task", "problem_of_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return f"{tmp_path / 'task.py'}:problem"


@pytest.mark.slow
def test_estimate_compare_and_plot(place, tmp_path, capsys):
    out = tmp_path / "out"
    names = ["exact", "monte_carlo", "hutchinson_rankk"]
    options = ["--groups", "2", "--k", "1", "--num-probes", "3", "--num-samples", "2"]
    run = ["estimate", place, "--estimators", *names, *options, "--seed", "7"]
    assert main([*run, "--output", str(out)]) == 0
    files = {
        "exact": {},
        "monte_carlo": {"num_samples": 2, "groups": 2},
        "hutchinson_rankk": {"num_probes": 3, "groups": 2, "k": 1},
    }
    written = {}
    for file in out.iterdir():
        settings = comparison.load(file).settings
        written[settings["name"]] = file
        assert settings["options"] == files[settings["name"]]
        assert settings["seed"] == (None if settings["name"] == "exact" else 7)
    assert written.keys() == files.keys()
    assert "8 examples in" in capsys.readouterr().out

    paths = [str(written[name]) for name in names]
    assert main(["compare", *paths, "--json", str(tmp_path / "errors.json")]) == 0
    printed = capsys.readouterr().out
    assert "monte_carlo(num_samples=2,groups=2)" in printed
    assert "error by layer" in printed
    rows = json.loads((tmp_path / "errors.json").read_text())
    by_hand = comparison.compare(*_truth_and_others(paths))
    assert [row["relative_error"] for row in rows] == [
        each.relative_error for each in by_hand
    ]
    assert main(["plot", *paths, "--output", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"


def _truth_and_others(paths):
    truth, *others = map(comparison.load, paths)
    return truth, others


def test_groups_of_single_examples(place, tmp_path):
    run = ["estimate", place, "--estimators", "hutchinson", "--groups", "examples"]
    assert main([*run, "--output", str(tmp_path)]) == 0
    found = comparison.load(tmp_path / "hutchinson-groups=None.npz")
    assert found.settings["options"] == {"groups": None}


def test_nan_is_null_in_json(tmp_path):
    settings = {"name": "zero", "options": {}, "num_examples": 1.0}
    zero = comparison.Measurement({"w": np.zeros(2)}, settings)
    comparison.save(tmp_path / "zero.npz", zero)
    out = tmp_path / "out.json"
    assert main(["compare", str(tmp_path / "zero.npz"), "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row["relative_error"] is None
    assert row["layers"] == {"w": None}


def test_a_module_in_this_folder(place, monkeypatch):
    monkeypatch.chdir(Path(place.rpartition(":")[0]).parent)
    assert load_problem("task:problem").params["w"].shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["estimate", "{file}:other"], "has no function 'other'; it has problem, noth"),
        (["estimate", "{file}:NUMBER"], "has no function 'NUMBER'"),
        (["estimate", "{file}:nothing"], "a problem is a tuple .* got NoneType"),
        (["estimate", "{file}"], "named module:function"),
        (["estimate", "no_such_module:problem"], "there is no module 'no_such_module'"),
        (["estimate", "no/such/file.py:problem"], "there is no file no/such/file.py"),
        (
            ["estimate", "{file}:problem", "--estimators", "exakt"],
            "no estimator 'exakt' to compare; there are exact, hutchinson",
        ),
        (
            ["estimate", "{file}:problem", "--estimators", "exact", "--k", "2"],
            "--k is taken by none of exact",
        ),
        (
            ["estimate", "{file}:problem", "--estimators", "empirical", "--groups=3"],
            "groups = 3 must divide",
        ),
        (["compare", "nowhere.npz"], "nowhere.npz"),
        (["plot", "nowhere.npz", "--output", "x.png"], "nowhere.npz"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, match, place, tmp_path, capsys):
    file = place.rpartition(":")[0]
    arguments = [part.replace("{file}", file) for part in arguments]
    if arguments[0] == "estimate":
        arguments += ["--output", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fisherflow-estimators: error: ")
    assert re.search(match, error)


def test_a_module_that_lacks_an_import_of_its_own_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken_task.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        find_function("broken_task:problem")


@pytest.mark.slow
def test_it_is_a_program_of_its_own():
    run = subprocess.run(
        [sys.executable, "-m", "fisherflow_jax.comparison", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "estimate" in run.stdout
    assert "compare" in run.stdout
