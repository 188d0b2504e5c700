"""Measurements against explicit Jacobians, their errors against arithmetic."""

import functools
import json
import sys

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
from estimator_cases import COUNT, NAMED, fisher
from fisherflow_jax import comparison
from fisherflow_jax.accumulation import Stacked

MODEL = NAMED["categorical"]
X, Y = MODEL.batch
PROBLEM = comparison.Problem(
    MODEL.apply_fn, MODEL.likelihood, MODEL.params, [(X[:4], Y[:4]), (X[4:], Y[4:])]
)


@functools.cache
def measured(name="exact", **options):
    return comparison.estimate(getattr(ff.estimators, name), PROBLEM, **options)


def made(name="made", count=1.0, seconds=None, **leaves):
    settings = {"name": name, "options": {}, "num_examples": count, "seconds": seconds}
    arrays = {path.replace("__", "."): np.array(leaf) for path, leaf in leaves.items()}
    return comparison.Measurement(arrays, settings)


# ---- estimate


def test_an_exact_measurement_is_the_diagonal_of_the_fisher_information():
    found = measured()
    assert list(found.information) == ["hidden.b", "hidden.w", "out", "scale"]
    flat = np.concatenate([leaf.ravel() for leaf in found.average.values()])
    np.testing.assert_allclose(flat, np.diag(fisher("categorical")) / COUNT, rtol=1e-9)
    settings = found.settings
    assert settings["num_examples"] == COUNT
    assert (settings["num_batches"], settings["num_skipped"]) == (2, 0)
    assert settings["passes"] == 2  # three classes
    assert settings["seed"] is None
    assert settings["seconds"] > 0
    assert settings["compile_seconds"] >= 0
    assert json.loads(json.dumps(settings)) == settings


def test_the_seed_and_the_options_reach_the_estimator():
    one, again, two = (measured("hutchinson", seed=s, groups=2) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one.information, again.information)
    assert not np.array_equal(one.information["out"], two.information["out"])
    assert one.label == "hutchinson(groups=2)"
    assert one.stem == "hutchinson-groups=2"
    settings = two.settings
    assert (settings["seed"], settings["passes"]) == (1, 1)


def test_the_options_of_a_partial_are_told():
    rank1 = comparison.estimate(ff.estimators.hutchinson_rank1, PROBLEM, num_probes=3)
    assert rank1.label == "hutchinson_rankk(k=1,num_probes=3)"
    assert rank1.settings["passes"] == 3


def test_stacked_batches_tuples_and_dicts_are_problems_too():
    rows = np.arange(8) % COUNT
    stack = Stacked(X[rows].reshape(2, 4, -1), Y[rows].reshape(2, 4))
    parts = PROBLEM._replace(batches=stack)
    expected = np.diag(fisher("categorical", np.bincount(rows)))
    for problem in (tuple(parts), parts._asdict()):
        found = comparison.estimate(ff.estimators.exact, problem)
        flat = np.concatenate([leaf.ravel() for leaf in found.information.values()])
        np.testing.assert_allclose(flat, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"batches": iter([])}, "list_iterator, which is read once"),
        ({"batches": []}, "batches are empty"),
        ({"batches": (X, Y)}, "one batch alone goes in a list"),
        ({"apply_fn": 3}, "apply_fn is a function .* got int"),
        ({"likelihood": "categorical"}, "comes from ff.likelihoods; got str"),
        ({"batches": [(X * np.nan, Y)]}, "row 0 of batch 0 has inputs"),
    ],
)
def test_problems_that_are_none(change, match):
    with pytest.raises(ValueError, match=match):
        comparison.estimate(ff.estimators.exact, PROBLEM._replace(**change))


def test_results_of_a_function_that_are_no_problems():
    with pytest.raises(ValueError, match="got tuple of length 3"):
        comparison.estimate(ff.estimators.exact, PROBLEM[:3])
    with pytest.raises(ValueError, match="got list"):
        comparison.estimate(ff.estimators.exact, [*PROBLEM])
    with pytest.raises(ValueError, match=r"has the parts .* got params"):
        comparison.estimate(ff.estimators.exact, {"params": 1})


# ---- files


def test_a_file_gives_back_what_it_was_given(tmp_path):
    found = measured("hutchinson", groups=2)
    comparison.save(tmp_path / "a.npz", found)
    loaded = comparison.load(tmp_path / "a.npz")
    assert loaded.settings == found.settings
    assert list(loaded.information) == list(found.information)
    jax.tree.map(np.testing.assert_array_equal, loaded.information, found.information)


def test_a_parameter_may_be_called_settings(tmp_path):
    comparison.save(tmp_path / "a.npz", made(settings=[1.0], information__x=[2.0]))
    loaded = comparison.load(tmp_path / "a.npz")
    assert list(loaded.information) == ["settings", "information.x"]


