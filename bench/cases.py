"""What is measured, and what it has to reach."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 64_000_000


@dataclass(frozen=True)
class Case:
    """A merge of files.

    Attributes:
        files, count: the file set, and how many of its files go in.
        old: whether release 1.1.8 runs it as well.
        cold: evict the inputs from the page cache before every run.
        times: merges within one process; the median counts.
        faster: wanted, how many times faster than 1.1.8.
        floor: wanted, at most so many times the floor.
        seconds: wanted, at most.
        memory: wanted, at most so many bytes over `import torch`.
    """

    name: str
    title: str
    files: str
    count: int
    method: str
    old: bool = True
    cold: bool = False
    times: int = 1
    faster: float | None = None
    floor: float | None = None
    seconds: float | None = None
    memory: int | None = MEMORY


CASES = (
    Case(
        "tiny",
        "two files of 2 KB",
        "tiny",
        2,
        "weighted_sum",
        times=30,
        seconds=0.010,
        memory=None,
    ),
    Case(
        "sd15_weighted_sum",
        "weighted_sum of 2 SD1.5, warm",
        "sd15",
        2,
        "weighted_sum",
        faster=10,
        floor=2.2,
    ),
    Case(
        "sd15_slerp",
        "slerp of 2 SD1.5, warm",
        "sd15",
        2,
        "slerp",
        faster=6,
    ),
    Case(
        "sd15_n_average",
        "n_average of 5 SD1.5, warm",
        "sd15",
        5,
        "n_average",
        faster=10,
        floor=2.5,
    ),
    Case(
        "many_5",
        "n_average of 5 files of 50 MB",
        "many",
        5,
        "n_average",
        old=False,
    ),
    Case(
        "many_200",
        "n_average of 200 files of 50 MB",
        "many",
        200,
        "n_average",
        faster=8,
        floor=3,
    ),
    Case(
        "huge_weighted_sum",
        "weighted_sum of one tensor of 4 GB",
        "huge",
        2,
        "weighted_sum",
        old=False,
        floor=2,
    ),
    Case(
        "huge_slerp",
        "slerp of one tensor of 4 GB",
        "huge",
        2,
        "slerp",
        old=False,
        floor=4,
    ),
    Case(
        "sdxl_weighted_sum",
        "weighted_sum of 2 SDXL, cold",
        "sdxl",
        2,
        "weighted_sum",
        cold=True,
        faster=5,
        floor=1.3,
    ),
    Case(
        "sdxl_add_difference",
        "A + (B - C) of 3 SDXL, cold",
        "sdxl",
        3,
        "add_difference",
        cold=True,
        faster=5,
        floor=1.4,
    ),
)

IMPORT = "import"
"""`import sd_mecha` against `import torch`."""

RECIPES = {
    "chain": "chain of 100,000 merges",
    "ladder": "64 levels of x = weighted_sum(x, x)",
    "average_of_files": "n_average over 10,000 files",
    "average_in_memory": "n_average over 10,000 models in memory",
}

NAMES = (*(case.name for case in CASES), IMPORT, *RECIPES)
