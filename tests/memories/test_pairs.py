"""Every structure with every memory: supported pairs run, the others say why not."""

import functools
import itertools

import jax
import numpy as np
import pytest

import fisherflow_jax as ff
import streams

STRUCTURES = ["scalar", "diagonal", "units", "full", "low_rank"]
MEMORIES = ["stationary", "exponential", "windowed", "random_walk", "adaptive"]
REFUSED = {("low_rank", "random_walk")} | {
    (structure, "adaptive") for structure in STRUCTURES if structure != "full"
}
PAIRS = [(s, m) for s in STRUCTURES for m in MEMORIES if (s, m) not in REFUSED]


def history(structure, memory):
    flow = streams.flow(structure, memory)
    return streams.run(flow, streams.start(flow), streams.batches(4))


@pytest.mark.slow_cases
@pytest.mark.parametrize(("structure", "memory"), PAIRS)
def test_supported_pairs_learn_and_stay_positive_definite(structure, memory):
    flow = streams.flow(structure, memory)
    first, state = streams.start(flow), history(structure, memory)[-1]
    assert state.num_skipped == 0 and state.step == 6
    information = streams.dense(state.information)
    assert np.linalg.eigvalsh(information).min() > 0
    assert np.isfinite(state.log_evidence)
    # types, shapes and weak types are those of the start, as scan asks
    jax.tree.map(_same_aval, state, first)
    errors = [
        streams.TARGETS - streams.INPUTS @ streams.flat(mean)
        for mean in (first.prior.origin, state.mean)
    ]
    before, after = (streams.WEIGHTS @ e**2 for e in errors)
    assert after < 0.7 * before


def _same_aval(value, like):
    assert (value.shape, value.dtype, value.weak_type) == (
        like.shape,
        like.dtype,
        like.weak_type,
    )


@pytest.mark.parametrize(("structure", "memory"), sorted(REFUSED))
def test_unsupported_pairs_raise_when_built_and_name_both(structure, memory):
    name = {"units": "block"}.get(structure, structure)
    with pytest.raises(ValueError, match=rf"structure {name}\(.*{memory} memory"):
        streams.flow(structure, memory)


@pytest.mark.parametrize(
    ("structure", "options", "message"),
    [
        ("low_rank", {"robust": True}, r"low_rank\(1\) does not go with robust=True"),
        ("low_rank", {"marginal": True}, r"low_rank\(1\) .* marginal=True"),
        ("low_rank", {"compensated": True}, r"low_rank\(1\) .* compensated=True"),
        ("full", {"marginal": True}, r"full\(\) does not go with marginal=True"),
        ("diagonal", {"num_steps": 0}, "num_steps must be a positive whole number"),
        ("diagonal", {"num_steps": 1.5}, "num_steps must be .* got 1.5"),
    ],
)
def test_options_that_do_not_go_together_are_named(structure, options, message):
    with pytest.raises(ValueError, match=message):
        streams.flow(structure, **options)


@pytest.mark.parametrize("structure", ["all", "rank_3"])
def test_one_block_of_all_and_all_directions_are_full(structure):
    """After each batch: the first ones are those of a stationary memory."""
    full = history("full", "windowed")
    for found, expected in zip(history(structure, "windowed"), full, strict=True):
        np.testing.assert_allclose(
            streams.flat(found.mean), streams.flat(expected.mean), rtol=1e-12
        )
        np.testing.assert_allclose(
            streams.dense(found.information),
            streams.dense(expected.information),
            rtol=1e-12,
        )
        np.testing.assert_allclose(
            found.log_evidence, expected.log_evidence, rtol=1e-12
        )


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("structure", "likelihood", "num_steps"),
    [
        ("scalar", "gaussian", 1),
        ("units", "gaussian", 1),
        ("diagonal", "bernoulli", 4),
        ("full", "bernoulli", 4),
        ("low_rank", "bernoulli", 4),
    ],
)
def test_information_times_mean_grows_by_the_shift_of_the_site(
    structure, likelihood, num_steps
):
    """`I theta = I^- theta^- + b` in any structure, after any number of steps.

    Relative to the new mean, where the left side is zero.
    """
    flow = (
        streams.flow(structure, "windowed")
        if num_steps == 1
        else streams.flow(structure, "windowed", likelihood, num_steps=num_steps)
    )
    batches = streams.batches(4, likelihood)
    states = [streams.start(flow)]
    states += streams.run(flow, states[0], batches[: streams.WINDOW])
    mean = streams.ORIGIN
    for index, (before, state) in enumerate(itertools.pairwise(states)):
        vectors = jax.tree.map(lambda x, i=index: x[i], state.memory.sites.linear)
        believed, mean = mean, streams.flat(state.mean)
        pull = streams.dense(before.information) @ (mean - believed)
        np.testing.assert_allclose(
            streams.flat(vectors.vector), pull, rtol=1e-9, atol=1e-11
        )


def tree_of_rows(rows):
    return {"level": rows[:, 0], "slope": rows[:, 1:]}


def test_a_prior_richer_than_the_structure_is_kept_whole():
    prior = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]])
    reduce = jax.jit(lambda rows: ff.structures.full().reduce(tree_of_rows(rows)))
    full = reduce(np.linalg.cholesky(prior).T)
    for structure in ("diagonal", "low_rank"):
        make = ff.fisher_flow(
            streams.linear,
            ff.likelihoods.gaussian(streams.SCALE),
            structure=streams.STRUCTURES[structure],
            memory=ff.memories.windowed(2),
            prior_precision=full,
            num_steps=1,
            robust=structure == "diagonal",
        )
        if structure == "low_rank":
            with pytest.raises(ValueError, match="low_rank keeps its rank only beside"):
                streams.start(make)
            continue
        state = streams.start(make)
        np.testing.assert_allclose(streams.dense(state.information), prior)
        states = streams.run(make, state, streams.batches(4)[:3])
        rows = slice(4, 12)
        squares = streams.WEIGHTS[rows] @ streams.INPUTS[rows] ** 2 / streams.SCALE**2
        expected = prior + np.diag(squares)
        np.testing.assert_allclose(streams.dense(states[-1].information), expected)
        errors = jax.jit(functools.partial(ff.standard_error, robust=True))
        assert np.isfinite(streams.flat(errors(states[-1]))).all()
