"""scikit-learn's own checks of estimators, all of them, with none expected to fail."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from fisherflow_jax.sklearn import (
    FisherFlowClassifier,
    FisherFlowPoisson,
    FisherFlowRegressor,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@parametrize_with_checks([FisherFlowRegressor()])
def test_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([FisherFlowClassifier(), FisherFlowPoisson()])
def test_more_checks(estimator, check):
    check(estimator)
