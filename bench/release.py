"""Release 1.1.8 in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

OLD = "1.1.8"
HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".old-venv"


def old_python() -> Path:
    """The interpreter that has release 1.1.8, which is installed if it is not there yet.

    `BENCH_OLD_PYTHON` names one that is there already.
    """
    if given := os.environ.get("BENCH_OLD_PYTHON"):
        return Path(given)
    python = ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = ENVIRONMENT / ".installed"
    if not done.exists():
        print(f"installing release {OLD} in {ENVIRONMENT}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        constraints = ENVIRONMENT / "constraints.txt"
        constraints.write_text("".join(torch_pins()), encoding="utf-8")
        install = [str(python), "-m", "pip", "install", "--quiet", f"sd-mecha=={OLD}", "-c", str(constraints)]
        subprocess.run(install, check=True)
        done.touch()
    return python


def torch_pins() -> list[str]:
    """The lines of the constraints file that give both releases the same torch and numpy."""
    lines = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.startswith(("torch==", "numpy=="))]
