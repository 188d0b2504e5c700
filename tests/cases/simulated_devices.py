"""Programs on eight simulated devices: a process has them from its start or not."""

import os
import subprocess
import sys
from pathlib import Path

# code that is compiled for a few steps is not worth optimising
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def check_program(path: Path, *names: str) -> None:
    """It ends well, in double precision, and prints "the same"."""
    environment = os.environ | {
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    result = subprocess.run(
        [sys.executable, str(path), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the same" in result.stdout
