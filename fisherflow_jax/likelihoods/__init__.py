"""Likelihoods: the distribution of targets given the outputs of a model."""

from fisherflow_jax._ground.arrays import widen as widen
from fisherflow_jax.likelihoods._classification import bernoulli as bernoulli
from fisherflow_jax.likelihoods._classification import categorical as categorical
from fisherflow_jax.likelihoods._expected_information import (
    OutputInformation as OutputInformation,
)
from fisherflow_jax.likelihoods._expected_information import (
    output_information as output_information,
)
from fisherflow_jax.likelihoods._from_distribution import (
    from_distribution as from_distribution,
)
from fisherflow_jax.likelihoods._generic import from_log_prob as from_log_prob
from fisherflow_jax.likelihoods._likelihood import IDENTITY as IDENTITY
from fisherflow_jax.likelihoods._likelihood import LOG as LOG
from fisherflow_jax.likelihoods._likelihood import LOGIT as LOGIT
from fisherflow_jax.likelihoods._likelihood import SOFTMAX as SOFTMAX
from fisherflow_jax.likelihoods._likelihood import Likelihood as Likelihood
from fisherflow_jax.likelihoods._likelihood import Root as Root
from fisherflow_jax.likelihoods._likelihood import Scale as Scale
from fisherflow_jax.likelihoods._likelihood import root_columns as root_columns
from fisherflow_jax.likelihoods._location import gaussian as gaussian
from fisherflow_jax.likelihoods._location import (
    gaussian_location_scale as gaussian_location_scale,
)
from fisherflow_jax.likelihoods._location import student_t as student_t
from fisherflow_jax.likelihoods._log_mean import gamma as gamma
from fisherflow_jax.likelihoods._log_mean import negative_binomial as negative_binomial
from fisherflow_jax.likelihoods._log_mean import poisson as poisson
from fisherflow_jax.likelihoods._nuisance import Nuisance as Nuisance
from fisherflow_jax.likelihoods._roots import cholesky_root as cholesky_root
from fisherflow_jax.likelihoods._roots import diagonal_root as diagonal_root
from fisherflow_jax.likelihoods._roots import rank_root as rank_root
