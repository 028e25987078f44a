"""The best one-to-one match between two lists of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_mecha.errors import MechaError, ParameterError


def best_match(scores: Tensor) -> Tensor:
    """The permutation of largest total: row i of a square matrix is matched with column `result[i]`.

    Rows whose best columns all differ are a match already, which is how models of one ancestor mostly are; scipy is
    needed for the others only.

    Raises:
        ParameterError: the scores are not finite.
        MechaError: scipy is needed and not installed.

    >>> best_match(torch.tensor([[5.0, 4.0], [4.0, 1.0]])).tolist()
    [1, 0]
    """
    if not bool(scores.isfinite().all()):
        raise ParameterError("rebasin: channels cannot be compared, as a model holds NaN or infinity; mend it first")
    best = scores.argmax(1)
    if bool((torch.bincount(best, minlength=len(best)) == 1).all()):
        return best
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        message = "rebasin needs scipy to match these models: pip install 'sd-mecha[permutations]'"
        raise MechaError(message) from None
    _, columns = linear_sum_assignment(scores.to("cpu", torch.float64).numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=best.dtype, device=best.device)
