"""The flow: sequential inference, (mean, information) -> (mean, information)."""

import functools
from collections.abc import Callable
from typing import Any, Literal

from fisherflow_jax import estimators
from fisherflow_jax._ground import checks
from fisherflow_jax._ground.choices import Compared, hashable, shared
from fisherflow_jax.expectations import Expectation
from fisherflow_jax.flow import _between as between
from fisherflow_jax.flow import _step as step
from fisherflow_jax.flow._recipe import Recipe
from fisherflow_jax.flow._state import FisherFlow, init
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.memories import Memory, stationary, waiting
from fisherflow_jax.model import check_choices
from fisherflow_jax.structures import Structure, full


def fisher_flow(
    apply_fn: Callable,
    likelihood: Likelihood,
    *,
    structure: Structure = full(),  # noqa: B008
    memory: Memory = stationary(),  # noqa: B008
    estimator: Any = estimators.exact,
    prior_precision: Any = 1.0,
    num_steps: int = 10,
    expectation: Expectation | None = None,
    num_refreshes: int = 4,
    robust: bool = False,
    num_clusters: int | None = None,
    weights_are: str = "frequency",
    marginal: bool = False,
    compensated: bool | None = None,
    prior_is: Literal["previous", "predicted"] = "previous",
    chunk_size: int | None = None,
    bad_rows: str = "raise",
) -> FisherFlow:
    r"""Sequential inference with a Gaussian belief, one batch at a time.

    Before a batch the memory predicts the belief `(theta^-, I^-)`. The update is
    implicit,

    .. math:: \theta_t = \arg\min_\theta \; -\log p(y_t | \theta)
       + \tfrac12 (\theta - \theta^-)^\top I^- (\theta - \theta^-), \quad
       I_t = I^- + F_t(\theta_t),

    by damped Newton steps with the batch's information `F_t`. Linear-Gaussian with the
    full structure it is the Kalman filter; for a generalised linear model, renewable
    estimation; with one step, the extended Kalman filter.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`; with an unknown dispersion the information and
        the prior precision are in units of `1 / dispersion`.
      structure: from `ff.structures`: what is kept of the information.
      memory: from `ff.memories`: what is believed before a batch and kept of it.
      estimator: from `ff.estimators`: a factory, or a choice such as
        `ff.estimators.hutchinson(num_probes=8)`; it is bound to apply_fn, likelihood
        and structure. One that is bound already must be bound to these.
      prior_precision: positive: a number, a pytree prefix of the parameters, or an
        information; one richer than the structure makes the belief as rich, and as
        costly, as itself.
      num_steps: Newton steps at most; of a first update 50, which sets out from a
        guess. 1 takes one step, the first time too, without a line search, and keeps
        the information of the predicted mean. With the full structure, a memory that
        moves the parameters, float64 and a known dispersion a state then keeps the
        covariance (`ff.structures.Inverted`), and where a batch has fewer targets than
        there are parameters Kalman's gain takes it in, `O(d^2)` a target.
      expectation: from `ff.expectations`: average the batch's log-likelihood and
        information over the belief that includes it, in place of its mean,

        .. math:: \theta_t = \arg\min_\theta \; -\mathrm E_q \log p(y_t | \cdot)
           + \tfrac12 (\theta - \theta^-)^\top I^- (\theta - \theta^-), \quad
           I_t = I^- + \mathrm E_q F_t, \quad q = N(\theta_t, I_t^{-1}),

        a Gaussian variational posterior (R-VGA): exact where a model is a canonical
        generalised linear one, and of other models VOGN's, with the expected Fisher in
        the place of minus the Hessian. The log-evidence is then its lower bound (with
        an unknown dispersion it stays that of the mean). Scores for `robust=True`,
        squares for a dispersion and other unknowns of the likelihood are those of the
        mean. It costs little where batches are large; single rows from a vague prior
        are believed too much without it (docs/expectations.md).
      num_refreshes: how often q's spread is renewed, each time with a search; a search
        at the mean goes before them. 4 settle it to about a hundredth of a standard
        error.
      robust: keep the sum of squared scores too, for sandwich variances.
      num_clusters: with `robust`: keep the scores summed over each of G clusters
        instead, `(G, d)` numbers, for rows that are dependent within a cluster. Batches
        are then `ff.Batch(inputs, targets, weights, clusters=ids)`, ids from 0 to
        G - 1.
      weights_are: what a row of weight w is, for sandwich variances and an unknown
        dispersion: "frequency", w equal rows; "variance", one row of variance
        `dispersion / w`; "sampling", one row that stands for w of the population (its
        standard errors are robust ones only). The last two count rows, not weights.
      marginal: solve each batch in full and keep `1 / diag(F^-1)` instead of `diag(F)`
        (blocks likewise): valid intervals under correlation. Needs batches of a few
        times d rows, memory d^2; for scalar, diagonal and block.
      compensated: keep the information as a pair that loses nothing to rounding, at
        twice the memory; None: where the structure is full or block and the parameters
        are float32.
      prior_is: what the prior is of: "previous", the state one step before the first
        batch, to which the memory is applied; "predicted", the state at the first
        batch, missing or not: P1 of state-space software.
      chunk_size: examples whose pulled-back vectors are held at once.
      bad_rows: of a row with a value that is not finite, of no known cluster, or with a
        target that cannot be (which costs that target alone, where a row has several):
        "raise", an error outside jit that names it; or "drop". Dropped, as under jit,
        it has weight 0 and is counted in `state.events.rows_skipped`.

    Returns:
      A `FisherFlow(init, update, advance, absorb, evaluate, project)` of pure
      functions; `update` takes `(state, batch)` to `(state, info)`, as `jax.lax.scan`
      calls it, and is compiled once for all flows of equal choices. A state brings its
      prior and its memory's rates: a flow goes on with those, whatever it was built
      with itself. Cost of an update: two informations, gradients and factorisations; an
      information, a factorisation and two gradients more for each further step that
      earlier factors do not serve, and a gradient for one that they do, or for another
      size of a step; with an expectation, that for each node and refresh.

    Raises:
      ValueError: for options that do not go together, naming them; at `init`, for
        integer or complex parameters, or a drawing estimator without a key; at
        `update`, for shapes that do not fit and, outside jit, for bad rows and for a
        result that is not finite. Under jit such a batch moves nothing and is counted
        in `num_skipped`; so is one with a bad row, of a model whose examples interact.

    Example:
      >>> import jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> flow = ff.fisher_flow(
      ...     lambda params, x: x @ params,
      ...     ff.likelihoods.gaussian(scale=1.0),
      ...     structure=ff.structures.full(),
      ...     memory=ff.memories.stationary(),
      ...     prior_precision=1e-4,
      ... )
      >>> state = flow.init(jnp.zeros(2))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
      >>> state, info = flow.update(state, (x, jnp.array([1.0, 3.0, 5.0])))
      >>> print(state.mean.round(2))  # y = 1 + 2 x
      [1. 2.]

    References:
      Ollivier, "Online natural gradient as a Kalman filter", 2018.
      Luo, Song, "Renewable estimation and incremental inference in generalized linear
      models with streaming data sets", 2020.
    """
    if prior_is not in ("previous", "predicted"):
        raise ValueError(
            f"prior_is must be 'previous' or 'predicted'; got {prior_is!r}."
        )
    check_choices(apply_fn, likelihood)
    checks.made(structure, Structure, "structure", "ff.structures.full()")
    checks.made(memory, Memory, "memory", "ff.memories.stationary()")
    recipe = Recipe(
        apply_fn=hashable(apply_fn),
        likelihood=likelihood,
        structure=structure,
        memory=memory if prior_is == "previous" else waiting(memory),
        estimator=Compared(estimator),
        prior_precision=Compared(prior_precision),
        num_steps=num_steps,
        robust=robust,
        num_clusters=num_clusters,
        weights_are=weights_are,
        marginal=marginal,
        compensated=compensated,
        chunk_size=chunk_size,
        bad_rows=bad_rows,
        expectation=_averaged(expectation),
        num_refreshes=num_refreshes,
    )
    recipe.check()
    recipe = shared(recipe)
    return FisherFlow(
        init=functools.partial(init, recipe),
        update=functools.partial(step.update, recipe),
        advance=functools.partial(between.advance, recipe),
        absorb=functools.partial(between.absorb, recipe),
        evaluate=functools.partial(step.evaluate, recipe),
        project=functools.partial(step.project, recipe),
    )


def _averaged(expectation: Any) -> Expectation | None:
    """None: at the mean, which is no average."""
    if expectation is None:
        return None
    such = "ff.expectations.outputs()"
    checks.made(expectation, Expectation, "expectation", such)
    return None if expectation.is_at_mean else expectation
