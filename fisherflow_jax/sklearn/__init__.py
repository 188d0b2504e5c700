"""scikit-learn estimators that keep the Fisher information beside the estimate.

An extra, imported by its own name: `from fisherflow_jax.sklearn import ...`.
"""

try:
    from sklearn.utils.validation import validate_data as _needed  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fisherflow_jax.sklearn needs scikit-learn 1.6 or newer: "
        "pip install 'fisherflow-jax[sklearn]'."
    ) from error

from fisherflow_jax.sklearn._classifier import (
    FisherFlowClassifier as FisherFlowClassifier,
)
from fisherflow_jax.sklearn._regressors import FisherFlowPoisson as FisherFlowPoisson
from fisherflow_jax.sklearn._regressors import (
    FisherFlowRegressor as FisherFlowRegressor,
)
