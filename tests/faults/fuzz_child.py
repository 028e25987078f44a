"""Tries damaged files until the time is over, or until one is a finding and ends this process. Started by `fuzz`.

Where atheris is installed, files that reach new code are damaged further. Elsewhere valid ones are damaged at random.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import importlib.util
import pkgutil
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.fuzz import FINDINGS

if TYPE_CHECKING:
    from tests.faults.fuzz_targets import Target

MEMORY = 512 << 20
PATIENCE = 10  # seconds for one file
LONGEST = 1 << 16  # bytes of a file that atheris makes
_READERS = ("storage", "recipes", "builtin.formats", "serialization", "extensions.model_formats")


class Trial:
    """Tries files, each of them in the same way whoever makes them."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder
        self.tried = 0

    def __call__(self, data: bytes) -> None:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        self.target(data, self.folder)
        faulthandler.cancel_dump_traceback_later()
        self.tried += 1


def at_random(trial: Trial, seconds: float, seed: int) -> None:
    """Damage valid files."""
    from tests.faults.fuzz_damage import damaged

    seeds, rng = trial.target.seeds(), random.Random(seed)
    for data in seeds:
        trial(data)  # also imports what reading needs, before memory is limited
    limit_memory()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        trial(damaged(trial.target.kind, rng.choice(seeds), seeds, rng))
    sys.stdout.write(f"tried {trial.tried} at random\n")


def guided(trial: Trial, seconds: float, seed: int, corpus: Path) -> None:
    """Have libFuzzer choose the files that are damaged further, by the code that they reached."""
    import atheris

    from tests.faults.fuzz_damage import damaged

    kind, seeds = trial.target.kind, trial.target.seeds()
    corpus.mkdir()
    for number, data in enumerate([*seeds, *(path.read_bytes() for path in FINDINGS.glob(f"{kind}/*"))]):
        corpus.joinpath(str(number)).write_bytes(data)
        trial(data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.25:  # what libFuzzer keeps is as short as can be, and has lost much that could be damaged
            data = rng.choice(seeds)

        def change(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, max(len(part) + 64, 128)))

        way = rng.randrange(4)
        made = change(data) if way == 0 else damaged(kind, data, seeds, rng, change if way == 1 else None)
        return made if len(made) <= longest else bytes(atheris.Mutate(data, longest))

    options = [
        f"-max_total_time={max(round(seconds), 1)}",
        f"-seed={seed % 2**32 or 1}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={corpus.parent}/",
        "-rss_limit_mb=0",  # no limit; `limit_memory` and `PATIENCE` hold whoever makes the files
        "-timeout=3600",  # 0 would be none for libFuzzer, and no patience at all for atheris
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], trial, custom_mutator=mutate)
    limit_memory()
    atheris.Fuzz()  # does not come back


def instrument() -> None:
    """Import the readers so that they tell atheris where they are, and nothing else in that way."""
    import atheris

    importlib.import_module("torch")
    with atheris.instrument_imports(include=["sd_mecha"]):
        for name in _READERS:
            module = importlib.import_module(f"sd_mecha.{name}")
            for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"{module.__name__}."):
                importlib.import_module(found.name)


def limit_memory() -> None:
    """Let anything that takes more than the limit on top of what is in use fail with MemoryError."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        used = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unguided", action="store_true")
    options = parser.parse_args()
    by_coverage = not options.unguided and importlib.util.find_spec("atheris") is not None
    if by_coverage:
        instrument()
    from tests.faults.fuzz_targets import TARGETS  # imports what has to be instrumented first

    files = options.folder / "files"
    files.mkdir()
    trial = Trial(TARGETS[options.kind], files)
    if by_coverage:
        guided(trial, options.seconds, options.seed, options.folder / "corpus")
    else:
        at_random(trial, options.seconds, options.seed)


if __name__ == "__main__":
    main()
