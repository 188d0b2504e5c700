"""What is drawn, read back from the Axes."""

import builtins

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot
from scipy import stats

import fisherflow_jax as ff
from fisherflow_jax import metrics, plots

CURVE = metrics.ReliabilityCurve(
    np.array([0.1, np.nan, 0.6, 1.0]), np.array([0.2, np.nan, 0.5, 1.0]),
    np.array([10.0, 0.0, 30.0, 10.0]),
)  # fmt: skip


def heights(collection):
    return np.array([segment[:, 1] for segment in collection.get_segments()])


def test_reliability_diagram():
    ax = plots.reliability_diagram(CURVE, level=0.95, label="model")
    diagonal, points = ax.lines[0], ax.containers[0].lines[0]
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_array_equal(points.get_xydata(), [[0.1, 0.2], [0.6, 0.5], [1, 1]])
    bars = heights(ax.containers[0].lines[2][0])
    for (low, high), share, number in zip(
        bars, [0.2, 0.5, 1.0], [10, 30, 10], strict=True
    ):
        expected = stats.binomtest(round(share * number), number).proportion_ci(
            0.95, method="wilson"
        )
        np.testing.assert_allclose([low, high], expected, rtol=1e-10)
    stems = heights(ax.collections[-1])
    np.testing.assert_allclose(stems[:, 1], [0.2, 0.6, 0.2])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["model"]


def test_reliability_diagram_refuses():
    empty = CURVE._replace(num_examples=np.zeros(4))
    with pytest.raises(ValueError, match="at least one example"):
        plots.reliability_diagram(empty)
    stacked = metrics.ReliabilityCurve(*(np.stack([x, x]) for x in CURVE))
    with pytest.raises(ValueError, match=r"one curve .*\(2, 4\)"):
        plots.reliability_diagram(stacked)
    with pytest.raises(ValueError, match="level"):
        plots.reliability_diagram(CURVE, level=90)


ESTIMATE = {"w": np.array([1.0, -2.0]), "b": np.array(0.5)}


def moved(step):
    return {name: x + step for name, x in ESTIMATE.items()}


def test_intervals():
    ax = plots.intervals(ESTIMATE, moved(-1), moved(2), truth=moved(0.1))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "w[0]", "w[1]"]
    points = ax.containers[0].lines[0].get_xydata()
    np.testing.assert_array_equal(points, [[0.5, 0], [1, 1], [-2, 2]])
    ends = np.array([s[:, 0] for s in ax.collections[-1].get_segments()])
    np.testing.assert_array_equal(ends, [[-0.5, 2.5], [0, 3], [-3, 0]])
    np.testing.assert_allclose(ax.lines[-1].get_xdata(), [0.6, 1.1, -1.9])
    low, high = ax.get_ylim()
    assert low > high  # the first on top
    again = plots.intervals(ESTIMATE, moved(-1), moved(1), ax=ax, label="other")
    assert again is ax
    assert np.all(ax.containers[1].lines[0].get_ydata() > [0, 1, 2])


def test_intervals_refuse():
    with pytest.raises(ValueError, match=r"parameter 0 has \[1.5, -0.5\]"):
        plots.intervals(ESTIMATE, moved(1), moved(-1))
    with pytest.raises(ValueError, match=r"upper must have the shape \(3,\)"):
        plots.intervals(ESTIMATE, ESTIMATE, {"b": ESTIMATE["b"]})
    with pytest.raises(ValueError, match=r"names must be one a parameter \(3\); got 2"):
        plots.intervals(ESTIMATE, ESTIMATE, ESTIMATE, names=["x", "y"])


def band(ax, index=0):
    """The corners of a filled band, as sorted rows."""
    vertices = ax.collections[index].get_paths()[0].vertices
    return np.unique(vertices, axis=0)


