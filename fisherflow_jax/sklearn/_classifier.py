"""Classes: one logit for two of them, or one each."""

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import (
    _check_partial_fit_first_call,
    check_classification_targets,
)
from sklearn.utils.validation import validate_data

from fisherflow_jax import likelihoods
from fisherflow_jax.sklearn._estimator import Estimator


class FisherFlowClassifier(ClassifierMixin, Estimator):
    r"""Classes by a flow: logistic regression that streams, or a network of one's own.

    .. math:: p(y = k | x) \propto \exp(a_k + b_k^\top z), \qquad
       z_j = (x_j - m_j) / s_j

    Two classes have one logit, of the second. `fit` solves one batch; `partial_fit` is
    the flow's update. The columns' means and standard deviations, weighted, are those
    of the first batch and stay so: a first chunk of some tens of rows sets the scale of
    the prior. All is computed in float64, whatever JAX is set to outside; rows of
    weight 0 fill the batches of a linear model up to a power of two, so that batches of
    other lengths compile nothing new.

    Args:
      model: None: linear. A flax module, linen (its parameters are drawn, and the prior
        is about zero) or nnx, or a pair `(apply_fn, params)` (the prior is about its
        parameters), of inputs `(n, features)`, standardised. Outputs are `(n,
        classes)`, or `(n,)` or `(n, 1)` for two classes.
      structure, memory, estimator, expectation: choices of `ff.fisher_flow`; None: its
        defaults, the whole information of all data.
      prior_precision: of a linear model's coefficients on the standardised columns,
        where it is one number: 1 / C of scikit-learn, and for targets with noise alpha
        of its `Ridge`. The intercept's is then .01 (standard deviation 10), for
        targets with noise 1e-8. `{"coef": ..., "intercept": ...}` sets both, and a
        model of one's own has any that `ff.fisher_flow` takes.
      num_steps: Newton steps at most; of a first batch 50.
      robust: sandwich standard errors in `summary` and `predict_interval`.
      weights_are: what `sample_weight` is: "frequency", "variance" or "sampling", as in
        `ff.fisher_flow`.
      chunk_size: examples at once; None: as many as fit.
      random_state: for what is drawn: a linen module's parameters, the vectors of a
        drawing estimator. An int, a numpy RandomState, or None.

    Attributes:
      state_: the flow's state about the standardised columns, of float64: read it
        within `jax.enable_x64(True)`.
      flow_: the flow; `partial_fit` is its update.
      mean_, scale_: `(features,)`, of the columns of the first batch; the scale of one
        that is constant is 1.
      coef_, intercept_: of a linear model, on the original columns: `(1, features)` and
        `(1,)` for two classes, `(classes, features)` and `(classes,)` for more.
      classes_: `(classes,)`, the labels, sorted.
      n_features_in_, feature_names_in_: as scikit-learn has them.

    Raises:
      ValueError: where it is fitted, for inputs that are not finite, labels that are
        not in the classes, a single class, weights that are negative or all zero, a
        model's outputs of other shapes.
      TypeError: for sparse inputs, or a model of another kind.

    Example:
      >>> from sklearn.datasets import load_iris
      >>> from fisherflow_jax.sklearn import FisherFlowClassifier
      >>> X, y = load_iris(return_X_y=True, as_frame=True)
      >>> species = y.map(dict(enumerate(["setosa", "versicolor", "virginica"])))
      >>> classifier = FisherFlowClassifier().fit(X, species)
      >>> print(classifier.predict(X[::60]))
      ['setosa' 'versicolor' 'virginica']
      >>> classifier.coef_.shape, round(classifier.score(X, species), 2)
      ((3, 4), 0.97)

    References:
      Luo, Song, "Renewable estimation and incremental inference in generalized linear
      models with streaming data sets", 2020.
      Gelman, Jakulin, Pittau, Su, "A weakly informative default prior distribution for
      logistic and other regression models", 2008: the intercept's prior.
    """

    @property
    def _output_shapes(self) -> list[tuple[int, ...]]:
        count = len(self.classes_)
        return [(), (1,), (2,)] if count == 2 else [(count,)]

    @property
    def _likelihood(self) -> likelihoods.Likelihood:
        one = self._output_shape in [(), (1,)]
        return likelihoods.bernoulli() if one else likelihoods.categorical()

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "FisherFlowClassifier":
        """Learns from one batch, solved to convergence, and forgets what was before.

        Args:
          X: `(n, features)`, an array or a data frame.
          y: `(n,)`, labels: numbers or strings.
          sample_weight: `(n,)`, not negative; None: ones. A whole number is that many
            equal rows.

        Returns:
          Itself.
        """
        with self._whole():
            X, y = self._checked(X, y, True)
            self._forget()
            self.__dict__.pop("classes_", None)
            return self._learn(X, y, np.unique(y), sample_weight)

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> "FisherFlowClassifier":
        """Takes in a batch: the flow's update.

        Args:
          X, y, sample_weight: as of `fit`.
          classes: all labels that will be seen; needed at the first call alone.

        Returns:
          Itself.
        """
        with self._whole():
            X, y = self._checked(X, y, self._is_new)
            return self._learn(X, y, classes, sample_weight)

    def _checked(self, X: Any, y: Any, first: bool) -> Any:
        X, y = validate_data(self, X, y, reset=first, dtype=np.float64)
        check_classification_targets(y)
        return X, y

    def _learn(self, X: Any, y: Any, classes: Any, sample_weight: Any) -> Any:
        _check_partial_fit_first_call(self, classes)
        if len(self.classes_) < 2:
            raise ValueError(
                f"a classifier needs 2 classes or more; got one class, {self.classes_}."
            )
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y has labels that are not in classes={self.classes_}: {unknown}."
            )
        self._take_in(X, np.searchsorted(self.classes_, y), sample_weight)
        if self.model is None:
            self.coef_ = np.atleast_2d(self.coef_)
            self.intercept_ = np.atleast_1d(self.intercept_)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """`(n, classes)`, probabilities averaged over what is not known of the model.

        They are those of `ff.predict`.
        """
        return self._of_classes(self._prediction(X).mean)

    def predict(self, X: Any) -> np.ndarray:
        """`(n,)`, the most probable labels."""
        chosen = np.argmax(self.predict_proba(X), axis=1)
        return self.classes_[chosen]

    def predict_interval(
        self, X: Any, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Intervals of each class's probability, from what is not known of the model.

        Returns:
          `(lower, upper)`, each `(n, classes)`, of `ff.predict`: taken where the
          log-odds of the class against all others are linear, and mapped.
        """
        found = self._prediction(X, level)
        lower, upper = map(self._of_classes, (found.lower, found.upper))
        # of the first of two the lower end is that of one less the upper
        return np.minimum(lower, upper), np.maximum(lower, upper)

    def _of_classes(self, share: Any) -> np.ndarray:
        return share if share.ndim == 2 else np.stack([1 - share, share], axis=1)
