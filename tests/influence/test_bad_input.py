"""What influences refuse, and what bad rows, padding and no leverage do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisherflow_jax as ff

INFLUENCE, BERNOULLI = ff.influence, ff.likelihoods.bernoulli()
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
Y = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def linear(params, x):
    return x @ params


@pytest.fixture(scope="module")
def own():
    information = ff.structures.Full(jnp.eye(2) + X.T @ X / 4)
    return ff.Posterior(jnp.zeros(2), information, jnp.ones(())), linear, BERNOULLI


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (((X, Y), (X, None)), {}, "a query without targets has no loss"),
        (((X, Y),), {}, "effects are on queries"),
        (((X, None), (X, Y)), {}, "targets are None"),
        (((X, Y), (X, Y)), {"on": jnp.ones(2)}, "give queries=None"),
        (((X, Y),), {"on": jnp.ones(3)}, r"a contrast is a tree like the parameters"),
        (((X, Y), (X, Y)), {"on": lambda z: z[None]}, r"got shape \(1,\)"),
        (((X, Y), (X, Y)), {"top": 0}, "top must be a positive whole number"),
        (((X, Y), (X, Y)), {"chunk_size": 0}, "chunk_size must be a positive whole"),
        (((X, Y), (X, Y)), {"earlier": ()}, "give top, too"),
        (((X, Y), (X, Y)), {"bad_rows": "keep"}, 'bad_rows is "raise"'),
        (([], (X, Y)), {}, "there are no batches"),
        (((X, Y[:4]), (X, Y)), {}, "must agree in their leading axis"),
        (((X, 3 * Y), (X, Y)), {}, r"row 1 of the data has targets\[1\] = 3.0"),
        (((X, Y), [(X, Y), (X.at[2].set(jnp.nan), Y)]), {}, "row 2 of batch 1 of the"),
    ],
)
def test_what_is_refused(own, given, options, message):
    with pytest.raises(ValueError, match=message):
        INFLUENCE.effects(*own, *given, **options)


def test_a_state_of_other_parameters(own):
    state = ff.posterior(
        {"w": jnp.zeros(2)}, ff.structures.diagonal(), prior_precision=1.0
    )
    with pytest.raises(ValueError, match="shape"):
        INFLUENCE.leverage(own[0]._replace(mean=jnp.zeros(3)), *own[1:], (X, Y))
    with pytest.raises((TypeError, ValueError)):
        INFLUENCE.leverage(state, *own[1:], (X, Y))
    with pytest.raises(TypeError, match=r"a state has \.mean and \.information"):
        INFLUENCE.leverage(jnp.zeros(2), *own[1:], (X, Y))
    bank = [own[0], own[0]]
    with pytest.raises(ValueError, match="the rows behind a bank"):
        INFLUENCE.leave_one_out(bank, *own[1:], (X, Y))


@pytest.mark.slow
def test_an_earlier_top_of_other_queries(own):
    found = INFLUENCE.effects(*own, (X, Y), (X[:2], Y[:2]), top=1)
    with pytest.raises(ValueError, match="earlier is of 2 queries, and here are 6"):
        INFLUENCE.effects(*own, (X, Y), (X, Y), top=1, earlier=found)


def test_a_root_that_is_drawn_has_no_leverage(own):
    likelihood = ff.likelihoods.from_log_prob(BERNOULLI.log_prob, BERNOULLI.sample)
    given = *own[:2], likelihood
    with pytest.raises(ValueError, match="is drawn at random"):
        INFLUENCE.leverage(*given, (X, Y))
    found = INFLUENCE.effects(*given, (X, Y), (X, Y))  # to first order
    expected = INFLUENCE.effects(*own, (X, Y), (X, Y), first_order=True)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_a_leverage_of_one_is_refused_by_name(own):
    """A row that alone determines a direction, or that the information lacks."""
    x = X.at[4].set(jnp.array([3.0, -4.0]))
    information = ff.structures.Full(jnp.eye(2) + X.T @ X / 4)
    given = ff.Posterior(jnp.zeros(2), information, jnp.ones(())), *own[1:]
    message = r"row 4 of the data has a leverage block .* trace is \d"
    with pytest.raises(ValueError, match=message):
        INFLUENCE.leave_one_out(*given, (x, Y))
    with pytest.raises(ValueError, match=message):
        INFLUENCE.effects(*given, (x, Y), (X, Y))
    assert INFLUENCE.leverage(*given, (x, Y))[4] > 1  # which tells it
    traced = jax.jit(lambda state: INFLUENCE.self_influence(state, *own[1:], (x, Y)))
    assert np.isnan(traced(given[0])).tolist() == [i == 4 for i in range(6)]
    alone = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    exact = ff.structures.Full(alone.T @ alone / 4)
    given = ff.Posterior(jnp.zeros(2), exact, jnp.ones(())), *own[1:]
    with pytest.raises(ValueError, match=r"row 0 .* and so have 1 more"):
        INFLUENCE.leave_one_out(*given, (alone, Y[:2]))


def test_rows_without_leverage_and_rows_that_are_bad(own):
    x = X.at[2].set(0.0).at[5].set(jnp.nan)
    with pytest.raises(ValueError, match="row 5 of the data has inputs"):
        INFLUENCE.effects(*own, (x, Y), (X, Y))
    effects = INFLUENCE.effects(*own, (x, Y), (X, Y), bad_rows="drop")
    found = INFLUENCE.leave_one_out(*own, (x, Y), bad_rows="drop")
    assert effects.shape == (6, 6)
    assert not np.any(effects[:, 2::3])
    assert np.all(np.any(effects[:, jnp.array([0, 1, 3, 4])] != 0, 0))
    assert found.leverage[2] == found.cooks_distance[2] == 0
    assert found.log_prob[2] == np.log(0.5)
    assert found.leverage[5] == found.log_prob[5] == 0
    mixed = INFLUENCE.effects(*own, (X, Y), (x, Y), bad_rows="drop")
    assert not np.any(mixed[5])


def test_examples_that_interact_are_refused(own):
    def centred(params, x):
        return (x - x.mean(0)) @ params

    with pytest.raises(ValueError, match="examples interact"):
        INFLUENCE.leverage(own[0], centred, BERNOULLI, (X, Y))


def test_low_precision_outputs(own):
    def low(params, x):
        return (x @ params).astype(jnp.bfloat16)

    found = INFLUENCE.effects(own[0], low, BERNOULLI, (X, Y), (X, Y))
    expected = INFLUENCE.effects(*own, (X, Y), (X, Y))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.02)


def test_an_array_is_no_batch(own):
    with pytest.raises(ValueError, match=r"the data are a batch, .* array of shape"):
        ff.influence.leverage(*own[:3], jnp.ones((4, 2)))
