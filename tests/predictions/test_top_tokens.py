"""The most probable next tokens, against the Jacobian of their log-odds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy import special, stats

import fisherflow_jax as ff
import prediction_cases as cases
from prediction_cases import MODELS

CATEGORICAL = ff.likelihoods.categorical()
MODEL = MODELS["tokens"]


def test_against_the_jacobian_of_the_log_odds():
    posterior = cases.state("tokens", "kronecker")
    found = ff.predictions.top_tokens(
        posterior, MODEL.apply_fn, CATEGORICAL, MODEL.inputs, 2, level=0.9
    )
    flat, unravel = ravel_pytree(MODEL.params)

    def log_odds(flat):
        return CATEGORICAL.line(MODEL.apply_fn(unravel(flat), MODEL.inputs))

    both = jax.jit(lambda flat: (log_odds(flat), jax.jacrev(log_odds)(flat)))
    eta, rows = map(np.asarray, both(flat))
    variance = np.einsum("...d,de,...e", rows, cases.covariance(posterior), rows)
    order = np.argsort(-eta, -1)[..., :2]
    eta, std = (np.take_along_axis(x, order, -1) for x in (eta, np.sqrt(variance)))
    share, reach = special.expit(eta), stats.norm.ppf(0.95) * std
    np.testing.assert_array_equal(found.ids, order)
    np.testing.assert_allclose(found.probabilities, share, rtol=1e-10)
    np.testing.assert_allclose(found.std, share * (1 - share) * std, rtol=1e-8)
    np.testing.assert_allclose(found.lower, special.expit(eta - reach), rtol=1e-8)
    np.testing.assert_allclose(found.upper, special.expit(eta + reach), rtol=1e-8)


def test_bad_input():
    posterior = cases.state("tokens", "diagonal")
    arguments = posterior, MODEL.apply_fn, CATEGORICAL, MODEL.inputs
    with pytest.raises(ValueError, match="k = 6 is more than the 5 classes"):
        ff.predictions.top_tokens(*arguments, 6)
    with pytest.raises(ValueError, match="positive whole number of classes; got 0"):
        ff.predictions.top_tokens(*arguments, 0)
    with pytest.raises(ValueError, match="categorical targets; got poisson"):
        ff.predictions.top_tokens(
            *arguments[:2], ff.likelihoods.poisson(), MODEL.inputs, 1
        )
    bank = ff.BankState((posterior, posterior), jnp.log(jnp.array([0.5, 0.5])))
    with pytest.raises(ValueError, match="takes one state"):
        ff.predictions.top_tokens(bank, *arguments[1:], 1)
