"""Laplace's approximation of a trained model: from its data to a state, in one call."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from fisherflow_jax import estimators, structures
from fisherflow_jax._ground import checks, trees
from fisherflow_jax._ground.batch import Batch, num_examples
from fisherflow_jax._ground.warning import warn_once
from fisherflow_jax.accumulation import (
    Accumulation,
    Stacked,
    accumulate,
    converted,
    each_batch,
)
from fisherflow_jax.calibration import Calibration, calibrate
from fisherflow_jax.estimators import Estimator
from fisherflow_jax.layers import Layers, find_layers
from fisherflow_jax.likelihoods import Likelihood
from fisherflow_jax.model import Model, check_choices, only
from fisherflow_jax.posteriors import Posterior, posterior
from fisherflow_jax.structures import Structure

PyTree = Any

# The whole matrix is kept up to 64 MiB: 4,096 parameters in float32. A posterior and
# its factors are a few of these.
_FULL_BYTES = 2**26
# Of more outputs an example, labels are sampled in place of a pass for each output.
_EXACT_OUTPUTS = 256


class Report(NamedTuple):
    """What `ff.laplace` chose, why, and what it saw; `print` shows it in lines.

    Attributes:
      structure: what is kept of the information; `print(structure.layers)` is the table
        of how each parameter is treated, where layers decide.
      reason: why this one.
      num_bytes: what the information takes.
      estimator: which vectors were squared, and what of them is kept.
      accumulation: the information of the data alone. With it `ff.posterior` makes a
        posterior of another prior, or one that is not calibrated, without a pass.
      calibration: what `ff.calibrate` found; None: without validation data.
    """

    structure: Structure
    reason: str
    num_bytes: int
    estimator: Estimator
    accumulation: Accumulation
    calibration: Calibration | None

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        seen, found = self.accumulation, self.calibration
        batches = f"{seen.num_batches} batch{'es' * bool(seen.num_batches != 1)}"
        lines = [
            f"structure: {self.structure}, {self.num_bytes:,} bytes: {self.reason}",
            *_without_layer(getattr(self.structure, "layers", None)),
            f"estimator: {self.estimator.name}",
            f"data: {float(seen.count):g} observations in {batches}",
        ]
        if seen.num_skipped:
            lines.append(_skipped(seen))
        if found is not None:
            noise = "" if found.noise is None else f", noise {found.noise:.3g}"
            lines.append(
                f"calibrated: held-out loss {found.before:.3f} -> {found.after:.3f} "
                f"nats a target ({found.mean_only:.3f} by the mean alone), scale "
                f"{found.scale:.3g}{noise}"
            )
        return "\n".join(lines)


class Laplace(NamedTuple):
    """What `ff.laplace` returns: `ff.predict(*found[:3], inputs)` predicts.

    Attributes:
      state: the posterior of the chosen parameters, calibrated if there was
        validation data.
      apply_fn: the model of the chosen parameters, the others held.
      likelihood: with the noise that was found on validation data.
      report: which structure, why, and what was seen.

    Example:
      >>> import fisherflow_jax as ff
      >>> ff.Laplace._fields
      ('state', 'apply_fn', 'likelihood', 'report')
    """

    state: Posterior
    apply_fn: Callable
    likelihood: Likelihood
    report: Report

    def __repr__(self) -> str:
        return f"laplace({self.state!r}, {self.likelihood!r})"


Laplace.__module__ = "fisherflow_jax"


@checks.called_as(
    "laplace(apply_fn, likelihood, params, batches), and batches are a list of "
    "(inputs, targets): [(X, y)]"
)
def laplace(
    apply_fn: Callable,
    likelihood: Likelihood,
    params: PyTree,
    batches: Iterable | Stacked,
    *,
    chosen: Any = None,
    structure: Structure | None = None,
    prior_precision: Any = 1.0,
    validation: Any = None,
    key: Any = None,
    to_batch: Callable[[Any], Any] | None = None,
) -> Laplace:
    r"""Error bars for a model that is trained: Laplace's approximation, the whole way.

    .. math:: \mathcal N\big(\hat\theta,\; s\,(F + P)^{-1}\big), \qquad
       F = \sum_i J_i^\top \Lambda_i J_i

    with the Jacobians `J` of the outputs at the estimate, the Fisher information
    :math:`\Lambda` of the outputs, the prior P, and a factor s that held-out data set.
    Four steps in one call, each of which is a function of its own: layers are found
    (`ff.layers.find_layers`) and a structure is chosen, one pass gathers the
    information (`ff.accumulate`), the prior is added (`ff.posterior`), and the scale is
    set (`ff.calibrate`). The report says what was chosen and why.

    Without a `structure` it is

    - `full()` where the whole matrix takes no more than 64 MiB (4,096 parameters in
      float32);
    - else `kronecker(layers)` where linear layers are found, which keeps
      I^2 + O^2 numbers a layer and a diagonal for other parameters;
    - else `diagonal()`;
    - where the model's examples interact, Kronecker or diagonal with the layers.

    The information is exact, except where an example has more than 256 outputs: exact
    would take a pass for each of them, so that labels are sampled from the model.

    Args:
      apply_fn: `(params, inputs) -> outputs`, leading axis = examples.
      likelihood: from `ff.likelihoods`.
      params: the estimate, a pytree of real arrays: of any training.
      batches: the data it was trained on: a list, generator or loader of batches, or
        `ff.Stacked`, as `ff.accumulate` takes them (which shows its progress bar).
      chosen: None, all parameters; or which to be unsure of, the others being held: a
        predicate of the name, a list of names (`["head"]`, a last layer), booleans like
        params or a prefix of them.
      structure: None, or from `ff.structures`, for the chosen parameters.
      prior_precision: P, as in `ff.posterior`. Validation data put right what is a
        guess.
      validation: None, or held-out data as in `ff.calibrate`: about a hundred examples.
      key: an int or a key, where labels or signs are drawn: for more than 256 outputs
        an example, and for examples that interact. Otherwise ignored.
      to_batch: makes a batch of what a loader gives, if it is none: of dicts, `lambda
        item: (item["x"], item["y"])`; of both loaders.

    Returns:
      A `Laplace(state, apply_fn, likelihood, report)`. Cost: that of one pass, as the
      estimators say (a backward pass for each output, or one where labels are sampled),
      and of the calibration. Memory: the information, a few times, and a chunk.

    Raises:
      ValueError: without batches; without a key where one is needed; for an unknown
        dispersion without validation data; and as the four functions do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fisherflow_jax as ff
      >>> apply_fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["head"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {
      ...     "w": jax.random.normal(keys[0], (2, 4)),
      ...     "head": 3 * jax.random.normal(keys[1], (4, 2)),
      ... }
      >>> x = jax.random.normal(keys[2], (120, 2))
      >>> y = (x[:, 0] > 0).astype(int)
      >>> found = ff.laplace(
      ...     apply_fn,
      ...     ff.likelihoods.categorical(),
      ...     params,
      ...     [(x[:40], y[:40]), (x[40:80], y[40:80])],
      ...     chosen=["head"],
      ... )
      >>> print(found.report)
      structure: full(), 256 bytes: the whole matrix fits in 67,108,864 bytes
      estimator: exact
      data: 80 observations in 2 batches
      >>> ff.predict(*found[:3], x[80:]).mean.shape
      (40, 2)

    References:
      MacKay, "A practical Bayesian framework for backpropagation networks", 1992.
      Daxberger, Kristiadi, Immer, Eschenhagen, Bauer, Hennig, "Laplace Redux:
      effortless Bayesian deep learning", 2021.
    """
    call = "ff.laplace(apply_fn, likelihood, params, batches)"
    check_choices(apply_fn, likelihood, call)
    if chosen is not None:
        apply_fn, params = only(apply_fn, params, chosen)
    params = trees.real_arrays(params, "params")
    first, batches = _first(converted(batches, to_batch))
    reason = "as asked"
    if structure is None:
        layers = find_layers(apply_fn, params, first.inputs)
        structure, reason = _chosen_structure(params, layers)
    estimator = _bound(apply_fn, likelihood, structure, params, first, key)
    if likelihood.with_dispersion is not None and validation is None:
        raise ValueError(
            f"the dispersion of {likelihood!r} is unknown, and one pass does not "
            "estimate it: give validation=, held-out data on which it is found, or a "
            "likelihood with a number."
        )
    gathered = accumulate(estimator, params, batches, key)
    if gathered.num_skipped:
        warn_once(gathered, f"ff.laplace: {_skipped(gathered)}.")
    state = posterior(params, gathered, prior_precision=prior_precision)
    calibration = None
    if validation is not None:
        several = not isinstance(validation, tuple)
        calibration = calibrate(
            state,
            apply_fn,
            likelihood,
            validation,
            to_batch=to_batch if several else None,
        )
        state, likelihood = calibration.posterior, calibration.likelihood
    report = Report(
        structure=structure,
        reason=reason,
        num_bytes=structure.num_bytes(params),
        estimator=estimator,
        accumulation=gathered,
        calibration=calibration,
    )
    return Laplace(state=state, apply_fn=apply_fn, likelihood=likelihood, report=report)


def _first(batches: Any) -> tuple[Batch, Any]:
    """The first batch, and all batches, of which none is lost."""
    if not isinstance(batches, Iterator):
        return next(iter(each_batch(batches))), batches
    ahead = list(itertools.islice(batches, 1))
    return next(iter(each_batch(ahead))), itertools.chain(ahead, batches)


def _chosen_structure(params: PyTree, layers: Layers) -> tuple[Structure, str]:
    """By the table of docs/uncertainty.md, and why."""
    whole = structures.full().num_bytes(params)
    kronecker = structures.kronecker(layers)
    if layers.batched:
        together = f"examples interact ({layers.together}) and are squared by layers"
        if layers.layers:
            return kronecker, together
        return structures.diagonal(layers), f"{together}, of which none was found"
    if whole <= _FULL_BYTES:
        return structures.full(), f"the whole matrix fits in {_FULL_BYTES:,} bytes"
    too_large = f"the whole matrix would take {whole:,} bytes"
    if layers.layers:
        return kronecker, f"{too_large}, and linear layers were found"
    return structures.diagonal(), f"{too_large}, and no linear layer was found"


def _bound(
    apply_fn: Callable,
    likelihood: Likelihood,
    structure: Structure,
    params: PyTree,
    first: Batch,
    key: Any,
) -> Estimator:
    """The estimator, exact where an example's outputs are few."""
    model = apply_fn, likelihood, structure
    estimator = estimators.exact(*model)
    outputs = Model(apply_fn, likelihood).outputs(params, first.inputs)
    count = trees.size(outputs) // num_examples(first)
    why = "the model's examples interact, and each has a sign of its own"
    if likelihood.random_root:
        why = f"the information of {likelihood!r} is estimated from sampled scores"
    if count > _EXACT_OUTPUTS:
        estimator = estimators.monte_carlo(*model)
        why = f"an example has {count:,} outputs, so that labels are sampled"
    if estimator.random and key is None:
        raise ValueError(f"{why}: give ff.laplace a key, such as key=0.")
    return estimator


def _without_layer(layers: Layers | None) -> Iterator[str]:
    """The parameters that a Kronecker structure keeps the diagonal of, by reason."""
    if layers is None or not layers.layers:
        return
    by_reason: dict[str, list[str]] = {}
    for leaf, reason in layers.fallback:
        by_reason.setdefault(reason, []).append(layers.names[leaf])
    for reason, names in by_reason.items():
        yield f"the diagonal alone ({reason}): {', '.join(names)}"


def _skipped(gathered: Accumulation) -> str:
    return (
        f"{gathered.num_skipped} of {gathered.num_batches} batches were left out, "
        "since their information is not finite"
    )
