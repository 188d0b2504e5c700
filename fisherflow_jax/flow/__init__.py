"""Flows: sequential inference, (mean, information) -> (mean, information)."""

from fisherflow_jax.flow._bank import Bank as Bank
from fisherflow_jax.flow._bank import BankInfo as BankInfo
from fisherflow_jax.flow._bank import BankState as BankState
from fisherflow_jax.flow._bank import bank as bank
from fisherflow_jax.flow._belonging import check_member as check_member
from fisherflow_jax.flow._flow import fisher_flow as fisher_flow
from fisherflow_jax.flow._identity import check_belongs as check_belongs
from fisherflow_jax.flow._identity import choices_of as choices_of
from fisherflow_jax.flow._identity import differing as differing
from fisherflow_jax.flow._merging import Merged as Merged
from fisherflow_jax.flow._merging import merge as merge
from fisherflow_jax.flow._newton import Solution as Solution
from fisherflow_jax.flow._newton import damped_newton as damped_newton
from fisherflow_jax.flow._objective import objective_of as objective_of
from fisherflow_jax.flow._recipe import log_prior_of as log_prior_of
from fisherflow_jax.flow._refine import refine as refine
from fisherflow_jax.flow._refine import warm_start as warm_start
from fisherflow_jax.flow._run import run as run
from fisherflow_jax.flow._smooth import Smoothed as Smoothed
from fisherflow_jax.flow._smooth import smooth as smooth
from fisherflow_jax.flow._state import Events as Events
from fisherflow_jax.flow._state import FisherFlow as FisherFlow
from fisherflow_jax.flow._state import FlowInfo as FlowInfo
from fisherflow_jax.flow._state import FlowState as FlowState
