"""From a delta to a LoRA or LoKr file that holds the nearest thing to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_mecha.builtin.configs.loras import BASES, PREFIXES, modules
from sd_mecha.builtin.methods.common import check_range
from sd_mecha.builtin.methods.kronecker import factor_shape, kronecker_factors
from sd_mecha.builtin.methods.svd import as_matrix, cache_entry, leading_vectors, matrix_shape
from sd_mecha.extensions import model_configs
from sd_mecha.extensions.merge_methods import MergeMethod, Parameter, Return, StateDict, merge_method


@merge_method(is_interface=True)
def extract_kohya_lora(
    base: Parameter(Tensor, "delta"),
    rank: Parameter(int) = 8,
    use_approximate_basis: Parameter(bool) = True,
    approximate_basis_iters: Parameter(int) = 2,
    approximate_basis_seed: Parameter(int) = None,
) -> Return(StateDict[Tensor], "weight"):
    """Extract a LoRA from a delta, by the names of kohya-ss.

    Formula: `up = u[:, :r] sqrt(s[:r])`, `down = sqrt(s[:r]) vh[:r]` of the singular value decomposition of each
    matrix or kernel, flattened to `shape[0]` rows; `alpha = r`, so that the product counts once.

    Args:
        base: a delta in a layout of kohya-ss, for instance `convert(a - b, "sdxl-kohya")`. Biases and norms have no
            place in a LoRA.
        rank: at least 1; how many singular values are kept, for small tensors no more than they have.
        use_approximate_basis: find the leading vectors by a randomised subspace iteration instead of a full
            decomposition; much faster at low rank.
        approximate_basis_iters: at least 0; rounds of that iteration. More are more accurate.
        approximate_basis_seed: draws the `rank` random vectors of the iteration; without one, a fixed set of 24
            more is used, which is more accurate.

    Use when: a fine-tune should be shared as a small file, or added to other models at will.
    Cost: whole tensor; as `truncate_rank`. With a `cache`, decompositions are kept and reused.
    Source: Eckart & Young 1936; extraction as in kohya-ss/sd-scripts.

    >>> len(extract_kohya_lora.interface.candidates)
    3
    """


@merge_method(is_interface=True)
def extract_lycoris_lora(
    base: Parameter(Tensor, "delta"),
    rank: Parameter(int) = 8,
    use_approximate_basis: Parameter(bool) = True,
    approximate_basis_iters: Parameter(int) = 2,
    approximate_basis_seed: Parameter(int) = None,
) -> Return(StateDict[Tensor], "weight"):
    """Extract a LoRA from a delta, by the names of LyCORIS.

    Formula: as `extract_kohya_lora`; the names alone differ.

    Args:
        base: a delta in a layout of kohya-ss, for instance `convert(a - b, "sdxl-kohya")`.
        rank: at least 1; how many singular values are kept.
        use_approximate_basis: find the leading vectors by a randomised subspace iteration.
        approximate_basis_iters: at least 0; rounds of that iteration.
        approximate_basis_seed: draws the random vectors of the iteration.

    Use when: the program that reads the file expects names of LyCORIS.
    Cost: whole tensor; as `truncate_rank`. With a `cache`, decompositions are kept and reused.
    Source: Eckart & Young 1936.

    >>> len(extract_lycoris_lora.interface.candidates)
    3
    """


@merge_method(is_interface=True)
def extract_kohya_lokr(base: Parameter(Tensor, "delta"), kronecker_ratio: Parameter(float) = 0.5) -> Return(
    StateDict[Tensor], "weight"
):
    """Extract a LoKr from a delta, by the names of kohya-ss.

    Formula: the `w1`, `w2` that minimise `|base - kron(w1, w2)|` for each matrix or kernel, as `truncate_kronecker`
    finds them with its defaults.

    Args:
        base: a delta in a layout of kohya-ss, for instance `convert(a - b, "sdxl-kohya")`. Biases and norms have no
            place in a LoKr.
        kronecker_ratio: in [0, 1]; `w1` has about `n ** kronecker_ratio` of the n entries, `w2` the rest. Near 0.5
            the file is smallest.

    Use when: a file should be smaller than a LoRA of rank 1, or full in rank where a LoRA is not.
    Cost: whole tensor; as `truncate_kronecker`. With a `cache`, the factors are kept and reused.
    Source: Van Loan & Pitsianis 1993; Yeh et al., arXiv 2309.14859.

    >>> len(extract_kohya_lokr.interface.candidates)
    3
    """


@merge_method(is_interface=True)
def extract_lycoris_lokr(base: Parameter(Tensor, "delta"), kronecker_ratio: Parameter(float) = 0.5) -> Return(
    StateDict[Tensor], "weight"
):
    """Extract a LoKr from a delta, by the names of LyCORIS.

    Formula: as `extract_kohya_lokr`; the names alone differ.

    Args:
        base: a delta in a layout of kohya-ss, for instance `convert(a - b, "sdxl-kohya")`.
        kronecker_ratio: in [0, 1]; `w1` has about `n ** kronecker_ratio` of the n entries, `w2` the rest.

    Use when: the program that reads the file expects names of LyCORIS.
    Cost: whole tensor; as `truncate_kronecker`. With a `cache`, the factors are kept and reused.
    Source: Van Loan & Pitsianis 1993; Yeh et al., arXiv 2309.14859.

    >>> len(extract_lycoris_lokr.interface.candidates)
    3
    """


def lora_factors(
    base: Tensor, rank: int, approximate: bool, iters: int, seed: int | None, context: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """`up`, `down` and `alpha` of a matrix or a kernel.

    Raises:
        ParameterError: the rank is less than 1, or the rounds are less than 0.
    """
    check_range("LoRA extraction", "rank", rank, 1)
    check_range("LoRA extraction", "approximate_basis_iters", iters, 0)
    rank = min(rank, *matrix_shape(base))
    u, s, vh = leading_vectors(as_matrix(base), rank, approximate, iters, seed, cache_entry(context))
    root = s.sqrt()
    kernel = base.shape[2:]
    up = (u * root).to(base.dtype).reshape(base.shape[0], rank, *[1] * len(kernel))
    down = (root[:, None] * vh).to(base.dtype).reshape(rank, base.shape[1], *kernel)
    return up, down, torch.tensor(float(rank), dtype=base.dtype, device=base.device)


def lokr_factors(base: Tensor, ratio: float, context: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`w1`, `w2` and `alpha` of a matrix or a kernel; the first has no part in the kernel.

    The alpha is for programs that insist on one: two whole factors have no rank that it could be relative to.

    Raises:
        ParameterError: the ratio is outside of [0, 1].
    """
    check_range("LoKr extraction", "kronecker_ratio", ratio, 0, 1)
    matrix = as_matrix(base)
    shape = factor_shape(base.shape[0], base.shape[1], matrix.shape[1] // base.shape[1], ratio)
    w1, w2 = kronecker_factors(matrix, shape, True, 2, None, cache_entry(context))
    w2 = w2.reshape(base.shape[0] // shape[0], base.shape[1] // shape[1], *base.shape[2:])
    return w1.to(base.dtype), w2.to(base.dtype), torch.ones((), dtype=base.dtype, device=base.device)


def _map(builder: Any, base: str, prefix: str, factors: tuple[str, ...]) -> None:
    for key, module in modules(model_configs.resolve(base), prefix).items():
        builder[tuple(f"{module}.{factor}" for factor in factors)] = builder.keys[key]


def _lora(interface: MergeMethod, base: str, kind: str) -> None:
    """Declare the extraction of a LoRA of one kind from deltas of one layout."""

    @merge_method(identifier=f"extract_lora_'{base}_{kind}'", implements=interface, cache_factory=dict)
    class extract_lora:
        """Extract a LoRA from a delta; see `extract_kohya_lora`."""

        @staticmethod
        def map_keys(builder: Any) -> None:
            _map(builder, base, PREFIXES[kind], ("lora_up.weight", "lora_down.weight", "alpha"))

        def __call__(
            self,
            base: Tensor,
            rank: int,
            use_approximate_basis: bool,
            approximate_basis_iters: int,
            approximate_basis_seed: int | None = None,
            **kwargs: Any,
        ) -> dict[str, Tensor]:
            found = lora_factors(
                base, rank, use_approximate_basis, approximate_basis_iters, approximate_basis_seed, kwargs
            )
            return dict(zip(kwargs["key_relation"].outputs, found, strict=True))

        # set here because names of this function cannot stand in the annotations above
        __call__.__annotations__ |= {
            "base": Parameter(Tensor, "delta", base),
            "rank": Parameter(int, model_config=base),
            "use_approximate_basis": Parameter(bool, model_config=base),
            "approximate_basis_iters": Parameter(int, model_config=base),
            "approximate_basis_seed": Parameter(int, model_config=base),
            "return": Return(StateDict[Tensor], "weight", f"{base}_{kind}"),
        }


def _lokr(interface: MergeMethod, base: str, kind: str) -> None:
    """Declare the extraction of a LoKr of one kind from deltas of one layout."""

    @merge_method(identifier=f"extract_lokr_'{base}_{kind}'", implements=interface, cache_factory=dict)
    class extract_lokr:
        """Extract a LoKr from a delta; see `extract_kohya_lokr`."""

        @staticmethod
        def map_keys(builder: Any) -> None:
            _map(builder, base, PREFIXES[kind], ("lokr_w1", "lokr_w2", "alpha"))

        def __call__(self, base: Tensor, kronecker_ratio: float, **kwargs: Any) -> dict[str, Tensor]:
            return dict(zip(kwargs["key_relation"].outputs, lokr_factors(base, kronecker_ratio, kwargs), strict=True))

        __call__.__annotations__ |= {
            "base": Parameter(Tensor, "delta", base),
            "kronecker_ratio": Parameter(float, model_config=base),
            "return": Return(StateDict[Tensor], "weight", f"{base}_{kind}"),
        }


for _base in BASES:
    _lora(extract_kohya_lora, _base, "kohya_lora")
    _lora(extract_lycoris_lora, _base, "lycoris_lora")
    _lokr(extract_kohya_lokr, _base, "kohya_lora")
    _lokr(extract_lycoris_lokr, _base, "lycoris_lora")
