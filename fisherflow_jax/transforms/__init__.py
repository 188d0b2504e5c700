"""Optax gradient transformations that know the Fisher information."""

from fisherflow_jax.structures import LayerBases as LayerBases
from fisherflow_jax.structures import MovingKronecker as MovingKronecker
from fisherflow_jax.transforms._adapt_damping import (
    AdaptDampingState as AdaptDampingState,
)
from fisherflow_jax.transforms._adapt_damping import adapt_damping as adapt_damping
from fisherflow_jax.transforms._bytes_per_device import (
    bytes_per_device as bytes_per_device,
)
from fisherflow_jax.transforms._clip_by_kl import ClipByKLState as ClipByKLState
from fisherflow_jax.transforms._clip_by_kl import clip_by_kl as clip_by_kl
from fisherflow_jax.transforms._descent import natural_gradient as natural_gradient
from fisherflow_jax.transforms._kfac import kfac as kfac
from fisherflow_jax.transforms._scale_by_fisher import adam as adam
from fisherflow_jax.transforms._scale_by_fisher import (
    scale_by_fisher as scale_by_fisher,
)
from fisherflow_jax.transforms._soap import shampoo as shampoo
from fisherflow_jax.transforms._soap import soap as soap
from fisherflow_jax.transforms._two_sided import TwoSidedState as TwoSidedState
from fisherflow_jax.transforms._variational import variational as variational
from fisherflow_jax.transforms._variational_state import (
    VariationalState as VariationalState,
)
from fisherflow_jax.transforms._variational_state import get_posterior as get_posterior
from fisherflow_jax.transforms.preconditioner.factorise import apply as apply
from fisherflow_jax.transforms.preconditioner.factorise import (
    factored_damping as factored_damping,
)
from fisherflow_jax.transforms.preconditioner.factorise import factorise as factorise
from fisherflow_jax.transforms.preconditioner.factorise import (
    relative_to_mean_eigenvalue as relative_to_mean_eigenvalue,
)
from fisherflow_jax.transforms.preconditioner.state import (
    ScaleByFisherState as ScaleByFisherState,
)
from fisherflow_jax.transforms.preconditioner.state import SecondMoment as SecondMoment
from fisherflow_jax.transforms.preconditioner.state import (
    get_information as get_information,
)
