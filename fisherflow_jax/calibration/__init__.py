"""Calibration: scale and temperature on held-out data, evidence, conformal sets."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.calibration._conformal import Conformal as Conformal
from fisherflow_jax.calibration._conformal import adaptive as adaptive
from fisherflow_jax.calibration._conformal import (
    conformal_intervals as conformal_intervals,
)
from fisherflow_jax.calibration._conformal import conformal_sets as conformal_sets
from fisherflow_jax.calibration._conformal import least_ambiguous as least_ambiguous
from fisherflow_jax.calibration._log_score import log_score as log_score
from fisherflow_jax.calibration._marginal_likelihood import PriorSearch as PriorSearch
from fisherflow_jax.calibration._marginal_likelihood import (
    log_marginal_likelihood as log_marginal_likelihood,
)
from fisherflow_jax.calibration._marginal_likelihood import (
    maximize_marginal_likelihood as maximize_marginal_likelihood,
)
from fisherflow_jax.calibration._scale import Calibration as Calibration
from fisherflow_jax.calibration._scale import calibrate as calibrate
from fisherflow_jax.calibration._temperature import (
    TemperatureScaling as TemperatureScaling,
)
from fisherflow_jax.calibration._temperature import (
    temperature_scaling as temperature_scaling,
)

Calibration.__module__ = "fisherflow_jax"
show(__name__)
