"""How much of a matrix an adapter keeps: by number, or by the share of its size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sd_mecha.builtin.methods.common import check_range
from sd_mecha.errors import ParameterError


@dataclass(frozen=True)
class RankRule:
    """Which singular values of each matrix are kept, from the largest one on.

    Attributes:
        rank: at most so many.
        conv_rank: the same for kernels of more than one element; None: as `rank`.
        share: as few as together make this share of the sum of their squares; None: as many as `rank` allows.
    """

    rank: int | None
    conv_rank: int | None
    share: float | None

    def most(self, full: int, kernel: bool) -> int:
        """How many may be kept of so many; `kernel` says whether the matrix is a kernel of more than one element."""
        wanted = self.conv_rank if kernel and self.conv_rank is not None else self.rank
        return full if wanted is None else min(wanted, full)

    def enough(self, squares: Tensor, total: float) -> int | None:
        """How many of the leading values are enough for the share; None where all of them are too few.

        Args:
            squares: of the leading singular values, in descending order.
            total: the sum of the squares of all of them.
        """
        assert self.share is not None
        # sums that are rounded in another order must not ask for one value more
        reached = squares.double().cumsum(0) >= self.share * total * (1 - 1e-9)
        return int(reached.int().argmax()) + 1 if bool(reached.any()) else None

    def choose(self, values: Tensor, total: float, kernel: bool) -> int:
        """How many of these singular values are kept, at least 1."""
        most = self.most(len(values), kernel)
        if self.share is None:
            return most
        return max(min(self.enough(values.double() ** 2, total) or most, most), 1)


def rank_rule(
    caller: str, rank: int | None, conv_rank: int | None, energy: float | None, frobenius: float | None
) -> RankRule | None:
    """The rule that these arguments stand for; None if none of them is given.

    Args:
        caller: of whose arguments messages speak.
        energy: share of the sum of squares of the singular values.
        frobenius: share of the Frobenius norm, that is the root of the other share.

    Raises:
        ParameterError: a number is out of range, or both shares are given.
    """
    for name, number in (("rank", rank), ("conv_rank", conv_rank)):
        if number is not None:
            if not isinstance(number, int) or isinstance(number, bool):
                raise ParameterError(f"{caller}: {name} is {number!r}; expected a whole number of at least 1")
            check_range(caller, name, number, 1)
    for name, share in (("energy", energy), ("frobenius", frobenius)):
        if share is not None:
            check_range(caller, name, share, 0, 1)
    if energy is not None and frobenius is not None:
        raise ParameterError(f"{caller}: got both energy and frobenius; frobenius is the root of energy: give one")
    if (rank, conv_rank, energy, frobenius) == (None,) * 4:
        return None
    return RankRule(rank, conv_rank, energy if frobenius is None else frobenius**2)


def check_rank_fits(caller: str, rule: RankRule | None, largest: int) -> None:
    """Refuse a rank that no matrix has.

    Args:
        largest: the smaller side of the matrix that has the largest one.

    Raises:
        ParameterError: it is larger than that.
    """
    if rule is not None and rule.share is None and rule.rank is not None and rule.rank > largest:
        raise ParameterError(
            f"{caller}: rank is {rule.rank}; no matrix has more than {largest}: a full change would be smaller. "
            f"Expected at most {largest}, or a share such as energy=0.95"
        )
