"""Optax gradient transformations that know the Fisher information."""

from fisherflow_jax.transforms.adam import adam as adam
from fisherflow_jax.transforms.adapt_damping import (
    AdaptDampingState as AdaptDampingState,
)
from fisherflow_jax.transforms.adapt_damping import adapt_damping as adapt_damping
from fisherflow_jax.transforms.clip_by_kl import ClipByKLState as ClipByKLState
from fisherflow_jax.transforms.clip_by_kl import clip_by_kl as clip_by_kl
from fisherflow_jax.transforms.correction import LayerBases as LayerBases
from fisherflow_jax.transforms.correction import MovingKronecker as MovingKronecker
from fisherflow_jax.transforms.factored import factored_damping as factored_damping
from fisherflow_jax.transforms.get_information import get_information as get_information
from fisherflow_jax.transforms.kfac import kfac as kfac
from fisherflow_jax.transforms.natural_gradient import (
    natural_gradient as natural_gradient,
)
from fisherflow_jax.transforms.preconditioning import apply as apply
from fisherflow_jax.transforms.preconditioning import factorise as factorise
from fisherflow_jax.transforms.preconditioning import (
    relative_to_mean_eigenvalue as relative_to_mean_eigenvalue,
)
from fisherflow_jax.transforms.scale_by_fisher import scale_by_fisher as scale_by_fisher
from fisherflow_jax.transforms.state import ScaleByFisherState as ScaleByFisherState
from fisherflow_jax.transforms.state import SecondMoment as SecondMoment
