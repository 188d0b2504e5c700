"""The laws as a kit: check a structure or an estimator of your own by one call."""

from fisherflow_jax._ground.naming import show
from fisherflow_jax.testing._attribution import (
    linear_datamodelling_score as linear_datamodelling_score,
)
from fisherflow_jax.testing._estimators import check_estimator as check_estimator
from fisherflow_jax.testing._examples import Trial as Trial
from fisherflow_jax.testing._laws import Report as Report
from fisherflow_jax.testing._rows import check_examples as check_examples
from fisherflow_jax.testing._structures import check_structure as check_structure

show(__name__)
