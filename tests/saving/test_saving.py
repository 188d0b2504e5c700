"""What is saved is loaded, to the bit; what is something else is refused by name."""

import json
import os
import re
import zipfile
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisherflow_jax as ff
from saved_states import (
    PARAMS,
    X,
    Y,
    assert_same,
    begun,
    flows,
    line,
    network,
    noisy,
)

DATA = Path(__file__).parent / "data"
CATEGORICAL = ff.likelihoods.categorical()
GAUSSIAN = ff.likelihoods.gaussian(1.0)


def again(path, value, **options):
    ff.save(path, value)
    return ff.load(path, **options)


@pytest.mark.slow
def test_states_of_every_flow(tmp_path):
    path = tmp_path / "state.npz"
    for flow in flows():
        state = begun(flow)
        ff.save(path, state, flow=flow)
        assert_same(ff.load(path), state)
        assert_same(ff.load(path, flow=flow), state)
        assert_same(ff.load(path, like=jax.eval_shape(lambda x: x, state)), state)


def test_a_flow_goes_on_to_the_bit(tmp_path):
    flow = ff.fisher_flow(line, GAUSSIAN, memory=ff.memories.windowed(2))
    state = flow.init(jnp.zeros(3))
    state, _ = flow.update(state, (X, X[:, 0]))
    ff.save(tmp_path / "a", state, flow=flow)
    loaded = ff.load(tmp_path / "a", flow=flow)
    batch = X[::-1], X[:, 1]
    assert_same(flow.update(loaded, batch)[0], flow.update(state, batch)[0])


def test_banks_and_sparse_flows(tmp_path):
    bank = ff.bank(
        [
            ff.fisher_flow(line, GAUSSIAN),
            ff.fisher_flow(line, GAUSSIAN, memory=ff.memories.exponential(0.9)),
        ]
    )
    sparse = ff.sparse.flow(ff.likelihoods.bernoulli(), 5)
    members = noisy(jax.eval_shape(lambda: bank.init(jnp.zeros(3))))
    for flow, state in ((bank, members), (sparse, sparse.init())):
        ff.save(tmp_path / "a", state, flow=flow)
        assert_same(ff.load(tmp_path / "a", flow=flow), state)
    other = ff.sparse.flow(ff.likelihoods.bernoulli(), 6)
    with pytest.raises(ValueError, match="num_features is 5, and this one's is 6"):
        ff.load(tmp_path / "a", flow=other)
    ff.save(tmp_path / "b", members, flow=bank)
    other = ff.bank(bank.flows[::-1])
    with pytest.raises(ValueError, match=r"flows\[0\]\.memory is stationary\(\)"):
        ff.load(tmp_path / "b", flow=other)
    ff.save(tmp_path / "b", members)
    with pytest.raises(ValueError, match="2 members, and the bank 1 flows"):
        ff.load(tmp_path / "b", flow=ff.bank(bank.flows[:1]))


@pytest.mark.slow
def test_laplace_and_its_parts(tmp_path):
    held = (X, Y)
    found = ff.laplace(network, CATEGORICAL, PARAMS, [held], validation=held)
    path = tmp_path / "laplace.npz"
    ff.save(path, found)
    with pytest.raises(
        ValueError,
        match=r"give state\.apply_fn, state\.report\.structure.*"
        r"as in like=ff\.Laplace\(\.\.\., apply_fn, \.\.\., \.\.\.\)\.",
    ):
        ff.load(path)
    loaded = ff.load(path, like=ff.Laplace(..., network, ..., ...))
    assert type(loaded) is ff.Laplace and loaded.apply_fn is network
    assert loaded.likelihood == CATEGORICAL
    assert str(loaded.report) == str(found.report)
    assert_same(loaded.state, found.state)
    assert_same(loaded.report.accumulation, found.report.accumulation)
    expected = ff.predict(*found[:3], X).mean
    assert np.array_equal(ff.predict(*loaded[:3], X).mean, expected)
    with pytest.raises(TypeError, match=r"no functions.*as state\.apply_fn"):
        ff.predict(*ff.load(path, like=...)[:3], X)
    ff.save(tmp_path / "again", loaded)  # what was left out stays so
    loaded = ff.load(tmp_path / "again", like=ff.Laplace(..., network, ..., ...))
    assert str(loaded.report) == str(found.report)
    with pytest.raises(
        ValueError, match=r"is categorical\(\) in the file, and poisson"
    ):
        ff.load(path, like=ff.Laplace(..., network, ff.likelihoods.poisson(), ...))
    with pytest.raises(ValueError, match="the function network in the file, and float"):
        ff.load(path, like=ff.Laplace(..., X, ..., ...))


