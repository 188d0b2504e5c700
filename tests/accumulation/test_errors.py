"""What accumulation refuses, and its progress bar."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff
from fisherflow_jax.accumulation import Stacked, accumulate, accumulator

X, Y = np.ones((4, 2)), np.zeros(4)
PARAMS = {"w": np.ones(2)}


def make(factory=ff.estimators.exact, structure=None):
    return factory(
        lambda params, x: x @ params["w"],
        ff.likelihoods.gaussian(),
        structure or ff.structures.diagonal(),
    )


EXACT, DRAWN = make(), make(ff.estimators.hutchinson)


@pytest.mark.parametrize("batches", [[], iter([]), (b for b in ())])
def test_no_batches(batches):
    with pytest.raises(ValueError, match="batches is empty"):
        accumulate(EXACT, PARAMS, batches)


@pytest.mark.parametrize("batches", [(X, Y), (X, Y, Y), {"x": X}, X, 3])
def test_one_batch_alone(batches):
    with pytest.raises(ValueError, match=r"one batch alone goes in a list, \[batch\]"):
        accumulate(EXACT, PARAMS, batches)


def test_a_list_of_arrays_is_no_list_of_batches():
    with pytest.raises(ValueError, match=r"a batch is .*ndarray of length 4"):
        accumulate(EXACT, PARAMS, [X, Y])


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((X[:0], Y[:0]), "must not be empty"),
        ((X, Y[:2]), "agree in their leading axis"),
        ((X, Y, Y[:2]), r"weights of batch 1 must have shape \(4,\).*got \(2,\)"),
        ((X, Y, -1 - Y), r"row 0 of batch 1 has weights\[0\] = -1.0.*rows 1, 2, 3\."),
        ((X, Y, Y * np.nan), r"row 0 of batch 1 has weights\[0\] = nan"),
    ],
)
def test_batches_that_are_none(batch, match):
    with pytest.raises(ValueError, match=match):
        accumulate(EXACT, PARAMS, [(X, Y), batch])


@pytest.mark.parametrize(
    ("stack", "match"),
    [
        (Stacked(X[None], Y), "share their first two axes"),
        (Stacked(X[None, :0], Y[None, :0]), "neither of them 0"),
        (Stacked(X[None], Y[None], Y), r"weights of ff.Stacked .* \(1, 4\)"),
        (Stacked(Y, None), "share their first two axes"),
    ],
)
def test_stacks_that_are_none(stack, match):
    with pytest.raises(ValueError, match=match):
        accumulate(EXACT, PARAMS, stack)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, np.nan])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=rf"decay must be in \(0, 1\); got {decay}\."):
        accumulate(EXACT, PARAMS, [(X, Y)], decay=decay)


def test_a_missing_key():
    with pytest.raises(ValueError, match=r"estimators\.hutchinson draws.*a key"):
        accumulate(DRAWN, PARAMS, [(X, Y)])


def test_states_that_do_not_fit():
    def go_on(state, **options):
        return accumulate(DRAWN, PARAMS, [(X, Y)], state=state, **options)

    sound = accumulator(DRAWN).init(PARAMS, 0)
    with pytest.raises(ValueError, match="the state has no key"):
        go_on(accumulator(EXACT).init(PARAMS))
    with pytest.raises(ValueError, match="holds its own key"):
        go_on(sound, key=0)
    other = make(ff.estimators.hutchinson, ff.structures.full())
    with pytest.raises(ValueError, match=r"got shapes Full.*, not Diagonal"):
        go_on(accumulator(other).init(PARAMS, 0))
    message = r"\(3,\).*, not Diagonal\(.*\(2,\)"
    with pytest.raises(ValueError, match=message):
        go_on(accumulator(DRAWN).init({"w": np.ones(3)}, 0))
    with pytest.raises(ValueError, match=r"restore a checkpoint into one.*got dict"):
        go_on(sound._asdict())


def test_parameters_that_are_not_finite():
    with pytest.raises(ValueError, match="parameter w holds a NaN"):
        accumulate(EXACT, {"w": np.array([1.0, np.nan])}, [(X, Y)])
    with pytest.raises(ValueError, match="real floating-point"):
        accumulate(EXACT, {"w": np.array([1, 2])}, [(X, Y)])


def test_meshes():
    with pytest.raises(ValueError, match=r"mesh is a jax.sharding.Mesh.*got int"):
        accumulate(EXACT, PARAMS, [(X, Y)], mesh=4)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("data",))
    gather = accumulator(EXACT, mesh=mesh)
    with pytest.raises(ValueError, match=r"4 examples does not divide .* 3 devices"):
        gather.update(gather.init(PARAMS), PARAMS, (X, Y))


def test_a_mesh_refuses_examples_that_interact():
    """Told by the program, or said: no device could run its rows alone."""

    def centered(params, x):
        return (x - x.mean(0)) @ params["w"]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    told = r"examples interact \((%s).*2 devices cannot each have a part.*ff.Shared"
    cases = {
        "reduce_sum over the examples": (centered, None),
        "batched=True": (lambda params, x: x @ params["w"], True),
    }
    for reason, (apply_fn, batched) in cases.items():
        drawn = ff.estimators.hutchinson(
            apply_fn,
            ff.likelihoods.gaussian(),
            ff.structures.diagonal(),
            groups=1,
            batched=batched,
        )
        accumulate(drawn, PARAMS, [(X, Y)], key=0)
        with pytest.raises(ValueError, match=told % reason):
            accumulate(drawn, PARAMS, [(X, Y)], key=0, mesh=mesh)


def test_negative_weights_under_jit_are_counted():
    gather = accumulator(EXACT)
    state = jax.jit(gather.update)(gather.init(PARAMS), PARAMS, (X, Y, Y - 1))
    assert (state.num_skipped, state.rows_skipped, state.count) == (0, 4, 0)
    with pytest.raises(ValueError, match=r"weights\[0\] = -1.0, which is no multip"):
        gather.update(state, PARAMS, (X, Y, Y - 1))


# ---- the bar


def test_a_bar_is_drawn_where_it_is_asked_for(capsys):
    accumulate(EXACT, PARAMS, [(X, Y)] * 3, progress=True)
    assert "3/3" in capsys.readouterr().err
    for progress in (None, False):  # None: standard error is no terminal here
        accumulate(EXACT, PARAMS, [(X, Y)] * 3, progress=progress)
        assert capsys.readouterr().err == ""


def test_a_bar_does_not_flood_a_file(capsys):
    def slowly():
        for _ in range(12):
            time.sleep(0.03)  # tqdm's own ten states a second would be four
            yield X, Y

    accumulate(EXACT, PARAMS, slowly(), progress=True)
    assert capsys.readouterr().err.count("\r") <= 2  # the first, and the last


def test_a_bar_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert accumulate(EXACT, PARAMS, [(X, Y)]).count == 4
    with pytest.raises(ImportError, match="pip install tqdm"):
        accumulate(EXACT, PARAMS, [(X, Y)], progress=True)


def test_a_bar_for_one_program():
    with pytest.raises(ValueError, match="progress=True needs a loader"):
        accumulate(EXACT, PARAMS, Stacked(X[None], Y[None]), progress=True)


def test_a_terminal_is_asked_for_its_patience(monkeypatch):
    given = {}

    def bar(loader, **options):
        given.update(options)
        return loader

    monkeypatch.setattr("tqdm.tqdm", bar)
    accumulate(EXACT, PARAMS, [(jnp.asarray(X), Y)])
    assert given["disable"] is None
    assert given["delay"] == 2


def test_an_estimator_without_a_model_is_refused_with_the_way_out():
    for choice in (ff.estimators.exact, ff.estimators.hutchinson(num_probes=2)):
        with pytest.raises(ValueError, match=r"bound to a model: give it estimator\("):
            ff.accumulate(choice, jnp.zeros(2), [])
