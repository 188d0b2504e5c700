"""Programs on eight simulated devices: a process has them from its start or not."""

import os
import subprocess
import sys
from pathlib import Path


def check_program(path: Path, *names: str) -> None:
    """It ends well, in double precision, and prints "the same"."""
    # with the suite's compiler, which its set-up has named in the environment
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
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