def test_prediction_band_sorts_the_inputs():
    x = np.array([2.0, 0.0, 1.0])
    ax = plots.prediction_band(x, 10 * x, 10 * x - 1, 10 * x + 1, targets=x)
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 10], [2, 20]])
    np.testing.assert_array_equal(
        band(ax), [[0, -1], [0, 1], [1, 9], [1, 11], [2, 19], [2, 21]]
    )
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), np.stack([x, x], -1))
    with pytest.raises(ValueError, match=r"lower must have the shape \(3,\)"):
        plots.prediction_band(x, x, x[:2], x)
    with pytest.raises(ValueError, match=r"inputs must be \(n,\).*\(1, 3\)"):
        plots.prediction_band(x[None], x, x, x)


def test_estimate_over_stream():
    steps = jnp.arange(4.0)
    mean = {"a": steps, "b": jnp.stack([steps, -steps], -1)}
    low, high = ({k: v + d for k, v in mean.items()} for d in (-1, 2))
    truth = {"a": 3.0, "b": np.array([3.0, -3.0])}
    counts = 5 * (1 + steps)
    ax = plots.estimate_over_stream(mean, low, high, observations=counts, truth=truth)
    solid, dotted = ax.lines[::2], ax.lines[1::2]
    assert [x.get_label() for x in solid] == ["a", "b[0]", "b[1]"]
    np.testing.assert_array_equal(solid[2].get_xydata(), np.stack([counts, -steps], -1))
    for line, value in zip(dotted, [3, 3, -3], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), value)
    lowest = band(ax, 2)[::2]
    np.testing.assert_array_equal(lowest, np.stack([counts, -steps - 1], -1))
    assert ax.get_xlabel() == "observations"
    drifting = plots.estimate_over_stream(mean, low, high, truth=mean)
    np.testing.assert_array_equal(drifting.lines[1].get_ydata(), steps)
    np.testing.assert_array_equal(drifting.lines[0].get_xdata(), [1, 2, 3, 4])


def test_estimate_over_stream_refuses():
    many = np.zeros((3, 11))
    with pytest.raises(ValueError, match="11 lines cannot be told apart"):
        plots.estimate_over_stream(many, many, many)
    few = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"observations must have the shape \(3,\)"):
        plots.estimate_over_stream(few, few, few, observations=np.zeros(2))
    with pytest.raises(ValueError, match=r"truth must be like .*\(4,\)"):
        plots.estimate_over_stream(few, few, few, truth=np.zeros(4))


def test_every_plot_takes_axes_and_returns_them():
    x = np.arange(1.0, 4)
    draw = {
        plots.reliability_diagram: (CURVE,),
        plots.intervals: (x, x - 1, x + 1),
        plots.prediction_band: (x, x, x - 1, x + 1),
        plots.estimate_over_stream: (x, x - 1, x + 1),
    }
    for plot, arguments in draw.items():
        _, axes = pyplot.subplots(1, 2)
        assert plot(*arguments, ax=axes[1]) is axes[1]
        assert not axes[0].lines
        assert plot(*arguments) not in axes


def test_matplotlib_missing(monkeypatch):
    found = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return found(name, *args, **kwargs)

    ax = pyplot.subplots()[1]
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.reliability_diagram(CURVE)
    monkeypatch.undo()
    assert plots.reliability_diagram(CURVE, ax=ax) is ax


def test_profile():
    from fisherflow_jax import intervals

    values = np.linspace(-1.0, 3.0, 5)
    found = intervals.Profile(
        estimate=1.0, standard_error=0.5, lower=0.1, upper=np.inf, quantile=1.96,
        modified_lower=0.0, modified_upper=2.0, converged=True, values=values,
        root=2 - 2.1 * values, modified_root=2.1 - 2.2 * values,
    )  # fmt: skip
    ax = plots.profile(found, name="slope")
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(drawn["likelihood root"], found.root)
    np.testing.assert_allclose(drawn["modified root"], found.modified_root)
    np.testing.assert_allclose(drawn["Wald"], (1 - values) / 0.5)
    ends = [x.get_xdata() for x in ax.lines if len(set(x.get_xdata())) == 1]
    np.testing.assert_array_equal(ends, [[0.1, 0.1]])  # none where it is open
    assert ax.get_title() == "one-sided" and ax.get_xlabel() == "slope"
    none = found._replace(modified_root=np.full(5, np.nan), estimate=np.inf)
    labels = [line.get_label() for line in plots.profile(none).lines]
    assert "modified root" not in labels and "Wald" not in labels
    with pytest.raises(ValueError, match="with points"):
        plots.profile(found._replace(values=values[:0]))