def test_the_noise_of_a_calibration_is_loaded(tmp_path):
    truth = X @ jnp.array([1.0, 2.0, 3.0])
    found = ff.laplace(line, GAUSSIAN, jnp.ones(3), [(X, truth)], validation=(X, truth))
    loaded = again(tmp_path / "a", found.report.calibration)
    assert type(loaded) is ff.Calibration
    assert loaded.likelihood == found.likelihood != GAUSSIAN
    assert_same(loaded.posterior, found.state)
    assert_same(loaded[2:], found.report.calibration[2:])


@pytest.mark.slow
def test_a_posterior_a_smoother_and_an_optimiser(tmp_path):
    path = tmp_path / "a"
    layers = ff.layers.find_layers(network, PARAMS, X)
    estimator = ff.estimators.exact(
        network, CATEGORICAL, ff.structures.kronecker(layers)
    )
    gathered = ff.accumulate(estimator, PARAMS, [(X, Y)])
    assert_same(again(path, gathered), gathered)
    posterior = ff.posterior(PARAMS, gathered, prior_precision=1.0)
    loaded = again(path, posterior)
    assert_same(loaded, posterior)
    assert loaded.information.layers == layers
    flow = ff.fisher_flow(line, GAUSSIAN, memory=ff.memories.random_walk(0.1))

    def step(state, batch):
        state, _ = flow.update(state, batch)
        return state, state

    stream = jnp.stack([X, X]), jnp.stack([X[:, 0], X[:, 1]])
    _, states = jax.lax.scan(step, flow.init(jnp.zeros(3)), stream)
    smoothed = ff.smooth(flow, states)
    assert_same(again(path, smoothed), smoothed)
    optimiser = ff.kfac(0.1, network, CATEGORICAL, layers, key=0)
    state = noisy(optimiser.init(PARAMS))
    ff.save(path, state)
    with pytest.raises(ValueError, match="no types of other libraries: give state"):
        ff.load(path)
    assert_same(ff.load(path, like=optimiser.init(PARAMS)), state)


def test_trees_of_other_libraries_come_from_like(tmp_path):
    frozen = flax.core.freeze(PARAMS)
    with pytest.raises(ValueError, match=r"give state \(a FrozenDict\)"):
        again(tmp_path / "a", frozen)
    assert_same(ff.load(tmp_path / "a", like=frozen), frozen)
    other = flax.core.freeze({**PARAMS, "h": PARAMS["w"]})
    with pytest.raises(
        ValueError, match=r"float64\[2, 2\] in the file, and float64\[3, 2\]"
    ):
        ff.load(tmp_path / "a", like=other)
    with pytest.raises(ValueError, match=r"a FrozenDict.*in the file, and a dict of"):
        ff.load(tmp_path / "a", like=PARAMS)
    state = optax.adam(0.1).init(PARAMS)
    assert_same(again(tmp_path / "a", state, like=state), state)


NARROW = "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"
DTYPES = *NARROW, "bool", "int8", "uint32", "int64", "float32", "float64", "complex64"


