"""Influences on digits foretell what networks trained on halves of the data do."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The program that measures it, as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "measured_influence", BENCHMARKS / "influence.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_kronecker_factors_order_the_losses_and_no_curvature_does_less(benchmark):
    with jax.enable_x64(False):
        own = benchmark.problem(30)
        found = benchmark.informations(own.params, own.rows)

        def score(name, prior):
            return benchmark.scores(own, benchmark.effects(own, found[name], prior))

        kronecker = score("Kronecker", 1.0).mean()
        assert kronecker >= 0.6
        assert benchmark.ceiling(own).mean() > kronecker
        assert score("scalar", 1.0).mean() <= 0.5
        # the prior of the training is the damping: a hundredfold one spoils it
        assert score("Kronecker", 100.0).mean() < 0.6
