"""Tensors that state a fact instead of holding weights; averaging them makes no sense."""

from __future__ import annotations

MARKERS = frozenset(
    {
        "v_pred",
        "ztsnr",
        "edm_vpred.sigma_max",
        "edm_vpred.sigma_min",
        "edm_mean",
        "edm_std",
        "scaled_fp8",
        "__index_timestep_zero__",
    }
)
_LAST_PARTS = frozenset({"v_pred", "ztsnr", "scaled_fp8", "__index_timestep_zero__"})


def is_marker(key: str) -> bool:
    """Whether a key names such a tensor, at the top of a state dict or below a prefix."""
    return key in MARKERS or key.rpartition(".")[2] in _LAST_PARTS
