"""What a state says: intervals, samples, predictions, tests, fusion."""

from fisherflow_jax.posterior.hypotheses import Estimate as Estimate
from fisherflow_jax.posterior.hypotheses import WaldTest as WaldTest
from fisherflow_jax.posterior.hypotheses import delta_method as delta_method
from fisherflow_jax.posterior.hypotheses import wald_test as wald_test
from fisherflow_jax.posterior.intervals import (
    confidence_interval as confidence_interval,
)
from fisherflow_jax.posterior.intervals import standard_error as standard_error
from fisherflow_jax.posterior.merging import merge as merge
from fisherflow_jax.posterior.prediction import Prediction as Prediction
from fisherflow_jax.posterior.prediction import predict as predict
from fisherflow_jax.posterior.sampling import sample as sample
from fisherflow_jax.posterior.summary import Summary as Summary
from fisherflow_jax.posterior.summary import summary as summary
