"""Calibration on held-out data: temperature, and conformal sets and intervals."""

from fisherflow_jax.calibration.conformal import Conformal as Conformal
from fisherflow_jax.calibration.conformal import adaptive as adaptive
from fisherflow_jax.calibration.conformal import (
    conformal_intervals as conformal_intervals,
)
from fisherflow_jax.calibration.conformal import conformal_sets as conformal_sets
from fisherflow_jax.calibration.conformal import least_ambiguous as least_ambiguous
from fisherflow_jax.calibration.temperature import (
    TemperatureScaling as TemperatureScaling,
)
from fisherflow_jax.calibration.temperature import (
    temperature_scaling as temperature_scaling,
)
