"""What a state says: intervals, samples, predictions, tests, fusion."""

from fisherflow_jax.posteriors._anytime import EValue as EValue
from fisherflow_jax.posteriors._anytime import anytime as anytime
from fisherflow_jax.posteriors._anytime import e_value as e_value
from fisherflow_jax.posteriors._belief import Gaussian as Gaussian
from fisherflow_jax.posteriors._belief import degrees_of_freedom as degrees_of_freedom
from fisherflow_jax.posteriors._belief import gaussian as gaussian
from fisherflow_jax.posteriors._belief import gaussians as gaussians
from fisherflow_jax.posteriors._belief import mixture as mixture
from fisherflow_jax.posteriors._coefficients import Summary as Summary
from fisherflow_jax.posteriors._gaussian import Posterior as Posterior
from fisherflow_jax.posteriors._gaussian import check_about as check_about
from fisherflow_jax.posteriors._gaussian import check_like as check_like
from fisherflow_jax.posteriors._gaussian import log_density as log_density
from fisherflow_jax.posteriors._gaussian import posterior as posterior
from fisherflow_jax.posteriors._gaussian import sample as sample
from fisherflow_jax.posteriors._hypotheses import Estimate as Estimate
from fisherflow_jax.posteriors._hypotheses import WaldTest as WaldTest
from fisherflow_jax.posteriors._hypotheses import delta_method as delta_method
from fisherflow_jax.posteriors._hypotheses import wald_test as wald_test
from fisherflow_jax.posteriors._intervals import check_level as check_level
from fisherflow_jax.posteriors._intervals import (
    confidence_interval as confidence_interval,
)
from fisherflow_jax.posteriors._intervals import standard_error as standard_error
from fisherflow_jax.posteriors._intervals import two_sided as two_sided
from fisherflow_jax.posteriors._intervals import two_sided_tail as two_sided_tail
from fisherflow_jax.posteriors._summary import summary as summary
from fisherflow_jax.posteriors._undetermined import Direction as Direction
from fisherflow_jax.posteriors._undetermined import undetermined as undetermined
from fisherflow_jax.posteriors._undetermined import warn_of_refused as warn_of_refused
