"""Likelihoods: the distribution of targets given the outputs of a model."""

from fisherflow_jax.likelihoods.classification import bernoulli as bernoulli
from fisherflow_jax.likelihoods.classification import categorical as categorical
from fisherflow_jax.likelihoods.counts import negative_binomial as negative_binomial
from fisherflow_jax.likelihoods.counts import poisson as poisson
from fisherflow_jax.likelihoods.generic import from_log_prob as from_log_prob
from fisherflow_jax.likelihoods.likelihood import Likelihood as Likelihood
from fisherflow_jax.likelihoods.likelihood import root_columns as root_columns
from fisherflow_jax.likelihoods.location import gaussian as gaussian
from fisherflow_jax.likelihoods.location import (
    gaussian_location_scale as gaussian_location_scale,
)
from fisherflow_jax.likelihoods.location import student_t as student_t
from fisherflow_jax.likelihoods.positive import gamma as gamma
from fisherflow_jax.likelihoods.roots import cholesky_root as cholesky_root
from fisherflow_jax.likelihoods.roots import diagonal_root as diagonal_root
from fisherflow_jax.likelihoods.roots import rank_root as rank_root
