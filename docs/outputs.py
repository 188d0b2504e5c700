"""Makes docs/outputs: `python docs/outputs.py MACHINE NAME...`.

Runs the full form of examples, in an empty folder, and keeps what each printed below a
line that says when, on what machine (in words), by which jax, and how long it took. The
gallery shows it. With FOLDER=... in the environment, the pictures that the examples
leave are kept in it for `docs/pictures.py`.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUTS = ROOT / "docs/outputs"


def ran(name: str, folder: Path) -> tuple[str, float]:
    """What an example's full form prints, and the processor's minutes."""
    program = [sys.executable, ROOT / "examples" / f"{name}.py", "--full"]
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        program, cwd=folder, stdout=subprocess.PIPE, text=True, check=True
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, (used.ru_utime + used.ru_stime) / 60


def main(machine: str, names: list[str]) -> None:
    OUTPUTS.mkdir(exist_ok=True)
    spent = 0.0
    with tempfile.TemporaryDirectory() as empty:
        for name in names:
            folder = Path(os.environ.get("FOLDER", empty)) / name
            text, total = ran(name, folder)
            first = (
                f"{time.strftime('%Y-%m-%d')}, {machine}, jax {version('jax')}, "
                f"{total - spent:.1f} processor minutes"
            )
            spent = total
            (OUTPUTS / f"{name}.txt").write_text(f"{first}\n\n{text}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
