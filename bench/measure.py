"""Run the cases: floor, this version and release 1.1.8 in turn, on the same files."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.cases import Case
from bench.files import SETS
from bench.floor import evict, floor, warm
from bench.process import ChildError, Run, run

CHILDREN = Path(__file__).parent / "children"
Row = dict[str, Any]


@dataclass
class Bench:
    """Where and how to measure.

    Attributes:
        work: folder for the files.
        old: answers the interpreter that has release 1.1.8, asked when first needed; None leaves it out.
        repeats: runs of each kind.
        quick: small files.
    """

    work: Path
    old: Callable[[], Path] | None
    repeats: int
    quick: bool
    _bare: dict[Path, int] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.work / "child.log"

    def merge_case(self, case: Case) -> Row:
        """Times in seconds and memory in bytes, one entry a run."""
        inputs = SETS[case.files].make(self.work, case.count, self.quick)
        if case.adapters:
            inputs += SETS[case.adapters].make(self.work, case.adapter_count, self.quick)
        prepare = evict if case.cold else warm
        output = self.work / "output.safetensors"
        pythons = {"new": Path(sys.executable)}
        if case.old and self.old is not None:
            pythons["old"] = self.old()
        row: Row = {
            "floor": [],
            **{side: {"seconds": [], "first": [], "wall": [], "memory": []} for side in pythons},
        }
        for turn in range(self.repeats):
            for side, python in pythons.items():
                prepare(inputs)
                done = self._merge(python, case, inputs, output)
                seconds = done.answer["seconds"]
                row[side]["seconds"].append(median(seconds))
                row[side]["first"].append(seconds[0])
                row[side]["wall"].append(done.wall)
                row[side]["memory"].append(done.anonymous - self._bare_memory(python))
                if side == "new":
                    row["output"] = output.stat().st_size
                output.unlink()
                os.sync()
            prepare(inputs)
            row["floor"].append(floor(inputs, output, row["output"]))
            _say(f"  {turn + 1}/{self.repeats}", row)
        row["input"] = sum(path.stat().st_size for path in inputs)
        return row

    def imports(self) -> Row:
        """Seconds that importing takes, torch alone and with this package's merging part, and that help takes."""
        codes = {
            "torch": "import torch",
            "sd_mecha": "import torch, sd_mecha; sd_mecha.merge, sd_mecha.weighted_sum, sd_mecha.model",
            "help": "import sys, io; sys.stdout = io.StringIO(); from sd_mecha.cli import main; main(['--help'])",
        }
        row: Row = {name: [] for name in codes}
        for _ in range(max(self.repeats, 5)):
            for name, code in codes.items():
                row[name].append(run([sys.executable, "-c", code], log=self.log).wall)
        return row

    def inference(self) -> Row:
        """Seconds to find the config of a header: in a fresh process, and later in the same one."""
        answers = [run([sys.executable, CHILDREN / "inference.py"], log=self.log).answer for _ in range(self.repeats)]
        return {name: [answer[name] for answer in answers] for name in answers[0]}

    def recipe(self, kind: str) -> Row:
        """Seconds to build, print, save, load and plan a large recipe, and its peak memory."""
        (path,) = SETS["tiny"].make(self.work, 1, self.quick)
        child = [sys.executable, str(CHILDREN / "recipe_scale.py"), kind, str(path)]
        done = run(child, timeout=600, log=self.log)
        memory = done.anonymous - self._bare_memory(Path(sys.executable))
        return {"seconds": done.answer["seconds"], "memory": memory}

    def _merge(self, python: Path, case: Case, inputs: list[Path], output: Path) -> Run:
        os.sync()
        job = {
            "method": case.method,
            "inputs": [str(path) for path in inputs],
            "output": str(output),
            "times": case.times,
        }
        try:
            return run([python, CHILDREN / "merge_once.py", json.dumps(job)], log=self.log)
        except ChildError:
            output.unlink(missing_ok=True)
            raise

    def _bare_memory(self, python: Path) -> int:
        if python not in self._bare:
            code = "import torch, time; time.sleep(0.05)"
            self._bare[python] = run([python, "-c", code], log=self.log).anonymous
        return self._bare[python]


def _say(turn: str, row: Row) -> None:
    parts = [f"floor {row['floor'][-1]:.3f} s"]
    for side in ("new", "old"):
        if side in row:
            memory = row[side]["memory"][-1] / 1e6
            parts.append(f"{side} {row[side]['seconds'][-1]:.3f} s, {memory:.0f} MB")
    print(f"{turn}: {'; '.join(parts)}  ({time.strftime('%H:%M:%S')})", flush=True)
