"""What the estimators share: columns, batches, the flow, and what is read of it."""

import contextlib
import dataclasses
import numbers
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from fisherflow_jax._ground.warning import DataWarning
from fisherflow_jax.flow import FisherFlow, fisher_flow
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.posteriors import (
    Summary,
    degrees_of_freedom,
    delta_method,
    summary,
    two_sided_tail,
)
from fisherflow_jax.predictions import Prediction, predict
from fisherflow_jax.sklearn import _models as models

# Of `ff.fisher_flow`, by their names there; None: its default.
_CHOICES = ["structure", "memory", "estimator", "num_steps", "expectation"]
_CHOICES += ["robust", "weights_are", "chunk_size"]
# Rows of the smallest batch that is compiled for a linear model.
_FEWEST = 16


class Estimator(BaseEstimator):
    """A flow behind scikit-learn's methods; `FisherFlowClassifier` has its arguments.

    It computes in float64, whatever JAX is set to outside.
    """

    state_: Any  # once it is fitted
    # of a linear model's intercept, where the prior is one number
    _intercept_precision = 0.01

    def __init__(
        self,
        model: Any = None,
        *,
        structure: Any = None,
        memory: Any = None,
        estimator: Any = None,
        prior_precision: Any = 1.0,
        num_steps: int = 10,
        expectation: Any = None,
        robust: bool = False,
        weights_are: str = "frequency",
        chunk_size: int | None = None,
        random_state: Any = None,
    ):
        self.model = model
        self.structure = structure
        self.memory = memory
        self.estimator = estimator
        self.prior_precision = prior_precision
        self.num_steps = num_steps
        self.expectation = expectation
        self.robust = robust
        self.weights_are = weights_are
        self.chunk_size = chunk_size
        self.random_state = random_state

    # ---- what each kind says of itself

    @property
    def _output_shapes(self) -> list[tuple[int, ...]]:
        """Of a row's outputs, those that will do; a linear model has the first."""
        return [(), (1,)]

    @property
    def _likelihood(self) -> Likelihood:
        raise AttributeError

    # ---- learning

    @property
    def flow_(self) -> FisherFlow:
        """The flow whose update `partial_fit` is, on the standardised columns."""
        check_is_fitted(self, "state_")
        with jax.enable_x64(True):
            return self._flow(self._prior())

    def _flow(self, prior_precision: Any) -> FisherFlow:
        chosen = {name: getattr(self, name) for name in _CHOICES}
        given = {name: value for name, value in chosen.items() if value is not None}
        apply_fn, likelihood = self._apply_fn, self._likelihood
        return fisher_flow(
            apply_fn, likelihood, prior_precision=prior_precision, **given
        )

    def _prior(self, number: float | None = None) -> Any:
        """As the flow takes it; `number`: in the place of one that is a number."""
        prior = self.prior_precision
        if not isinstance(prior, numbers.Real) and getattr(prior, "ndim", None) != 0:
            return prior
        prior = prior if number is None else number
        if self.model is not None:
            return prior
        return {"coef": prior, "intercept": self._intercept_precision}

    @property
    def _is_new(self) -> bool:
        return not hasattr(self, "state_")

    def _forget(self) -> None:
        self.__dict__.pop("state_", None)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """What is raised within leaves the estimator as it was."""
        before = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _take_in(self, X: np.ndarray, y: np.ndarray, sample_weight: Any) -> Any:
        """A batch that was checked, `y` as the likelihood's targets."""
        weights = _check_sample_weight(
            sample_weight, X, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():  # which scikit-learn says from 1.9 on
            raise ValueError(
                "Sample weights must contain at least one non-zero number."
            )
        if self._is_new:
            self.mean_ = np.average(X, axis=0, weights=weights)
            spread = np.average(np.square(X - self.mean_), axis=0, weights=weights)
            # a column that is constant but for rounding stays as it is
            least = 100 * np.finfo(float).eps * np.abs(self.mean_)
            self.scale_ = np.where(np.sqrt(spread) > least, np.sqrt(spread), 1.0)
        inputs = self._standardised(X)
        with jax.enable_x64(True):
            state = self._begin(inputs) if self._is_new else self.state_
            # a state brings its prior: all numbers share one compiled update
            update = self._flow(self._prior(1.0)).update
            batch = tuple(map(self._padded, (inputs, y, weights)))
            self.state_, _ = update(state, jax.tree.map(jnp.asarray, batch))
        unfinished = (x.events.searches_unfinished for x in (state, self.state_))
        if len(set(map(int, unfinished))) > 1:
            warnings.warn(
                f"the search ended after its steps, and before they were short: give "
                f"more than num_steps={self.num_steps}.",
                ConvergenceWarning,
                stacklevel=4,
            )
        if self.model is None:
            mean = jax.tree.map(np.asarray, self.state_.mean)
            self.coef_ = mean["coef"].T / self.scale_
            self.intercept_ = mean["intercept"] - self.coef_ @ self.mean_
        return self

    def _begin(self, inputs: np.ndarray) -> Any:
        """The state before any data."""
        shape, key = self._output_shapes[0], None
        if models.draws(self.model):
            key = self._key()
        if self.model is None:
            start = models.linear_params(inputs.shape[1], shape)
            prior_mean = start
        else:
            self._apply_fn = models.apply_fn_of(self.model, ())
            start, prior_mean = models.start_of(self.model, jnp.asarray(inputs), key)
            found = jax.eval_shape(self._apply_fn, start, jnp.asarray(inputs)).shape
            shape = found[1:]
            if found[:1] != inputs.shape[:1] or shape not in self._output_shapes:
                wanted = " or ".join(str(("n", *x)) for x in self._output_shapes)
                raise ValueError(
                    f"the model's outputs for n={len(inputs)} rows have shape {found}; "
                    f"they must be {wanted}."
                )
        self._output_shape = shape
        self._apply_fn = models.apply_fn_of(self.model, shape)
        flow = self._flow(self._prior())
        key = self._key() if flow.recipe.draws else None
        return flow.init(start, prior_mean, key=key)

    def _key(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _standardised(self, X: np.ndarray) -> np.ndarray:
        return (X - self.mean_) / self.scale_

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        """With rows of zeros up to a power of two, so that less is compiled.

        Not for a model of one's own, whose examples may interact.
        """
        if self.model is not None:
            return rows
        size = max(_FEWEST, 1 << (len(rows) - 1).bit_length())
        more = [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1)
        return np.pad(rows, more)

    # ---- reading

    def _inputs(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "state_")
        return self._standardised(validate_data(self, X, reset=False, dtype=np.float64))

    def _outputs(self, X: Any) -> np.ndarray:
        """The model's, at the mean."""
        inputs = self._inputs(X)
        with jax.enable_x64(True):
            return models.outputs_of(self._apply_fn, self.state_.mean, inputs)

    def _prediction(self, X: Any, level: float = 0.95) -> Prediction:
        inputs = self._inputs(X)
        with jax.enable_x64(True):
            found = predict(
                self.state_,
                self._apply_fn,
                self._likelihood,
                jnp.asarray(self._padded(inputs)),
                level=level,
                robust=self.robust,
                chunk_size=self.chunk_size,
            )
        return jax.tree.map(lambda x: np.asarray(x)[: len(inputs)], found)

    def summary(self, level: float = 0.95) -> Summary:
        r"""The coefficient table, on the original columns.

        What the flow knows is of the standardised columns, from which the coefficients
        of the original ones are a linear map,

        .. math:: \beta_j = b_j / s_j, \qquad \alpha = a - \sum_j b_j m_j / s_j,

        so that standard errors and intervals are mapped exactly; those of the intercept
        hold its correlation with the coefficients. What is said of the prior is of the
        standardised columns. Of a model of one's own the parameters are its own.

        Args:
          level: of the intervals, in (0, 1).

        Returns:
          An `ff.Summary`, with sandwich standard errors if `robust`. Cost:
          a factorisation and a solve for each coefficient.
        """
        check_is_fitted(self, "state_")
        with jax.enable_x64(True):
            options: dict[str, Any] = {"level": level, "robust": self.robust}
            if self.model is not None:
                return summary(self.state_, **options)
            table = summary(self.state_, self._names(), **options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)  # which the table has told
                moved = delta_method(self.state_, self._to_columns, **options)
            spare = degrees_of_freedom(self.state_)
        estimate, error, lower, upper = (
            np.concatenate([np.ravel(part[key]) for key in ("coef", "intercept")])
            for part in moved
        )
        return dataclasses.replace(
            table,
            estimate=estimate,
            standard_error=error,
            statistic=estimate / error,
            p_value=two_sided_tail(estimate / error, spare),
            lower=lower,
            upper=upper,
        )

    def _to_columns(self, params: Any) -> Any:
        coef = (params["coef"].T / self.scale_).T
        return {"coef": coef, "intercept": params["intercept"] - self.mean_ @ coef}

    def _names(self) -> list[str]:
        """Of the coefficients, as they are ravelled."""
        features = getattr(self, "feature_names_in_", None)
        if features is None:
            features = [f"x{j}" for j in range(self.n_features_in_)]
        rows = [*features, "intercept"]
        if self._output_shape == ():
            return [str(row) for row in rows]
        return [f"{name}: {row}" for row in rows for name in self.classes_]

    # ---- files

    def __getstate__(self) -> dict[str, Any]:
        kept = {**super().__getstate__()}
        kept.pop("_apply_fn", None)
        if "state_" in kept:
            # read without float64, JAX's own arrays would come back in float32
            kept["state_"] = jax.tree.map(np.asarray, kept["state_"])
        return kept

    def __setstate__(self, kept: dict[str, Any]) -> None:
        super().__setstate__(kept)
        if "state_" in kept:
            self._apply_fn = models.apply_fn_of(self.model, self._output_shape)
            with jax.enable_x64(True):
                self.state_ = jax.tree.map(jnp.asarray, self.state_)
