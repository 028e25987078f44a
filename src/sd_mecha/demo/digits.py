"""Handwritten digits, a small network that reads them, and how it is trained and tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd_mecha.errors import MechaError

SEED = 0
HELD_OUT = 600
BATCH = 64
LEARNING_RATE = 2e-3

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Digits:
    """Pictures of 8 x 8 pixels, one a row, and the digit that each shows."""

    pictures: Tensor
    labels: Tensor

    def only(self, low: int, high: int) -> Digits:
        """Those that show a digit from low to high, both included."""
        chosen = (self.labels >= low) & (self.labels <= high)
        return Digits(self.pictures[chosen], self.labels[chosen])


def load() -> tuple[Digits, Digits]:
    """1797 digits written by hand, as those to learn from and those held out for tests.

    Raises:
        MechaError: scikit-learn, which bundles them, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        message = "the demo needs scikit-learn, which bundles its data: pip install 'sd-mecha[demo]'"
        raise MechaError(message) from None
    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    shuffled = Digits(torch.tensor(pictures, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order])
    test = Digits(shuffled.pictures[:HELD_OUT], shuffled.labels[:HELD_OUT])
    train = Digits(shuffled.pictures[HELD_OUT:], shuffled.labels[HELD_OUT:])
    return train, test


def network() -> nn.Module:
    """An untrained network; the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def trained(state: State, digits: Digits, steps: int) -> dict[str, Tensor]:
    """The state after that many steps of training on these digits."""
    net = network()
    net.load_state_dict(state)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    draw = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        batch = torch.randint(len(digits.labels), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(net(digits.pictures[batch]), digits.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def accuracy(state: State, digits: Digits) -> float:
    """The share of these digits that a network with this state reads right."""
    net = network()
    net.load_state_dict({key: value.float() for key, value in state.items()})
    with torch.no_grad():
        return float((net(digits.pictures).argmax(1) == digits.labels).float().mean())
