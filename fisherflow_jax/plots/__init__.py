"""Plots, for which matplotlib must be installed; each returns its Axes."""

from fisherflow_jax.plots._bands import estimate_over_stream as estimate_over_stream
from fisherflow_jax.plots._bands import intervals as intervals
from fisherflow_jax.plots._bands import prediction_band as prediction_band
from fisherflow_jax.plots._curves import eigenvalues as eigenvalues
from fisherflow_jax.plots._curves import information_spectrum as information_spectrum
from fisherflow_jax.plots._curves import reliability_diagram as reliability_diagram
from fisherflow_jax.plots._ellipse import information_ellipse as information_ellipse
from fisherflow_jax.plots._profile import profile as profile