def test_files_of_something_else(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    (tmp_path / "text.npz").write_text("text")
    np.save(tmp_path / "array.npy", np.ones(3))
    comparison.save(tmp_path / "whole.npz", made(w=[1.0]))
    half = (tmp_path / "whole.npz").read_bytes()[:200]
    (tmp_path / "half.npz").write_bytes(half)
    for name in ("other.npz", "text.npz", "array.npy", "half.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a file of ff.comparison"):
            comparison.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        comparison.load(tmp_path / "nowhere.npz")


# ---- compare


def test_the_truth_has_no_error():
    (truth,) = comparison.compare(measured(), [])
    assert (truth.relative_error, truth.total_ratio) == (0, 1)
    assert truth.log_correlation == pytest.approx(1)
    assert set(truth.layers) == {"hidden", "out", "scale"}
    assert set(truth.layers.values()) == {0}


def test_measures_by_hand():
    truth = made("exact", a__w=[1.0, 2.0], a__b=[1.0], c=[0.0, 4e-6])
    drawn = made("drawn", 2.0, 0.5, a__w=[4.0, 2.0], a__b=[2.0], c=[2e-6, 0.0])
    _, found = comparison.compare(truth, [drawn])  # averages 2 1 | 1 | 1e-6 0
    total = 4 + 4e-6
    assert found.relative_error == pytest.approx((1 + 1 + 0 + 1e-6 + 4e-6) / total)
    assert found.total_ratio == pytest.approx((4 + 1e-6) / total)
    assert found.layers == pytest.approx({"a": 0.5, "c": 1.25})
    assert (found.num_positive, found.num_entries, found.seconds) == (3, 5, 0.5)
    assert found.share_small == 2 / 5
    logs = np.log([[1, 2, 1], [2, 1, 1]])
    assert found.log_correlation == pytest.approx(np.corrcoef(logs)[0, 1])
    _, other = comparison.compare(truth, [drawn], small=1.5)
    assert other.share_small == 4 / 5


def test_a_common_factor_is_seen_by_the_ratio_and_not_by_the_correlation():
    truth = measured()
    twice = truth._replace(information=jax.tree.map(lambda x: 2 * x, truth.information))
    _, found = comparison.compare(truth, [twice])
    assert found.relative_error == pytest.approx(1)
    assert found.total_ratio == pytest.approx(2)
    assert found.log_correlation == pytest.approx(1)


def test_a_truth_of_zeros_has_no_relative_error():
    _, found = comparison.compare(made(w=[0.0]), [made(w=[1.0])])
    numbers = found.relative_error, found.total_ratio, found.log_correlation
    assert np.isnan(numbers).all()


def test_bounds_lie_on_their_sides():
    root = ff.likelihoods.diagonal_root
    upper = comparison.estimate(ff.estimators.exact, PROBLEM, root=root)
    lower = comparison.estimate(
        ff.estimators.exact,
        PROBLEM,
        root=functools.partial(ff.likelihoods.rank_root, k=1),
    )
    _, above, below = comparison.compare(measured(), [upper, lower])
    assert above.total_ratio > 1 > below.total_ratio
    assert (above.passes, below.passes) == (3, 1)
    assert above.name == "exact(root=diagonal_root)"


def test_other_parameters_are_refused():
    truth = made("exact", a=[1.0, 2.0], b=[1.0])
    for leaves, found in (
        ({"a": [1.0]}, r"a has shape \(1,\), for \(2,\)"),
        ({"a": [1.0, 2.0]}, r"b has shape none, for \(1,\)"),
        ({"a": [1.0, 2.0], "b": [1.0], "c": [1.0]}, r"c has shape \(1,\), for none"),
    ):
        with pytest.raises(ValueError, match=f"drawn is of other parameters.*{found}"):
            comparison.compare(truth, [made("drawn", **leaves)])


# ---- plot


def test_a_plot_has_a_panel_for_each_layer():
    timed = made("timed", 1.0, 0.25, a__w=[1.0, 3.0], dead=[0.0, 0.0])
    truth = made("exact", a__w=[1.0, 2.0], dead=[0.0, 0.0])
    figure = comparison.plot(truth, [timed, made(a__w=[0.0, 1.0], dead=[0.0, 0.0])])
    first, dead, last = figure.axes
    assert first.get_title() == "a"
    assert [text.get_text() for text in dead.texts] == ["all zero"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["exact", "timed", "made"]
    assert [tuple(line.get_xydata()[0]) for line in last.lines] == [(0.25, 1 / 3)]
    # all entries of the truth are in its histogram
    assert sum(patch.get_xy()[:, 1].max() > 0 for patch in first.patches) == 3
    figure.canvas.draw()


def test_a_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        comparison.plot(made(w=[1.0]), [])
