"""A folder of `torch.distributed.checkpoint` that two processes wrote together, each its part of the tensors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from sd_mecha.storage.locations import LocalLocation
from sd_mecha.storage.pytorch.distributed import DcpReader
from tests.storage.support import entries_of, random_tensor, raw, read_bytes

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this build of torch lacks gloo"
)

PLACEMENTS: dict[str, tuple[tuple[int, ...], Placement]] = {
    "rows": ((7, 4), Shard(0)),
    "columns": ((3, 5), Shard(1)),
    "fewer rows than processes": ((1, 3), Shard(0)),
    "replicated": ((6,), Replicate()),
}


def model() -> dict[str, torch.Tensor]:
    tensors = {
        name: random_tensor(torch.bfloat16, shape, seed) for seed, (name, (shape, _)) in enumerate(PLACEMENTS.items())
    }
    return {**tensors, "plain": torch.arange(5.0), "tied": tensors["rows"]}


def save_part(rank: int, folder: str) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it looks for the name of the computer
    distributed.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = model()
    for name, (_, placement) in PLACEMENTS.items():
        tensors[name] = distribute_tensor(tensors[name], mesh, [placement])
    tensors["tied"] = tensors["rows"]
    dcp.save({"model": tensors, "optim": {"step": rank, "exp_avg": tensors["rows"]}}, checkpoint_id=folder)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_what_two_processes_wrote_is_read_as_one_model(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    torch.multiprocessing.spawn(save_part, args=(str(folder),), nprocs=2)
    assert len(list(folder.glob("*.distcp"))) == 2
    expected = model()
    reader = DcpReader(LocalLocation(folder))
    assert dict(reader.entries) == entries_of(expected)
    assert all(read_bytes(reader, name) == raw(tensor) for name, tensor in expected.items())
    reader.close()
