"""Structures: what is kept of the Fisher information."""

from fisherflow_jax.structures.block import Block as Block
from fisherflow_jax.structures.block import UnitBlock as UnitBlock
from fisherflow_jax.structures.block import block as block
from fisherflow_jax.structures.compensated import Compensated as Compensated
from fisherflow_jax.structures.diagonal import Diagonal as Diagonal
from fisherflow_jax.structures.diagonal import diagonal as diagonal
from fisherflow_jax.structures.eigen_kronecker import EigenKronecker as EigenKronecker
from fisherflow_jax.structures.full import Full as Full
from fisherflow_jax.structures.full import full as full
from fisherflow_jax.structures.kronecker import Kronecker as Kronecker
from fisherflow_jax.structures.kronecker import kronecker as kronecker
from fisherflow_jax.structures.kronecker_factors import expand as expand
from fisherflow_jax.structures.kronecker_factors import reduce as reduce
from fisherflow_jax.structures.low_rank import LowRank as LowRank
from fisherflow_jax.structures.low_rank import low_rank as low_rank
from fisherflow_jax.structures.outer_products import OuterProducts as OuterProducts
from fisherflow_jax.structures.scalar import Scalar as Scalar
from fisherflow_jax.structures.scalar import scalar as scalar
from fisherflow_jax.structures.structure import Structure as Structure