# ---- states


def held(entries):
    information = ff.structures.Diagonal({k: 4 + 0 * x for k, x in entries.items()})
    return ff.posterior(entries, information, prior_precision=1e-12)


def test_intervals_of_a_state():
    state = held({name: jnp.asarray(x) for name, x in ESTIMATE.items()})
    ax = plots.intervals(state, level=0.9)
    lower, upper = ff.confidence_interval(state, level=0.9)
    ends = np.array([s[:, 0] for s in ax.collections[-1].get_segments()])
    np.testing.assert_allclose(ends[:, 0], [lower["b"], *lower["w"]])
    np.testing.assert_allclose(ends[:, 1], [upper["b"], *upper["w"]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "w[0]", "w[1]"]
    assert list(ax.lines[0].get_xdata()) == [0, 0]  # at zero
    with pytest.raises(ValueError, match="level"):
        plots.intervals(state, level=95)


def test_ends_of_another_kind_beside_a_state():
    information = ff.structures.Diagonal(jnp.ones(2))
    state = ff.posterior(jnp.zeros(2), information, prior_precision=1.0)
    ax = plots.intervals(state, -jnp.ones(2), 3.0 * jnp.ones(2))
    ends = [[p[0, 0], p[1, 0]] for p in ax.collections[0].get_segments()]
    np.testing.assert_array_equal(ends, [[-1, 3], [-1, 3]])


def test_intervals_of_many_parameters():
    state = held({"b": jnp.ones(3), "w": jnp.arange(1400.0)})
    ax = plots.intervals(state)
    assert len(ax.get_yticklabels()) == 40
    assert ax.get_xlabel() == "estimate (1,363 more parameters not drawn)"
    ax = plots.intervals(state, chosen=["b"], names=[f"n{k}" for k in range(1403)])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["n0", "n1", "n2"]
    assert ax.get_xlabel() == "estimate"
    ax = plots.intervals(state, num_rows=5, chosen=lambda name: name == "w")
    points = ax.containers[0].lines[0].get_xydata()
    np.testing.assert_array_equal(points[:, 0], np.arange(5))
    with pytest.raises(ValueError, match="num_rows"):
        plots.intervals(state, num_rows=0)


def test_alarms_over_a_stream():
    estimate = {"rate": np.linspace(0, 1, 6)}
    ends = [{"rate": estimate["rate"] + d} for d in (-1, 1)]
    report = ff.memories.ChangeReport(
        alarm=np.array([False, False, True, False, False, True]),
        statistic=np.zeros(6),
        threshold=np.zeros(6),
        change_point=np.array([-1, -1, 1, -1, -1, 3]),
    )

    class Infos:
        memory = report

    counts = np.arange(10.0, 70.0, 10.0)
    ax = plots.estimate_over_stream(
        estimate, *ends, infos=Infos, observations=counts, truth=estimate
    )
    dashed = [x.get_xdata()[0] for x in ax.lines if x.get_linestyle() == "--"]
    assert dashed == [30, 60]
    spans = [patch.get_extents().x0 for patch in ax.patches]
    assert len(spans) == 2
    edges = [patch.get_x() for patch in ax.patches]
    widths = [patch.get_width() for patch in ax.patches]
    assert (edges, widths) == ([20, 40], [10, 20])
    assert "alarm" in [text.get_text() for text in ax.get_legend().get_texts()]
    ax = plots.estimate_over_stream(estimate, *ends, infos=report.alarm)
    assert [x.get_xdata()[0] for x in ax.lines if x.get_linestyle() == "--"] == [3, 6]
    assert len(ax.patches) == 0
    for wrong in (report.alarm[:3], report.change_point, "alarm"):
        with pytest.raises(ValueError, match=r"6 updates of ff\.memories\.adaptive"):
            plots.estimate_over_stream(estimate, *ends, infos=wrong)
