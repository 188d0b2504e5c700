"""What a summary becomes: a data frame, HTML, a short print, ratios."""

import builtins
import html.parser

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from scipy import stats

import fisherflow_jax as ff

MEAN, PRECISION = np.array([0.5, -0.25, 0.0]), np.array([4.0, 100.0, 1.0])


@pytest.fixture
def state(belief):
    return belief(
        {"w": jnp.asarray(MEAN)},
        ff.structures.Diagonal({"w": jnp.asarray(PRECISION)}),
        count=jnp.asarray(12.0),
    )


@pytest.fixture(scope="module")
def flowing():
    flow = ff.fisher_flow(lambda w, x: x @ w, ff.likelihoods.gaussian(1.0))
    x = jnp.tile(jnp.eye(2), (3, 1))
    return flow.update(flow.init(jnp.zeros(2)), (x, jnp.ones(6)))[0]


def test_ratios(state):
    """Against the closed form: exp of ends, slope times error, tests as they were."""
    plain, table = ff.summary(state), ff.summary(state, transform=jnp.exp)
    error, width = 1 / np.sqrt(PRECISION), stats.norm.ppf(0.975) / np.sqrt(PRECISION)
    np.testing.assert_allclose(table.estimate, np.exp(MEAN), rtol=1e-12)
    np.testing.assert_allclose(table.standard_error, np.exp(MEAN) * error, rtol=1e-12)
    np.testing.assert_allclose(table.lower, np.exp(MEAN - width), rtol=1e-9)
    np.testing.assert_allclose(table.upper, np.exp(MEAN + width), rtol=1e-9)
    np.testing.assert_array_equal(table.statistic, plain.statistic)
    np.testing.assert_array_equal(table.p_value, plain.p_value)
    delta = ff.delta_method(state, lambda p: p, transform=jnp.exp)
    np.testing.assert_allclose(table.standard_error, delta.standard_error["w"])
    assert plain.transform is None and table.transform == "exp"
    assert str(table).split()[:3] == ["exp(estimate)", "std.", "error"]
    assert [*table.to_frame().columns[[0, 4]]] == ["exp(estimate)", "exp(lower)"]


@pytest.mark.slow
def test_ratios_at_all_times(flowing):
    plain = ff.summary(flowing, effect_scale=1.0)
    table = ff.summary(flowing, effect_scale=1.0, transform=jnp.exp)
    for place, change in ((0, np.exp), (1, np.exp), (2, np.asarray)):
        expected = change(plain.anytime[place])
        np.testing.assert_allclose(table.anytime[place], expected, rtol=1e-12)
    frame = table.to_frame()
    np.testing.assert_array_equal(frame["exp(anytime_upper)"], table.anytime[1])
    np.testing.assert_array_equal(frame["log_e_value"], table.anytime[2])


def test_a_frame_of_a_flow_has_the_priors_share(flowing):
    np.testing.assert_allclose(ff.summary(flowing).to_frame()["prior_share"], 0.25)


def test_what_is_no_increasing_map_is_refused(state):
    for wrong in (jnp.square, jnp.negative, jnp.sum):
        with pytest.raises(ValueError, match=f"={wrong.__name__} is not an increasing"):
            ff.summary(state, transform=wrong)
    with pytest.raises(TypeError, match=r"a map such as jnp\.exp; got 'exp'"):
        ff.summary(state, transform="exp")


def test_a_map_that_turns_or_mixes_is_refused(belief):
    """Of which the ends alone, or the parameters at once, do not tell."""
    info = ff.structures.Diagonal(jnp.full(2, 1.0))
    state = belief(jnp.ones(2), info)  # from -.96 to 2.96
    ends = belief(jnp.array([0.0, 0.0]), ff.structures.Diagonal(jnp.full(2, 0.05)))
    for wrong, held in (
        (jnp.square, state),  # whose least value is inside
        (jnp.abs, state),
        (jnp.cumsum, state),
        (jax.nn.softmax, state),
        (jnp.sin, ends),
    ):
        with pytest.raises(ValueError, match="is not an increasing"):
            ff.summary(held, transform=wrong)
        with pytest.raises(ValueError, match="is not an increasing"):
            ff.delta_method(held, lambda p: p, transform=wrong)
    scale = jnp.array([2.0, 3.0])
    table = ff.summary(state, transform=lambda x: scale * x)
    np.testing.assert_allclose(table.estimate, [2.0, 3.0])


def test_ends_that_overflow_are_infinite(belief):
    state = belief(jnp.array([-13.5]), ff.structures.Diagonal(jnp.array([1e-6])))
    table = ff.summary(state, transform=jnp.exp)
    assert (table.lower[0], table.upper[0]) == (0.0, np.inf)
    assert "inf" in str(table)


def test_a_frame(state):
    table = ff.summary(state)
    frame = table.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert [*frame.index] == table.names == ["w[0]", "w[1]", "w[2]"]
    assert frame.index.name == "name"
    columns = ["estimate", "standard_error", "statistic", "p_value", "lower", "upper"]
    assert [*frame.columns] == columns
    for column in columns:
        np.testing.assert_array_equal(frame[column], getattr(table, column))


def test_without_pandas_the_error_names_the_extra(state, monkeypatch):
    table, real = ff.summary(state), builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "fisherflow-jax\[pandas\]"'):
        table.to_frame()


class Cells(html.parser.HTMLParser):
    """The texts of a page, and its tags that were not closed."""

    def __init__(self):
        super().__init__()
        self.texts, self.opened = [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_html(state):
    table = ff.summary(state, names=["a", "<script>b</script>", "c & d"])
    cells = Cells()
    cells.feed(table._repr_html_())
    assert cells.opened == []  # and "script" was none
    expected = {"estimate", "95% upper", "a", "<script>b</script>", "c & d"}
    assert expected < {*cells.texts}
    assert cells.texts[-1] == "observations 12"
    assert cells.texts.count("0.5000") == 2


def test_long_tables_are_shortened(belief):
    count = 1400
    state = belief(
        {"w": jnp.arange(float(count))}, ff.structures.Diagonal({"w": jnp.ones(count)})
    )
    table = ff.summary(state)
    lines = str(table).splitlines()
    assert len(lines) == 2 + 10 + 1 + 10 + 1
    assert lines[2].startswith("w[0] ") and lines[11].startswith("w[9] ")
    assert lines[12] == "... 1,380 more; to_frame() has all"
    assert lines[13].startswith("w[1390] ") and lines[22].startswith("w[1399] ")
    assert len(table.to_frame()) == len(table.estimate) == count
    assert "1,380 more" in table._repr_html_()
    cells = Cells()
    cells.feed(table._repr_html_())
    assert cells.opened == []
    whole = ff.summary(
        belief({"w": jnp.ones(40)}, ff.structures.Diagonal({"w": jnp.ones(40)}))
    )
    assert len(str(whole).splitlines()) == 43  # of 40 rows none is left out
