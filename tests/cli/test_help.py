"""Help comes at once: it imports nothing that takes time."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELP = """
import sys
from sd_mecha.cli import main
try:
    main(sys.argv[1:], prog_name="sd-mecha")
finally:
    assert not {"torch", "numpy", "yaml", "rich"} & set(sys.modules)
"""


@pytest.mark.parametrize("command", [[], ["merge"], ["plan"], ["info"], ["methods"], ["demo"]], ids=" ".join)
def test_help_needs_no_torch(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HELP, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" ".join(["Usage: sd-mecha", *command]))