def test_every_kind_of_leaf(tmp_path):
    path, numbers = tmp_path / "a", [3.0, 1.0, 0.0]
    values = {name: jnp.asarray(numbers).astype(name) for name in DTYPES}
    values["bool"] = jnp.array([True, False])
    values |= {
        "empty": jnp.zeros((0, 3)),
        "scalar": jnp.array(0.1),
        "numpy": X.__array__(),
    }
    values |= {
        "turned": np.arange(6.0).reshape(2, 3).T,
        "big": np.arange(3, dtype=">i4"),
    }
    loaded = again(path, values)
    values["big"] = values["big"].astype("i4")
    assert_same(loaded, values)
    plain = {"a": [1, 2.5, (True, None)], 3: "text", "e": [float("inf"), -0.0], "": {}}
    assert repr(again(path, plain)) == repr(plain)
    assert np.isnan(again(path, float("nan")))
    keys = {impl: jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg")}
    keys["stack"] = jax.random.split(keys["rbg"], 4)
    loaded = again(path, keys)
    for name, key in keys.items():
        assert loaded[name].dtype == key.dtype
        assert np.array_equal(*map(jax.random.key_data, (loaded[name], key)))
    with np.load(path, allow_pickle=False) as file:  # any reader of .npz opens it
        assert np.array_equal(file["0"], jax.random.key_data(keys["threefry2x32"]))


def test_a_sharded_state_is_written_whole(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    value = jnp.arange(8.0 * jax.device_count())
    loaded = again(tmp_path / "a", jax.device_put(value, rows))
    assert_same(loaded, value)
    assert loaded.devices() == {jax.devices()[0]}


# ---- another flow, another shape


def test_another_flow_is_refused_with_the_difference(tmp_path):
    def made(likelihood=GAUSSIAN, **options):
        return ff.fisher_flow(line, likelihood, **options)

    flow, path = made(), tmp_path / "a"
    state = flow.init(jnp.zeros(3))
    ff.save(path, state, flow=flow)
    structures = ff.structures
    other = structures.diagonal()
    for change, words in (
        (
            {"structure": other},
            r"structure is full\(\), and this one's is diagonal\(\)",
        ),
        (
            {"memory": ff.memories.exponential(0.9)},
            r"stationary\(\).*exponential\(0.9\)",
        ),
        ({"prior_precision": 7.0}, r"prior_precision is 1.0, and this one's is 7.0"),
        ({"likelihood": ff.likelihoods.gaussian(2.0)}, r"scale=1.0.*scale=2.0"),
        ({"num_steps": 1}, "num_steps"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{words}"):
            ff.load(path, flow=made(**change))
    ff.load(path, flow=made(chunk_size=7, bad_rows="drop"))  # of no state
    ff.save(path, state)  # nothing but its form is known then
    ff.load(path, flow=made(prior_precision=7.0))
    with pytest.raises(ValueError, match="information is Full, not Diagonal"):
        ff.load(path, flow=made(structure=other))
    for wrong in (made(structure=other), made(robust=True)):
        with pytest.raises(ValueError, match="another flow's"):
            ff.save(path, state, flow=wrong)
    with pytest.raises(TypeError, match="flow stands before its state"):
        ff.save(path, flow, flow=state)


def test_another_form_than_that_of_like_is_refused(tmp_path):
    state = begun(flow := ff.fisher_flow(line, GAUSSIAN))
    ff.save(tmp_path / "a", state)
    fields = {
        "mean": (
            jnp.zeros(4),
            r"mean is float64\[3\] in the file, and float64\[4\] in like",
        ),
        "count": (
            jnp.zeros((), "float32"),
            r"float64\[\] in the file, and float32\[\]",
        ),
        "meat": (state.information, "meat is nothing in the file, and a Full in like"),
        "prior": (None, "prior is a Prior in the file, and nothing"),
        "information": (
            ff.structures.Diagonal(X[0]),
            "a Full in the file, and a Diagonal",
        ),
    }
    for name, (value, words) in fields.items():
        with pytest.raises(ValueError, match=words):
            ff.load(tmp_path / "a", like=state._replace(**{name: value}))
    wrong = state._replace(**{name: value for name, (value, _) in fields.items()})
    with pytest.raises(ValueError, match=r"mean.*count.*") as error:
        ff.load(tmp_path / "a", like=wrong)
    assert str(error.value).count(" in the file, and ") == len(fields)
    layers = ff.layers.find_layers(network, PARAMS, X)
    table = ff.layers.find_layers(network, {**PARAMS, "h": jnp.ones((2, 3))}, X)
    ff.save(tmp_path / "a", layers)
    assert ff.load(tmp_path / "a", like=layers) is layers
    with pytest.raises(ValueError, match="another table of layers"):
        ff.load(tmp_path / "a", like=table)
    assert flow.recipe


def test_float64_is_not_made_float32_in_silence(tmp_path):
    ff.save(tmp_path / "a", {"w": jnp.ones(3)})
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=r"state\.w is float64.*jax_enable_x64"),
    ):
        ff.load(tmp_path / "a")


# ---- what cannot be saved, and what is there


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": object()}, r"state\.a is .*object"),
        ({"a": np.array([None])}, r"state\.a is an array of object"),
        ({"a": np.array(["x"])}, r"state\.a is an array of <U1"),
        ({"a": {1, 2}}, r"state\.a is \{1, 2\}"),
    ],
)
def test_what_is_no_state_is_refused(tmp_path, value, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ff.save(tmp_path / "a", value)
    assert os.listdir(tmp_path) == []


def test_a_trace_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda x: ff.save(tmp_path / "a", x))(X)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    ff.save(path, X)
    ff.save(path, Y)
    assert_same(ff.load(path), Y)
    first = path.read_bytes()
    ff.save(path, Y)
    assert path.read_bytes() == first  # no date in it

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        ff.save(path, X)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "b"
    (tmp_path / "a").symlink_to(target)
    ff.save(tmp_path / "a", X)
    assert (tmp_path / "a").is_symlink()
    assert_same(ff.load(target), X)


