"""`python -m bench [CASE...]`: see `docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench import sources
from bench.cases import CASES, IMPORT, INFERENCE, RECIPES
from bench.files import SETS
from bench.measure import Bench
from bench.process import ChildError
from bench.release import old_python
from bench.sources import SOURCES
from bench.table import render, write_into

HERE = Path(__file__).parent
NAMES = (*(case.name for case in CASES), *SOURCES, IMPORT, INFERENCE, *RECIPES)
RESULTS = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "benchmarks.md"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed and memory of merges.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--quick", action="store_true", help="files of 64 MB at most; nothing is recorded")
    parser.add_argument("--no-old", action="store_true", help="leave release 1.1.8 out")
    parser.add_argument("--keep", action="store_true", help="keep the files for the next run")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(os.environ.get("BENCH_DIR", HERE / ".work")),
        help="folder for the files, up to 25 GB at a time (default: BENCH_DIR, or bench/.work)",
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.cases) - set(NAMES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    whole = {case.name for case in CASES if case.adapters} if chosen.quick else set()  # an adapter needs its whole base
    chosen.cases = [name for name in NAMES if (not chosen.cases or name in chosen.cases) and name not in whole]
    return chosen


def main() -> int:
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        work=options.work.resolve(),
        old=None if options.no_old else old_python,
        repeats=1 if options.quick else options.repeats,
        quick=options.quick,
    )
    results: dict[str, Any] = {}
    failed = []
    for position, name in enumerate(options.cases):
        print(name, flush=True)
        try:
            results[name] = measure(bench, name)
        except ChildError as error:
            failed.append(name)
            print(f"  failed: {error}", file=sys.stderr, flush=True)
        if not options.keep:
            remove_unneeded(options.work, options.cases[position + 1 :])
    print(f"\n{render(results)}")
    if not options.quick:
        record(results)
    return 1 if failed else 0


def measure(bench: Bench, name: str) -> dict[str, Any]:
    if name == IMPORT:
        return bench.imports()
    if name == INFERENCE:
        return bench.inference()
    if name in RECIPES:
        return bench.recipe(name)
    if name in SOURCES:
        return sources.measure(name, bench.work, bench.repeats, bench.quick)
    return bench.merge_case(next(case for case in CASES if case.name == name))


def remove_unneeded(work: Path, coming: list[str]) -> None:
    """Remove file sets that no later case uses: all of them together would fill 50 GB."""
    needed = {files for case in CASES if case.name in coming for files in (case.files, case.adapters)}
    needed |= {sources.FILES} if SOURCES.keys() & set(coming) else set()
    for files in set(SETS) - needed:
        for folder in (work / files, work / f"{files}-quick"):
            shutil.rmtree(folder, ignore_errors=True)


def record(results: dict[str, Any]) -> None:
    """Keep the results, and put them in the documentation once there are some for every case."""
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    (RESULTS / f"{stamp}.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    latest = RESULTS / "latest.json"
    merged = json.loads(latest.read_text(encoding="utf-8")) if latest.exists() else {}
    merged.update(results)
    latest.write_text(json.dumps(merged, indent=1), encoding="utf-8")
    missing = [name for name in NAMES if name not in merged]
    if missing:
        print(f"{DOCUMENT.name} stays as it is until there are results for: {', '.join(missing)}")
    else:
        write_into(DOCUMENT, render(merged))
        print(f"tables written into {DOCUMENT}")


if __name__ == "__main__":
    sys.exit(main())
