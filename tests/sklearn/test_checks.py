"""scikit-learn's own checks of estimators, all of them, with none expected to fail."""

import warnings

import pytest
from sklearn.utils.estimator_checks import (
    estimator_checks_generator,
    parametrize_with_checks,
)

from fisherflow_jax.sklearn import (
    FisherFlowClassifier,
    FisherFlowPoisson,
    FisherFlowRegressor,
)

ALL = [FisherFlowClassifier(), FisherFlowPoisson(), FisherFlowRegressor()]
# Which fit nothing, or hardly anything.
SHORT = {
    "check_classifiers_regression_target",
    "check_complex_data",
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_estimator_cloneable",
    "check_estimator_sparse_array",
    "check_estimator_sparse_matrix",
    "check_estimators_empty_data_messages",
    "check_estimators_unfitted",
    "check_fit1d",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_requires_y_none",
    "check_set_params",
    "check_supervised_y_no_nan",
    "check_valid_tag_types",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(ALL)
def test_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ALL)
def test_short_checks(estimator):
    done = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for own, check in estimator_checks_generator(estimator):
            name = getattr(check, "func", check).__name__
            if name in SHORT:
                check(own)
                done.add(name)
    assert len(done) >= len(SHORT) - 2, SHORT - done