# ---- files of earlier versions

KEPT = {path.stem: path for path in sorted(DATA.glob("*.npz"))}


def kept_states():
    """What the files of the first format were written from."""
    flow = ff.fisher_flow(
        network,
        CATEGORICAL,
        structure=ff.structures.kronecker(ff.layers.find_layers(network, PARAMS, X)),
        memory=ff.memories.windowed(2),
    )
    state = begun(flow)
    robust = ff.fisher_flow(line, ff.likelihoods.gaussian(None), robust=True)
    calibration = ff.Calibration(
        posterior=ff.posterior(
            {"w": jnp.ones(2, "float32")},
            ff.structures.Diagonal({"w": jnp.ones(2, "float32")}),
            prior_precision=1.0,
        ),
        likelihood=ff.likelihoods.gaussian(0.25),
        scale=jnp.array(0.5, "float32"),
        noise=None,
        before=jnp.array(2.0, "float32"),
        after=jnp.array(1.0, "float32"),
        mean_only=jnp.array(1.5, "float32"),
        boundary=jnp.array(0, "int32"),
    )
    return {
        "calibration-1": (calibration, None),
        "kronecker-windowed-1": (state, flow),
        "robust-1": (begun(robust), robust),
    }


def test_files_of_every_format_are_kept():
    assert KEPT.keys() == kept_states().keys()
    assert sum(path.stat().st_size for path in KEPT.values()) < 50_000


@pytest.mark.parametrize("name", KEPT)
def test_a_file_of_an_earlier_version_is_read(name):
    state, flow = kept_states()[name]
    loaded = ff.load(KEPT[name], flow=flow)
    assert_same(loaded, state)
    assert repr(loaded) == repr(state)


def test_the_format_is_what_it_was():
    """A change of what is written is a new format, and a new file here."""
    with zipfile.ZipFile(KEPT["calibration-1"]) as file:
        assert json.loads(file.read("header.json")).keys() == {
            "format", "flow", "tables", "state", "arrays"
        }  # fmt: skip
