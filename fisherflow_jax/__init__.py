"""Fisher information that streams: estimates and how sure they are, in JAX.

A model is the pair of any JAX function, `apply_fn(params, inputs) -> outputs`, and a
likelihood of targets given outputs. Where to begin:

- To learn from a stream and know how sure one is: `ff.fisher_flow(apply_fn,
  likelihood)` gives `init` and `update`; `ff.summary`, `ff.confidence_interval` and
  `ff.predict` read its state.
- To have error bars on a network that is trained already: `ff.laplace(apply_fn,
  likelihood, params, batches)`, and `ff.predict`. It is made of `ff.accumulate`,
  `ff.posterior` and `ff.calibrate`.
- To train: `ff.kfac`, `ff.natural_gradient`, `ff.adam` are Optax optimisers, and
  `ff.scale_by_fisher` is the transformation that they are made of. `ff.soap` and
  `ff.shampoo` need no model: they stand wherever `optax.adamw` does.

Choices are called factories: which information (`ff.estimators`), what is kept of it
(`ff.structures`), how long (`ff.memories`), of which targets (`ff.likelihoods`).
Whatever the structure, `ff.information` multiplies, solves, samples and adds it.

  >>> import jax.numpy as jnp
  >>> import fisherflow_jax as ff
  >>> model = lambda params, x: x * params, ff.likelihoods.gaussian()
  >>> flow = ff.fisher_flow(*model)
  >>> state, info = flow.update(flow.init(jnp.zeros(())), (jnp.ones(3), jnp.ones(3)))
  >>> print(state.mean, ff.standard_error(state))
  0.75 0.5

Every name has a docstring with an example: `help(ff.fisher_flow)`, `help(ff.memories)`.
The guide, recipes and the list of all names are not in the installed package but in
docs/ of the repository.
"""

import typing as _typing
from importlib import import_module as _import_module

from fisherflow_jax import estimators as estimators
from fisherflow_jax import expectations as expectations
from fisherflow_jax import information as information
from fisherflow_jax import layers as layers
from fisherflow_jax import likelihoods as likelihoods
from fisherflow_jax import memories as memories
from fisherflow_jax import structures as structures
from fisherflow_jax import transforms as transforms
from fisherflow_jax._ground.batch import Batch as Batch
from fisherflow_jax._ground.batch import Shared as Shared
from fisherflow_jax._ground.naming import show as _show
from fisherflow_jax._ground.warning import DataWarning as DataWarning
from fisherflow_jax.accumulation import Accumulation as Accumulation
from fisherflow_jax.accumulation import Stacked as Stacked
from fisherflow_jax.accumulation import accumulate as accumulate
from fisherflow_jax.accumulation import accumulator as accumulator
from fisherflow_jax.accumulation import global_batches as global_batches
from fisherflow_jax.flow import BankState as BankState
from fisherflow_jax.flow import FisherFlow as FisherFlow
from fisherflow_jax.flow import FlowState as FlowState
from fisherflow_jax.flow import Merged as Merged
from fisherflow_jax.flow import bank as bank
from fisherflow_jax.flow import fisher_flow as fisher_flow
from fisherflow_jax.flow import merge as merge
from fisherflow_jax.flow import refine as refine
from fisherflow_jax.flow import run as run
from fisherflow_jax.flow import smooth as smooth
from fisherflow_jax.flow import warm_start as warm_start
from fisherflow_jax.model import negative_log_likelihood as negative_log_likelihood
from fisherflow_jax.model import only as only
from fisherflow_jax.model import scores as scores
from fisherflow_jax.posteriors import Estimate as Estimate
from fisherflow_jax.posteriors import Posterior as Posterior
from fisherflow_jax.posteriors import Summary as Summary
from fisherflow_jax.posteriors import WaldTest as WaldTest
from fisherflow_jax.posteriors import confidence_interval as confidence_interval
from fisherflow_jax.posteriors import delta_method as delta_method
from fisherflow_jax.posteriors import log_density as log_density
from fisherflow_jax.posteriors import posterior as posterior
from fisherflow_jax.posteriors import sample as sample
from fisherflow_jax.posteriors import standard_error as standard_error
from fisherflow_jax.posteriors import summary as summary
from fisherflow_jax.posteriors import wald_test as wald_test
from fisherflow_jax.transforms import adam as adam
from fisherflow_jax.transforms import clip_by_kl as clip_by_kl
from fisherflow_jax.transforms import get_information as get_information
from fisherflow_jax.transforms import kfac as kfac
from fisherflow_jax.transforms import natural_gradient as natural_gradient
from fisherflow_jax.transforms import scale_by_fisher as scale_by_fisher
from fisherflow_jax.transforms import shampoo as shampoo
from fisherflow_jax.transforms import soap as soap

if _typing.TYPE_CHECKING:
    from fisherflow_jax import calibration as calibration
    from fisherflow_jax import comparison as comparison
    from fisherflow_jax import compression as compression
    from fisherflow_jax import continual as continual
    from fisherflow_jax import diagnostics as diagnostics
    from fisherflow_jax import flax as flax
    from fisherflow_jax import geometry as geometry
    from fisherflow_jax import influence as influence
    from fisherflow_jax import intervals as intervals
    from fisherflow_jax import metrics as metrics
    from fisherflow_jax import plots as plots
    from fisherflow_jax import predictions as predictions
    from fisherflow_jax import selection as selection
    from fisherflow_jax import sparse as sparse
    from fisherflow_jax import testing as testing
    from fisherflow_jax._choose import choose as choose
    from fisherflow_jax._laplace import Laplace as Laplace
    from fisherflow_jax._laplace import laplace as laplace
    from fisherflow_jax._saving import load as load
    from fisherflow_jax._saving import save as save
    from fisherflow_jax.calibration import Calibration as Calibration
    from fisherflow_jax.calibration import calibrate as calibrate
    from fisherflow_jax.predictions import Prediction as Prediction
    from fisherflow_jax.predictions import predict as predict

__version__ = "0.2.0"

# What a first import does not need: loaded on first use.
_LAZY = {
    "calibration",
    "comparison",
    "compression",
    "continual",
    "diagnostics",
    "flax",
    "geometry",
    "influence",
    "intervals",
    "metrics",
    "plots",
    "predictions",
    "selection",
    "sparse",
    "testing",
}
_LAZY_NAMES = {
    "Calibration": "calibration",
    "Laplace": "_laplace",
    "Prediction": "predictions",
    "calibrate": "calibration",
    "choose": "_choose",
    "laplace": "_laplace",
    "load": "_saving",
    "predict": "predictions",
    "save": "_saving",
}
# Rooms of which the package shows names alone.
_UNSHOWN = {"accumulation", "flow", "model", "posteriors"}

for _room in (information, likelihoods, memories, structures, transforms):
    _show(_room.__name__)
for _name in _UNSHOWN:
    _show(f"{__name__}.{_name}")
_show(__name__)

_public = {name for name in globals() if not name.startswith("_")}
__all__ = sorted((_public - _UNSHOWN) | _LAZY | _LAZY_NAMES.keys())


def __dir__() -> list[str]:
    return __all__


if not _typing.TYPE_CHECKING:  # which would take any name for one of the package

    def __getattr__(name):
        if name in _LAZY:
            return _import_module(f"fisherflow_jax.{name}")
        if name in _LAZY_NAMES:
            room = _import_module(f"fisherflow_jax.{_LAZY_NAMES[name]}")
            return globals().setdefault(name, getattr(room, name))
        raise AttributeError(f"module 'fisherflow_jax' has no attribute {name!r}")
