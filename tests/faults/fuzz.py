"""Throws broken files at the readers for a while: `python -m tests.faults.fuzz KIND [SECONDS] [SEED] [--unguided]`.

A reader may accept a file or raise an error of the family. Any other error, the death of the process, more than 512 MB
of memory on top of what it takes anyway, and ten seconds over one file are findings: the file is kept in
`tests/faults/findings/KIND`, where the tests try it again, and this process fails.

The files are made in a process of its own, see `fuzz_child`, so that whatever ends it leaves the last file behind.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {
    "safetensors": "x.safetensors",
    "index": "model.safetensors.index.json",
    "mecha": "x.mecha",
    "torch": "x.ckpt",
    "gguf": "x.gguf",
}
"""Kinds of files, and the name that a file of each is given."""
FINDINGS = Path(__file__).parent / "findings"
"""Where the files of earlier findings are kept, by kind; they are tried again by the tests."""
_ROOT = Path(__file__).parents[2]
_MORE = 120  # seconds that the process may take for what comes before and after
_RANDOM = re.compile(r"^tried (?P<files>\d+) at random$", re.MULTILINE)
_GUIDED = re.compile(r"DONE +cov: (?P<coverage>\d+).*?^Done (?P<files>\d+) runs", re.MULTILINE | re.DOTALL)


def fuzz(kind: str, seconds: float, seed: int, *, guided: bool = True) -> tuple[str, str]:
    """Try damaged files of a kind.

    Args:
        kind: one of `KINDS`.
        seconds: for how long.
        seed: of what is random.
        guided: whether coverage chooses the files to go on with, where atheris is installed.

    Returns:
        What was done; and what was found, which is the file that is kept and the end of what the process said.
    """
    with tempfile.TemporaryDirectory() as text:
        log = Path(text, "log")
        command = [sys.executable, "-m", "tests.faults.fuzz_child", kind, str(seconds), str(seed), text]
        command += [] if guided else ["--unguided"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            child = subprocess.Popen(command, stdout=out, stderr=out, cwd=_ROOT, env=environment)
            try:
                problem = f"exit status {status}" if (status := child.wait(seconds + _MORE)) else ""
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                problem = "it did not come to its end"
        said = log.read_text(errors="replace")
        done = _RANDOM.search(said) or _GUIDED.search(said)
        if done and not problem:
            return f"{kind}: " + ", ".join(f"{what} {value}" for what, value in done.groupdict().items()), ""
        kept = _keep(Path(text, "files", KINDS[kind]), FINDINGS / kind)
        return "", f"{kind}, seed {seed}: {problem or 'it ended too early'}; {kept}\n{said[-4000:]}"


def _keep(path: Path, folder: Path) -> str:
    if not path.exists():
        return "no file was tried"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"found-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}.bin"
    shutil.copyfile(path, kept)
    return f"kept as {kept}; give it a name that says what it shows"


def main() -> int:
    parser = argparse.ArgumentParser(description="Try damaged files of one kind, or of all.")
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("seconds", type=float, nargs="?", default=120.0)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().randrange(1, 10**9))
    parser.add_argument("--unguided", action="store_true", help="do not use atheris")
    options = parser.parse_args()
    bad = 0
    for kind in KINDS if options.kind == "all" else [options.kind]:
        said, found = fuzz(kind, options.seconds, options.seed, guided=not options.unguided)
        sys.stdout.write(f"{said or found}\n")
        sys.stdout.flush()
        bad += bool(found)
    return bad


if __name__ == "__main__":
    sys.exit(main())
