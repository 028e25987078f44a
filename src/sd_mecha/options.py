"""The options of merging, in one place: `merge()`, `plan()`, `Defaults` and the command line all read them here."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from sd_mecha.errors import OptionError
from sd_mecha.extensions import merge_spaces
from sd_mecha.extensions.merge_spaces import MergeSpace
from sd_mecha.storage.dtypes import parse_dtype
from sd_mecha.units import parse_size

NOT_GIVEN: Any = ...


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        fallback_model: a recipe, model or value from which keys that the recipe cannot make are taken.
        merge_device: where to compute; None: where each tensor is.
        merge_dtype: what to compute in; None: what each tensor is stored in (fp8 in float32).
        output_device: where in-memory results go; None: where they were computed.
        output_dtype: what to write; None: what was computed.
        scaled_fp8: whether to write the matrices of numbered blocks as fp8 with a scale each.
        threads: number of workers; None chooses, 0 works in the calling thread.
        total_buffer_size: bytes of tensors that may be alive at once, an upper bound for all workers together.
        strict_merge_space: the merge space (or spaces) that the result must have; None accepts any.
        strict_mandatory_keys: whether a model that lacks a mandatory key is an error.
        strict_adapters: whether parts of an adapter that change nothing are an error rather than a warning.
        check_extra_keys: whether to warn about keys that the model config does not know.
        check_finite_output: whether to warn about results with inf or nan.
        omit_non_finite_inputs: whether an input tensor with inf or nan counts as missing.
        allow_empty_merge: whether a recipe may make no key at all.
        memoize_intermediates: whether a result that several keys need is kept rather than computed again.
        validate_mm_contract: whether to check that merge methods read and return what they declare.
        cache: {node: object}: what to hand to the merge method of a node as its `cache`.
        tqdm: a class for progress bars, called with `total=` and `desc=`; None shows none.
        output: None: return a new dict; a mutable mapping or a `torch.nn.Module`: fill it; a path: write a file.
        output_format: name of the format to write a path in; None: what its name asks for.
        shard_size: the most bytes of tensors in one file of the output, as a number or such as "5GB"; it then is a
            folder of several files. None: one file, or 5 GB for a folder.
        side_files: path of the model whose configuration, tokenizer and the like go along with the tensors; None: the
            first model of the recipe that has such files.
        resume: whether to go on where an interrupted merge of the same recipe into the same output stopped, and to
            keep what is done when this one is interrupted.
        checksums: whether the output carries a checksum of each of its tensors and of each tensor read for it.
    """

    fallback_model: Any = None
    merge_device: str | torch.device | None = "cpu"
    merge_dtype: torch.dtype | str | None = torch.float32
    output_device: str | torch.device | None = "cpu"
    output_dtype: torch.dtype | str | None = torch.float16
    scaled_fp8: bool = False
    threads: int | None = None
    total_buffer_size: int = 2**28
    strict_merge_space: Any = "weight"
    strict_mandatory_keys: bool = False
    strict_adapters: bool = False
    check_extra_keys: bool = True
    check_finite_output: bool = True
    omit_non_finite_inputs: bool = True
    allow_empty_merge: bool = False
    memoize_intermediates: bool = True
    validate_mm_contract: bool = True
    cache: Mapping[Any, Any] | None = None
    tqdm: Any = NOT_GIVEN
    output: Any = None
    output_format: str | None = None
    shard_size: int | str | None = None
    side_files: str | os.PathLike[str] | None = None
    resume: bool = False
    checksums: bool = False

    def given(self, options: Mapping[str, Any]) -> MergeOptions:
        """These options with those of `options` that are not `...`.

        Raises:
            OptionError: an option is unknown, or its value is out of range.
        """
        known = {f.name for f in fields(self)}
        if unknown := options.keys() - known:
            raise OptionError(f"unknown option {min(unknown)!r}; known are {', '.join(sorted(known))}")
        return replace(self, **{k: v for k, v in options.items() if v is not ...}).checked()

    def checked(self) -> MergeOptions:
        """These options with dtypes and devices resolved.

        Raises:
            OptionError: a value is out of range, or a device is not there.
        """
        if self.threads is not None and (type(self.threads) is not int or self.threads < 0):
            raise OptionError(f"threads must be a non-negative integer or None, got {self.threads!r}")
        if isinstance(self.total_buffer_size, bool) or not isinstance(self.total_buffer_size, int | float):
            raise OptionError(f"total_buffer_size must be a number of bytes, got {self.total_buffer_size!r}")
        if not 0 <= self.total_buffer_size < math.inf:
            raise OptionError(f"total_buffer_size must be finite and not negative, got {self.total_buffer_size}")
        if self.cache is not None and not isinstance(self.cache, Mapping):
            raise OptionError(f"cache must map recipe nodes to objects, got a {type(self.cache).__name__}")
        if not (self.tqdm is None or self.tqdm is ... or callable(self.tqdm)):
            raise OptionError(f"tqdm must be a class of progress bars or None, got a {type(self.tqdm).__name__}")
        for name in ("resume", "checksums"):
            if type(getattr(self, name)) is not bool:
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, kinds in (("side_files", str | os.PathLike), ("output_format", str)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise OptionError(f"{name} must be text or None, got a {type(value).__name__}")
        return replace(
            self,
            shard_size=_shard_size(self.shard_size),
            merge_device=_compute_device(self.merge_device),
            output_device=_device(self.output_device, "output_device"),
            merge_dtype=parse_dtype(self.merge_dtype),
            output_dtype=parse_dtype(self.output_dtype),
            total_buffer_size=int(self.total_buffer_size),
        )

    @property
    def device(self) -> torch.device | None:
        """Where to compute."""
        return None if self.merge_device is None else torch.device(self.merge_device)

    @property
    def dtype(self) -> torch.dtype | None:
        """What to compute in."""
        return parse_dtype(self.merge_dtype)

    def workers(self) -> int:
        """How many worker threads to start; 0 is the calling thread."""
        return min(os.cpu_count() or 1, 8) if self.threads is None else self.threads

    def root_spaces(self) -> frozenset[MergeSpace] | None:
        """The merge spaces that the result may have; None: any."""
        wanted = self.strict_merge_space
        if wanted is None:
            return None
        if isinstance(wanted, str | MergeSpace) or not isinstance(wanted, Iterable):
            wanted = (wanted,)
        return frozenset(merge_spaces.resolve(s) for s in wanted)


def _shard_size(size: int | str | None) -> int | None:
    if isinstance(size, str):
        try:
            size = parse_size(size)
        except ValueError as error:
            raise OptionError(f"shard_size: {error}") from error
    if size is not None and (type(size) is not int or size <= 0):
        raise OptionError(f"shard_size must be a positive number of bytes or such as '5GB', got {size!r}")
    return size


def _device(device: str | torch.device | None, option: str) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"{option}={device!r} is not a device; expected for example 'cpu' or 'cuda:0'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"{option}={str(device)!r}: this torch sees no CUDA device; use 'cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"{option}={str(device)!r}: there are {torch.cuda.device_count()} CUDA devices")
    if found.type == "meta":
        raise OptionError(f"{option}={str(device)!r}: the meta device holds no values")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise OptionError(f"{option}={str(device)!r}: this torch cannot use it; use 'cpu'") from error
    return found


def _compute_device(device: str | torch.device | None) -> torch.device | None:
    found = _device(device, "merge_device")
    if found is not None and found.type not in ("cpu", "cuda"):
        raise OptionError(f"merge_device={str(device)!r}: merges run on 'cpu' or 'cuda'")
    return found
