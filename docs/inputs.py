"""Two deltas that every picture merges: smooth bumps, which overlap and in one place contradict, and sparse spikes."""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 32


def bump(x: float, y: float, height: float, width: float) -> Tensor:
    """A smooth hill with its top at (x, y), both in [-1, 1], y downwards."""
    across, down = _axes()
    return height * torch.exp(-((across - x) ** 2 + (down - y) ** 2) / width**2)


def spikes(*places: tuple[int, int, float]) -> Tensor:
    """Single large entries at (row, column)."""
    made = torch.zeros(SIZE, SIZE)
    for row, column, height in places:
        made[row, column] = height
    return made


def noise(seed: int, height: float) -> Tensor:
    """Entries that are independent of each other and of everything else."""
    return height * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def waves(height: float) -> Tensor:
    """A ripple of high frequency."""
    across, down = _axes()
    return height * torch.sin(26 * across) * torch.sin(26 * down)


def shape_of_points() -> tuple[Tensor, Tensor]:
    """Neurons as points of a plane, one per row, and the same ones larger, moved and turned by 100 degrees."""
    along = torch.linspace(0, 1, 30)
    arm = torch.stack([along.clamp(max=0.7) - 0.35, (along - 0.7).clamp(min=0) * 1.6 - 0.2], dim=1)
    angle = torch.tensor(100.0).deg2rad()
    turn = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.stack([-angle.sin(), angle.cos()])])
    return arm, 1.4 * arm @ turn + torch.tensor([0.35, 0.15])


def _axes() -> tuple[Tensor, Tensor]:
    line = torch.linspace(-1, 1, SIZE)
    return line[None, :], line[:, None]


A = (
    bump(-0.35, -0.35, 0.8, 0.45)
    + bump(0.45, 0.5, -0.7, 0.35)
    + spikes((3, 27, 1), (8, 22, -1), (20, 4, 1), (26, 10, -1), (29, 3, 1), (14, 29, 1))
)
"""A hill above left, a hollow below right."""

B = (
    bump(0.2, -0.35, 0.8, 0.45)
    + bump(0.45, 0.5, 0.5, 0.3)
    + spikes((3, 3, 1), (12, 2, -1), (24, 4, -1), (29, 15, 1), (18, 29, -1), (2, 15, 1))
)
"""A hill that overlaps that of A, and one where A has its hollow."""
