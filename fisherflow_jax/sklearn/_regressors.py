"""Real targets, and counts."""

from typing import Any

import jax
import numpy as np
from sklearn.base import RegressorMixin
from sklearn.metrics import d2_tweedie_score
from sklearn.utils.validation import validate_data

from fisherflow_jax import likelihoods
from fisherflow_jax.predictions import observation_interval
from fisherflow_jax.sklearn._estimator import Estimator


class _OfNumbers(RegressorMixin, Estimator):
    """Targets that are numbers."""

    _lowest = -np.inf

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Learns from one batch, solved to convergence, and forgets what was before.

        Args:
          X: `(n, features)`, an array or a data frame.
          y: `(n,)`, the targets.
          sample_weight: `(n,)`, not negative; None: ones. A whole number is that many
            equal rows.

        Returns:
          Itself.
        """
        return self._learn(X, y, sample_weight, True)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Takes in a batch, as of `fit`: the flow's update. Returns itself."""
        return self._learn(X, y, sample_weight, self._is_new)

    def _learn(self, X: Any, y: Any, sample_weight: Any, first: bool) -> Any:
        with self._whole():
            X, y = validate_data(
                self, X, y, reset=first, dtype=np.float64, y_numeric=True
            )
            if np.any(y < self._lowest):
                raise ValueError(f"y must be {self._lowest} or more; got {np.min(y)}.")
            if first:
                self._forget()
            return self._take_in(X, y.astype(np.float64), sample_weight)


class FisherFlowRegressor(_OfNumbers):
    r"""Real targets with normal noise of unknown size, by a flow.

    .. math:: y = a + b^\top z + \varepsilon, \quad \varepsilon \sim N(0, \sigma^2),
       \qquad b \sim N(0, \sigma^2 / \lambda)

    Ridge regression on standardised columns, with :math:`\lambda` the
    `prior_precision`, its noise estimated; it streams, and knows how sure it is.

    Args: those of `FisherFlowClassifier`; outputs of a model are `(n,)` or `(n, 1)`.

    Attributes: those of `FisherFlowClassifier` but for the classes; `coef_` is
    `(features,)` and `intercept_` a number.

    Example:
      >>> from sklearn.datasets import load_diabetes
      >>> from fisherflow_jax.sklearn import FisherFlowRegressor
      >>> X, y = load_diabetes(return_X_y=True, as_frame=True, scaled=False)
      >>> regressor = FisherFlowRegressor().fit(X[["bmi", "bp"]], y)
      >>> print(regressor.summary())
                  estimate  std. error       t  P>|t|  95% lower  95% upper
      ---------------------------------------------------------------------
      bmi           8.5008      0.7036  12.082  0.000     7.1180     9.8836
      bp            1.3839      0.2247   6.158  0.000     0.9422     1.8256
      intercept  -203.0644     22.2158  -9.141  0.000  -246.7269  -159.4019
      ---------------------------------------------------------------------
      observations 442, dispersion 3606 on 439.0 df, the prior's share 0.2%
      >>> lower, upper = regressor.predict_interval(X[["bmi", "bp"]], level=0.9)
      >>> print(round(((lower < y) & (y < upper)).mean(), 2))
      0.9

    References:
      Hoerl, Kennard, "Ridge regression: biased estimation for nonorthogonal problems",
      1970.
    """

    # next to nothing: the mean of the targets may be anything
    _intercept_precision = 1e-8

    @property
    def _likelihood(self) -> likelihoods.Likelihood:
        return likelihoods.gaussian(scale=None)

    def predict(self, X: Any) -> np.ndarray:
        """`(n,)`, the expected targets."""
        return self._outputs(X)

    def predict_interval(
        self, X: Any, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where a new target falls with probability `level`, its noise included.

        Returns:
          `(lower, upper)`, each `(n,)`: Student's t, on the observations less the
          effective parameters. NaN where there are no more of these than of those.
        """
        found = self._prediction(X, level)
        with jax.enable_x64(True):
            lower, upper = observation_interval(
                found, self._likelihood, level, state=self.state_
            )
        return np.asarray(lower), np.asarray(upper)


class FisherFlowPoisson(_OfNumbers):
    r"""Counts, by a flow.

    .. math:: y \sim \mathrm{Poisson}(\exp(a + b^\top z))

    Args: those of `FisherFlowClassifier`; outputs of a model, `(n,)` or `(n, 1)`, are
    logarithms of rates. Where counts vary more than Poisson's, `robust=True` says so in
    the standard errors.

    Attributes: those of `FisherFlowClassifier` but for the classes; `coef_` is
    `(features,)` and `intercept_` a number, of the logarithm of the rate.

    Example:
      >>> import numpy as np
      >>> from fisherflow_jax.sklearn import FisherFlowPoisson
      >>> rng = np.random.default_rng(0)
      >>> X = rng.normal(size=(400, 2))
      >>> y = rng.poisson(np.exp(1.0 + 0.5 * X[:, 0]))
      >>> poisson = FisherFlowPoisson()
      >>> for rows in np.split(np.arange(400), 4):
      ...     poisson = poisson.partial_fit(X[rows], y[rows])
      >>> print(poisson.coef_.round(2), poisson.intercept_.round(2))
      [ 0.53 -0.05] 0.94
      >>> lower, upper = poisson.predict_interval(np.zeros((1, 2)))
      >>> print(lower, upper)
      [0.] [6.]

    References:
      McCullagh, Nelder, "Generalized Linear Models", 1989.
    """

    _lowest = 0

    @property
    def _likelihood(self) -> likelihoods.Likelihood:
        return likelihoods.poisson()

    def predict(self, X: Any) -> np.ndarray:
        """`(n,)`, the expected counts, at the mean parameters."""
        return np.exp(self._outputs(X))

    def predict_interval(
        self, X: Any, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        r"""Where a new count falls with probability `level` or more.

        With the rate gamma distributed about its estimate, its logarithm's variance v,
        the count is negative binomial,

        .. math:: y \sim \mathrm{NB}(\text{mean } \mu, \text{ variance } \mu + \mu^2 v),

        as for conjugate rates without columns.

        Returns:
          `(lower, upper)`, each `(n,)`, counts that are inside.
        """
        from scipy import stats

        found = self._prediction(X, level)
        shape = np.square(found.mean / found.std)  # 1 / v: std is that of the mean
        tails = np.array([1 - level, 1 + level])[:, None] / 2
        lower, upper = stats.nbinom.ppf(tails, shape, shape / (shape + found.mean))
        return lower, upper

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the deviance that is explained, D^2; 1 is the best."""
        found = self.predict(X)
        return d2_tweedie_score(y, found, sample_weight=sample_weight, power=1)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags
