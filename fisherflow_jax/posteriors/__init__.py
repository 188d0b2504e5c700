"""What a state says: intervals, samples, predictions, tests, fusion."""

from fisherflow_jax.posteriors.gaussian import Posterior as Posterior
from fisherflow_jax.posteriors.gaussian import log_density as log_density
from fisherflow_jax.posteriors.gaussian import only as only
from fisherflow_jax.posteriors.gaussian import posterior as posterior
from fisherflow_jax.posteriors.hypotheses import Estimate as Estimate
from fisherflow_jax.posteriors.hypotheses import WaldTest as WaldTest
from fisherflow_jax.posteriors.hypotheses import delta_method as delta_method
from fisherflow_jax.posteriors.hypotheses import wald_test as wald_test
from fisherflow_jax.posteriors.intervals import (
    confidence_interval as confidence_interval,
)
from fisherflow_jax.posteriors.intervals import standard_error as standard_error
from fisherflow_jax.posteriors.merging import merge as merge
from fisherflow_jax.posteriors.sampling import sample as sample
from fisherflow_jax.posteriors.summary import Summary as Summary
from fisherflow_jax.posteriors.summary import summary as summary
