"""The benchmark measures what it says: right files, right peaks, right arithmetic in its tables."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sd_mecha
from bench.__main__ import NAMES
from bench.cases import CASES, Case
from bench.files import SETS, FileSet, Shape, cut, sd15, sdxl, write_model
from bench.floor import floor
from bench.process import ChildError, run
from bench.sources import SOURCES, measure, stored
from bench.table import BEGIN, END, merge_row, render, write_into

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="samples /proc")


@pytest.mark.parametrize(
    ("shapes", "count", "size", "digest"),
    [
        (sd15, 1130, 2_132_470_614, "bcf4603c65ebe128ddff3a53973ab8eac10a5560f7a17846af3c3026837b5295"),
        (sdxl, 2514, 6_937_675_736, "9e2179e4047d556053474f833e4baaaf63616a984c4b1058d31a3b1f732370d2"),
    ],
)
def test_checkpoints_have_the_names_and_shapes_of_real_ones(
    shapes: Callable[[], Mapping[str, Shape]], count: int, size: int, digest: str
) -> None:
    made = shapes()
    listing = "".join(f"{name} {list(shape)}\n" for name, shape in sorted(made.items()))
    assert len(made) == count
    assert 2 * sum(math.prod(shape) for shape in made.values()) == size
    assert hashlib.sha256(listing.encode()).hexdigest() == digest


def test_files_are_valid_finite_and_different(tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"scalar": (), "empty": (0, 3), "matrix": (70, 50)}
    states = []
    for seed in range(2):
        path = tmp_path / f"{seed}.safetensors"
        write_model(path, shapes, seed)
        states.append(load_file(path))
    assert {name: tuple(t.shape) for name, t in states[0].items()} == shapes
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in states[0].values())
    assert not torch.equal(states[0]["matrix"], states[1]["matrix"])


def test_a_file_longer_than_the_block_of_weights_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.files.BLOCK", 64)
    write_model(tmp_path / "m.safetensors", {"w": (100,)}, 0)
    weights = load_file(tmp_path / "m.safetensors")["w"]
    assert torch.equal(weights[:32], weights[32:64])
    assert torch.equal(weights[:4], weights[96:])


@pytest.mark.parametrize("files", SETS.values(), ids=SETS)
def test_quick_files_are_small(files: FileSet) -> None:
    limit = 1 << 20
    small = cut(files.shapes(), limit)
    assert small
    assert 2 * sum(math.prod(shape) for shape in small.values()) <= limit


def test_the_floor_reads_and_writes_and_leaves_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"x" * 1000)
    assert floor([source, source], output, (1 << 22) + 5) > 0
    assert not output.exists()


@needs_proc
def test_the_peak_of_a_child_is_seen_after_it_has_let_go(tmp_path: Path) -> None:
    code = "import time, json; x = bytearray(b'x') * 80_000_000; time.sleep(.05); del x; print(json.dumps(5))"
    done = run([sys.executable, "-c", code], log=tmp_path / "log")
    assert 80_000_000 <= done.anonymous < 120_000_000
    assert done.answer == 5
    assert done.wall > 0.05


def test_a_child_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="out of luck"):
        run([sys.executable, "-c", "raise SystemExit('out of luck')"], log=tmp_path / "log")


def test_a_child_that_hangs_is_killed(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="more than"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1, log=tmp_path / "log")


def side(seconds: float, memory: float) -> dict[str, list[float]]:
    return {"seconds": [seconds], "first": [seconds], "wall": [seconds + 1], "memory": [memory]}


def test_a_row_says_what_is_reached_and_what_is_missed() -> None:
    case = Case("n", "title", "tiny", 2, "slerp", faster=10, floor=2.5)
    row = {"floor": [1.0], "new": side(2.0, 20e6), "old": side(10.0, 3e9)}
    assert merge_row(case, row) == [
        "title",
        "1 s",
        "2 s (3 s)",
        "10 s (11 s)",
        "5.0x faster (>= 10x) ✗",
        "2.00x (<= 2.5x)",
        "20 MB (<= 64 MB)",
        "3.0 GB",
    ]


def test_tables_go_between_the_markers_again_and_again(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    results = {case.name: {"floor": [1.0], "new": side(2.0, 2e7)} for case in CASES}
    for _ in range(2):
        write_into(document, render(results))
    text = document.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\nMeasured on ")
    assert text.endswith(f"{END}\nafter\n")
    assert "\nold\n" not in text
    assert text.count("Measured on") == 1
    assert all(case.title in text for case in CASES)


def test_the_documentation_has_the_markers() -> None:
    text = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert text.index(BEGIN) < text.index(END)


def test_cases_have_names_of_their_own_and_files_to_use() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(case.count <= SETS[case.files].count for case in CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folders", "torch_files"])
def test_models_stored_in_other_ways_are_the_same_models(tmp_path: Path, name: str) -> None:
    files = SETS["tiny"].make(tmp_path, 2, False)
    with stored(name, files, tmp_path) as (inputs, parts):
        assert all(part.is_file() for part in parts)
        for path, stands_for in zip(inputs, files, strict=True):
            found = sd_mecha.merge(sd_mecha.model(path), output_dtype=None, tqdm=None)
            assert found is not None
            for key, expected in load_file(stands_for).items():
                assert torch.equal(found[key], expected)
    assert not (tmp_path / name).exists()


@needs_proc
@pytest.mark.slow
def test_a_source_is_measured_beside_plain_files(tmp_path: Path) -> None:
    row = measure("resume", tmp_path, 1, quick=True)
    assert {name: len(values) for name, values in row.items()} == {"plain": 1, "seconds": 1, "memory": 1}
    table = render({"resume": row})
    assert SOURCES["resume"].title in table
