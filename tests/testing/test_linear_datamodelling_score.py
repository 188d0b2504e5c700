"""The rank correlation of summed influences with losses of models trained anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

import fisherflow_jax as ff

RNG = np.random.default_rng(0)
MASKS = RNG.random((20, 8)) < 0.5
EFFECTS = RNG.normal(size=(4, 8))
LOSSES = RNG.normal(size=(20, 4)) - MASKS @ EFFECTS.T


def test_it_is_spearmans_of_the_rows_left_out():
    effects = EFFECTS.copy()
    effects[3] = [1.0] * 4 + [0.0] * 4  # which ties
    found = jax.jit(ff.testing.linear_datamodelling_score)(effects, MASKS, LOSSES)
    predicted = effects @ (1 - MASKS).T
    expected = [spearmanr(predicted[i], LOSSES[:, i]).statistic for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_effects_that_add_up_have_the_score_one():
    losses = -(MASKS @ EFFECTS.T)  # kept rows lower the loss by their effects
    found = ff.testing.linear_datamodelling_score(EFFECTS, MASKS.astype(int), losses)
    np.testing.assert_allclose(found, 1.0)
    turned = ff.testing.linear_datamodelling_score(-EFFECTS, MASKS, losses)
    np.testing.assert_allclose(turned, -1.0)


def test_nothing_to_order_is_nan():
    same = LOSSES.copy()
    same[:, 1] = 2.0
    found = ff.testing.linear_datamodelling_score(EFFECTS, MASKS, same)
    assert np.isnan(found).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": LOSSES.T}, "go together"),
        ({"masks": MASKS[:, 1:]}, "go together"),
        ({"masks": 2.0 * MASKS}, r"True or False \(1 or 0\)"),
        ({"masks": MASKS[:2], "losses": LOSSES[:2]}, "3 subsets or more; got 2"),
        ({"effects": EFFECTS * np.nan}, "effects must be finite"),
        ({"losses": jnp.full((20, 4), jnp.inf)}, "losses must be finite"),
    ],
)
def test_what_it_refuses(change, message):
    given = {"effects": EFFECTS, "masks": MASKS, "losses": LOSSES} | change
    with pytest.raises(ValueError, match=message):
        ff.testing.linear_datamodelling_score(**given)
