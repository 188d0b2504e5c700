"""Eight simulated devices give the numbers of one."""

from pathlib import Path

import pytest

from simulated_devices import check_program


@pytest.mark.slow
def test_sharded_batches_and_parameters_in_auto_and_explicit_meshes():
    check_program(Path(__file__).parent / "eight_devices.py")
