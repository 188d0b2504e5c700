"""Structures: what is kept of the Fisher information."""

from fisherflow_jax.structures import capabilities as capabilities
from fisherflow_jax.structures import sharing as sharing
from fisherflow_jax.structures._algebra.eigen import Sides as Sides
from fisherflow_jax.structures._algebra.outer_products import (
    OuterProducts as OuterProducts,
)
from fisherflow_jax.structures._block import Block as Block
from fisherflow_jax.structures._block import UnitBlock as UnitBlock
from fisherflow_jax.structures._block import block as block
from fisherflow_jax.structures._compensated import Compensated as Compensated
from fisherflow_jax.structures._diagonal import Diagonal as Diagonal
from fisherflow_jax.structures._diagonal import diagonal as diagonal
from fisherflow_jax.structures._eigen_kronecker import EigenKronecker as EigenKronecker
from fisherflow_jax.structures._full import Full as Full
from fisherflow_jax.structures._full import full as full
from fisherflow_jax.structures._inverted import Inverted as Inverted
from fisherflow_jax.structures._kronecker import Kronecker as Kronecker
from fisherflow_jax.structures._kronecker import LayerInverses as LayerInverses
from fisherflow_jax.structures._kronecker import kronecker as kronecker
from fisherflow_jax.structures._low_rank import LowRank as LowRank
from fisherflow_jax.structures._low_rank import low_rank as low_rank
from fisherflow_jax.structures._moving_kronecker import LayerBases as LayerBases
from fisherflow_jax.structures._moving_kronecker import (
    MovingKronecker as MovingKronecker,
)
from fisherflow_jax.structures._packed_kronecker import (
    PackedKronecker as PackedKronecker,
)
from fisherflow_jax.structures._prior import as_precision as as_precision
from fisherflow_jax.structures._scalar import Scalar as Scalar
from fisherflow_jax.structures._scalar import scalar as scalar
from fisherflow_jax.structures._structure import Structure as Structure
from fisherflow_jax.structures._two_sided import SideFactors as SideFactors
from fisherflow_jax.structures._two_sided import SideRoots as SideRoots
from fisherflow_jax.structures._two_sided import TwoSided as TwoSided
from fisherflow_jax.structures._two_sided import two_sided as two_sided
from fisherflow_jax.structures.capabilities import ADAPTIVE as ADAPTIVE
