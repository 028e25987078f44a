"""What is measured, and what it has to reach."""

from __future__ import annotations

from dataclasses import dataclass

from bench.files import SETS

MEMORY = 64_000_000
MORE_MEMORY = 96_000_000  # for methods that hold every model of a tile at once
MATRIX_MEMORY = 4 * SETS["matrices"].largest() + MEMORY  # for methods that need entire tensors
ADAPTER_MEMORY = 160_000_000
MATRICES = "one transformer block of each width of SD1.5"


@dataclass(frozen=True)
class Case:
    """A merge of files.

    Attributes:
        files, count: the file set, and how many of its files go in; the base is one of them.
        adapters, adapter_count: a file set that goes in after these, and how many of its files.
        method: a recipe of `children/merge_once.py`.
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
    adapters: str = ""
    adapter_count: int = 0


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
    *(
        Case(f"sd15_{method}", f"{title}, SD1.5, warm", "sd15", count, method, faster=faster, memory=memory)
        for method, title, count, faster, memory in (
            ("add_difference_ties", "base + ties_sum of 3 differences, k=0.2", 4, 6, MORE_MEMORY),
            ("add_ties_with_dare", "add_ties_with_dare of a base and 3", 4, 6, MORE_MEMORY),
            ("dare", "base + ties_sum_with_dropout of 3 differences", 4, 6, MORE_MEMORY),
            ("della", "base + ties_sum_with_dropout of 3 differences, DELLA", 4, 6, MORE_MEMORY),
            ("n_model_stock", "n_model_stock of a base and 4", 5, 5, MORE_MEMORY),
            ("geometric_median", "geometric_median of 4", 4, 5, MORE_MEMORY),
            ("add_perpendicular", "add_perpendicular of 3", 3, 6, MEMORY),
            ("train_difference", "train difference of 3", 3, 6, MEMORY),
            ("add_cosine_a", "add_cosine_a of 2", 2, 6, MEMORY),
            ("add_cosine_b", "add_cosine_b of 2", 2, 6, MEMORY),
        )
    ),
    *(
        Case(f"matrices_{name}", f"{title}, {MATRICES}", "matrices", 2, name, faster=1.5, memory=MATRIX_MEMORY)
        for name, title in (
            ("rotate", "rotate of 2, alignment 1"),
            ("rotate_half", "rotate of 2, alignment 0.5"),
            ("truncate_rank", "truncate_rank of a difference to rank 8"),
        )
    ),
    Case(
        "embedding_ties",
        "base + ties_sum of 4 differences, k=0.2, one tensor of 128256 x 8192 in bf16",
        "embedding",
        5,
        "add_difference_ties",
        old=False,
        memory=256_000_000,
    ),
    Case(
        "nested",
        "12 methods nested, over 20 files of SD1.5 attention",
        "attention",
        20,
        "nested",
        old=False,
        memory=128_000_000,
    ),
    Case(
        "lora",
        "a LoRA of rank 64 applied to SDXL, cold",
        "sdxl",
        1,
        "lora",
        old=False,
        cold=True,
        floor=1.6,
        memory=ADAPTER_MEMORY,
        adapters="lora",
        adapter_count=1,
    ),
    Case(
        "loras",
        "20 LoRAs of rank 8 applied to SDXL, cold",
        "sdxl",
        1,
        "lora",
        old=False,
        cold=True,
        memory=ADAPTER_MEMORY,
        adapters="loras",
        adapter_count=20,
    ),
)

IMPORT = "import"
"""`import sd_mecha` against `import torch`."""

INFERENCE = "inference"
"""Which config a header of SDXL has."""

RECIPES = {
    "chain": "chain of 100,000 merges",
    "ladder": "64 levels of x = weighted_sum(x, x)",
    "average_of_files": "n_average over 10,000 files",
    "average_in_memory": "n_average over 10,000 models in memory",
}
