"""The laws that merge methods hold or break: each a question to a row of the table, and when it makes sense.

A law gets a row and as many tensors of one shape as the row takes, and asserts that the method obeys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.methods.laws import assert_close
from tests.methods.row import Row

Tensors = list[Tensor]


@dataclass(frozen=True)
class Law:
    check: Callable[[Row, Tensors], None]
    applies: Callable[[Row], bool]


def _copies(row: Row, models: Tensors) -> None:
    """Equal models are merged to that model; a base does not matter."""
    given = [models[0]] * len(models)
    if row.based:
        given = [models[0], *[models[1]] * (len(models) - 1)]
    assert_close(row(*given), given[-1], row.tolerance)


def _order(row: Row, models: Tensors) -> None:
    """The order of models does not matter."""
    fixed = int(row.based)
    own = models[fixed:]
    turned = [*models[:fixed], *own[1:], own[0]]
    assert_close(row(*turned), row(*models), row.tolerance)


def _backwards(row: Row, models: Tensors) -> None:
    """Changing places is turning alpha around."""
    alpha = row.options["alpha"]
    assert_close(row(models[1], models[0], alpha=1 - alpha), row(*models), row.tolerance)


def _shift(row: Row, models: Tensors) -> None:
    """What is added to all weights is added to a result that is weights, and does not change a difference."""
    shift = (models[0].flatten().flip(0) * 0.7 + 0.3).reshape(models[0].shape)
    moved = [m + shift if space == "weight" else m for m, space in zip(models, row.spaces, strict=True)]
    expected = row(*models)
    if row.result == "weight":
        assert expected.shape == shift.shape
        expected = expected.to(shift) + shift
    assert_close(row(*moved).to(expected), expected, row.tolerance)


def _scale(row: Row, models: Tensors) -> None:
    """A factor to all models is a factor to the result; parameters do not depend on it."""
    expected = row(*models).to(torch.float64)
    expected = expected if row.result == "param" else expected * 3.5
    assert_close(row(*(m * 3.5 for m in models)).to(expected), expected, row.tolerance)


def _odd(row: Row, models: Tensors) -> None:
    """Neither sign is preferred."""
    expected = row(*models)
    assert_close(row(*(-m for m in models)), expected if row.result == "param" else -expected, row.tolerance)


def _zeros(row: Row, models: Tensors) -> None:
    """Of nothing comes nothing."""
    assert not row(*(torch.zeros_like(m) for m in models)).any()


def _rows(row: Row, models: Tensors) -> None:
    """Neurons have no order: what is exchanged in all models is exchanged in the result."""
    _permuted(row, models, 0)


def _columns(row: Row, models: Tensors) -> None:
    """Nor have the inputs of a layer."""
    _permuted(row, models, 1)


def _permuted(row: Row, models: Tensors, dim: int) -> None:
    shape = models[0].shape
    if len(shape) <= dim:
        return
    order = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(1))
    expected = row(*models)
    if expected.dim() > 0:  # not one number for the whole tensor
        assert expected.shape == shape
        expected = expected.index_select(dim, order)
    assert_close(row(*(m.index_select(dim, order) for m in models)), expected, row.tolerance)


def _idempotent(row: Row, models: Tensors) -> None:
    """Doing it again changes nothing."""
    once = row(*models)
    assert once.shape == models[0].shape
    assert_close(row(once, *models[1:]), once, row.tolerance)


def _between(row: Row, models: Tensors) -> None:
    """Each weight stays in the range of that weight in the inputs."""
    all_of_them, got = torch.stack(models), row(*models)
    assert got.shape == models[0].shape
    low, high = all_of_them.amin(0), all_of_them.amax(0)
    slack = row.tolerance * (1 + all_of_them.abs().amax(0))
    assert bool(((got >= low - slack) & (got <= high + slack)).all())


def _length(row: Row, models: Tensors) -> None:
    """The length of the result is between those of the inputs, as alpha says."""
    a, b = models
    lengths, alpha = (float(a.norm()), float(b.norm())), row.options["alpha"]
    if abs(float((a * b).sum())) < 0.9 * lengths[0] * lengths[1]:  # an angle, and not in a direction of its own
        expected = (1 - alpha) * lengths[0] + alpha * lengths[1]
        assert abs(float(row(a, b).norm()) - expected) < row.tolerance * (1 + expected)


def _bystander(row: Row, models: Tensors) -> None:
    """A model that learnt nothing has no say."""
    nothing = models[0] if row.based else torch.zeros_like(models[0])
    assert_close(row(*models, nothing), row(*models), row.tolerance)


def _robust(row: Row, models: Tensors) -> None:
    """One model that is far off does not move the result far from all others."""
    centre = models[0]
    if centre.numel() == 0:
        return
    good = [centre + 0.01 * models[-1] * i for i in (1, 2, 3, 4)]
    outlier = 1e5 * (models[1].abs() + 1)
    got = row(*([centre] if row.based else []), *good, outlier)
    assert got.shape == centre.shape
    assert bool(((got - centre).abs() <= 0.1 * (1 + models[-1].abs().amax())).all())


def _agreement(row: Row, models: Tensors) -> None:
    """Where all models agree about the sign, the result is their mean."""
    positive = [m.abs() + 0.1 for m in models[int(row.based) :]]
    assert_close(row(*_with_base(row, positive)), torch.stack(positive).mean(0), row.tolerance)


def _disjoint(row: Row, models: Tensors) -> None:
    """What each model changes elsewhere adds up."""
    own = models[int(row.based) :]
    index = torch.arange(own[0].numel()).reshape(own[0].shape) % len(own)
    parts = [torch.where(index == i, m, 0.0) for i, m in enumerate(own)]
    assert_close(row(*_with_base(row, parts)), torch.stack(parts).sum(0), row.tolerance)


def _with_base(row: Row, models: Tensors) -> Tensors:
    return [torch.zeros_like(models[0]), *models] if row.based else models


def _always(_row: Row) -> bool:
    return True


def _interchangeable(row: Row) -> bool:
    return len(row.spaces) > 1 and len({*row.spaces}) == 1


def _interpolates(row: Row) -> bool:
    return len(row.spaces) == 2 and "alpha" in row.options and row.of_one_kind


LAWS = {
    "copies": Law(_copies, lambda row: row.of_one_kind),
    "order": Law(_order, _interchangeable),
    "backwards": Law(_backwards, _interpolates),
    "length": Law(_length, _interpolates),
    "shift": Law(_shift, lambda row: "weight" in row.spaces),
    "scale": Law(_scale, _always),
    "odd": Law(_odd, _always),
    "zeros": Law(_zeros, _always),
    "rows": Law(_rows, _always),
    "columns": Law(_columns, _always),
    "idempotent": Law(_idempotent, lambda row: row.result == row.spaces[0]),
    "between": Law(_between, lambda row: row.of_one_kind and len(row.spaces) > 1),
    "bystander": Law(_bystander, lambda row: row.variadic),
    "robust": Law(_robust, lambda row: row.variadic),
    "agreement": Law(_agreement, lambda row: row.variadic),
    "disjoint": Law(_disjoint, lambda row: row.variadic),
}
