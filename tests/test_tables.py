"""The program of the tables: its data, its scores, and a run of it on a small file."""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """One of its modules, by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.startswith("tables")]:
        del sys.modules[name]


@pytest.fixture
def flowers(tmp_path):
    """Three classes that two columns tell apart, as CSV and as npz."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 3
    inputs = rng.normal(size=(240, 2)) + 2.0 * np.eye(3)[labels, :2]
    names = np.array(["iris", "lily", "rose"])[labels]
    lines = [f"{a},{b},{c}" for (a, b), c in zip(inputs, names, strict=True)]
    (tmp_path / "flowers.csv").write_text("\n".join(["length,width,kind", *lines]))
    np.savez(tmp_path / "flowers.npz", x=inputs.reshape(240, 1, 2), y=labels)
    return tmp_path


def test_files_are_read(program, flowers):
    data = program("tables_data")
    table = data.from_file(flowers / "flowers.csv", 4)
    images = data.from_file(flowers / "flowers.npz", 4)
    assert table.sizes == images.sizes == (2, 4, 3)
    assert np.array_equal(table.inputs, images.inputs)
    assert np.array_equal(table.labels, images.labels)
    assert (table.alike, images.alike) == (False, True)
    assert len(data.thinned(table, 50).labels) == 50


def test_a_split_is_of_all_rows_once(program, flowers):
    data = program("tables_data")
    table = data.from_file(flowers / "flowers.csv", 4)
    split = data.split(table, 0)
    parts = split.train[0], split.validation[0], split.tests["test"]
    assert [len(part) for part in parts] == [128, 40, 72]
    assert np.allclose(split.train[0].mean(0), 0, atol=1e-6)
    assert np.allclose(split.train[0].std(0), 1, atol=1e-5)
    # standardising keeps the order of a column: every row is there once
    column = np.concatenate(parts)[:, 0]
    expected = (table.inputs[:, 0] - table.inputs[:, 0].mean()) / np.std(
        table.inputs[:, 0]
    )
    ours = (column - column.mean()) / column.std()
    assert np.allclose(np.sort(ours), np.sort(expected), atol=1e-5)
    assert np.bincount(split.labels).tolist() == [24, 24, 24]
    assert not np.allclose(split.tests["noised"], split.tests["test"])


def test_scores(program):
    running = program("tables_running")
    logs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (90, 4)))
    labels = np.arange(90) % 4
    accuracy, nll, _, brier = running.scores(logs, jnp.asarray(labels))
    chances = np.exp(np.asarray(logs, np.float64))
    chances /= chances.sum(1, keepdims=True)
    assert accuracy == pytest.approx(accuracy_score(labels, chances.argmax(1)))
    assert nll == pytest.approx(log_loss(labels, chances), rel=1e-5)
    by_hand = np.sum((chances - np.eye(4)[labels]) ** 2, 1).mean()
    assert brier == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.standard_promotion
def test_a_run_on_a_file(program, flowers, monkeypatch, capsys):
    kept = flowers / "numbers.json"
    options = ["--file", str(flowers / "flowers.csv"), "--quick", "--json", str(kept)]
    monkeypatch.setattr(sys, "argv", ["tables.py", *options])
    with jax.enable_x64(False):
        program("tables").main()
    printed = capsys.readouterr().out
    assert "==== flowers: 2-8-3, 51 parameters" in printed
    assert "== flowers, one pass, noised" in printed
    found = json.loads(kept.read_text())["flowers"]["one pass"]
    accuracy = {name: np.mean(f["trained"]["test"], 0)[0] for name, f in found.items()}
    assert len(accuracy) == 3
    assert min(accuracy.values()) > 0.6  # a guess has a third
    for each in found.values():
        assert each["failed"] == 0 and len(each["fits"]) == 10  # of two seeds
