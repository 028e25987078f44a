"""What a stranger who installs or builds the project relies on."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def requirement_name(line: str) -> str:
    return re.split(r"[ =<>;\[~!]", line, maxsplit=1)[0].lower().replace("_", "-")


def test_the_package_says_its_version_and_is_typed() -> None:
    assert metadata.version("sd-mecha").startswith("2.")
    assert (ROOT / "src/sd_mecha/py.typed").is_file()


@pytest.mark.parametrize("module", ["sd_mecha", "sd_mecha.cli"])
def test_importing_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'numpy', 'yaml', 'rich'}} & set(sys.modules)))"
    assert run_python(code) == "[]"


def test_every_dependency_is_pinned_and_no_pin_names_an_index() -> None:
    lines = [
        line.strip()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+(; python_version >= \"[\d.]+\")?", line) for line in lines)
    pinned = {requirement_name(line) for line in lines}
    wanted = {requirement_name(line) for line in metadata.requires("sd-mecha") or ()}
    assert wanted - {"sd-mecha"} <= pinned


def test_the_console_script_leads_to_the_command_line() -> None:
    (script,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "sd-mecha")
    assert callable(script.load())


def test_files_keep_to_one_idea() -> None:
    sizes = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("src", "tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        if not {".work", ".old-venv"} & set(path.parts)
    }
    assert {path: lines for path, lines in sizes.items() if lines > 400} == {}


def test_ci_runs_the_check_of_the_makefile() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert re.search(r"make\b.*\bcheck$", script.rstrip())
