"""Metrics of predictions: plain functions on arrays."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.metrics._calibration import Binning as Binning
from fisherflow_jax.metrics._calibration import ReliabilityCurve as ReliabilityCurve
from fisherflow_jax.metrics._calibration import equal_mass as equal_mass
from fisherflow_jax.metrics._calibration import equal_width as equal_width
from fisherflow_jax.metrics._calibration import (
    expected_calibration_error as expected_calibration_error,
)
from fisherflow_jax.metrics._calibration import (
    maximum_calibration_error as maximum_calibration_error,
)
from fisherflow_jax.metrics._calibration import reliability_curve as reliability_curve
from fisherflow_jax.metrics._classification import accuracy as accuracy
from fisherflow_jax.metrics._classification import auroc as auroc
from fisherflow_jax.metrics._classification import brier as brier
from fisherflow_jax.metrics._classification import confidence as confidence
from fisherflow_jax.metrics._classification import entropy as entropy
from fisherflow_jax.metrics._classification import (
    negative_log_likelihood as negative_log_likelihood,
)
from fisherflow_jax.metrics._continual import Continual as Continual
from fisherflow_jax.metrics._continual import continual as continual
from fisherflow_jax.metrics._intervals import interval_coverage as interval_coverage
from fisherflow_jax.metrics._intervals import interval_score as interval_score
from fisherflow_jax.metrics._intervals import interval_width as interval_width
from fisherflow_jax.metrics._intervals import set_coverage as set_coverage
from fisherflow_jax.metrics._intervals import set_size as set_size
from fisherflow_jax.metrics._regression import gaussian_crps as gaussian_crps
from fisherflow_jax.metrics._regression import (
    gaussian_negative_log_likelihood as gaussian_negative_log_likelihood,
)
from fisherflow_jax.metrics._regression import sample_crps as sample_crps
from fisherflow_jax.metrics._resampling import Bootstrap as Bootstrap
from fisherflow_jax.metrics._resampling import bootstrap as bootstrap

show(__name__)
