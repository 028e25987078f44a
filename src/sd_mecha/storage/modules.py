"""A `torch.nn.Module` as the destination of a merge: results go straight into its parameters and buffers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from sd_mecha.errors import OutputError, ShapeError
from sd_mecha.storage.contract import TensorEntry
from sd_mecha.storage.dtypes import dtype_name, is_integral
from sd_mecha.storage.memory import MemoryWriter
from sd_mecha.units import such_as

_SHOWN = 3
_logger = logging.getLogger("sd_mecha")


class ModuleWriter:
    """Copies each result into the parameter or buffer of its name, on whose device and in whose dtype it ends up.

    The names are those of the module's state dict, and the result must have all of them and no other, as
    `load_state_dict(strict=True)` asks. Where several names stand for one tensor, as tied weights do, one of them is
    enough, and the first counts. Where one was dropped, commit fails. Whether a parameter requires a gradient stays as
    it is. A module keeps no metadata.

    A tensor is copied when it is finished, so that no more is in memory than what is being computed. A failure then
    leaves some parameters merged and some not, which is said in a warning.

    Args:
        module: where results go.
        inputs: the tensors in memory that the merge reads. If it reads from memory of the module, every result is held
            until commit, so that no input changes under it.
    """

    def __init__(self, module: torch.nn.Module, inputs: Iterable[Tensor] = ()) -> None:
        self._module = module
        self._inputs = list(inputs)
        self._hold = False
        self.name = f"module {type(module).__name__}"
        self._targets: dict[str, Tensor] = {}
        self._buffers = MemoryWriter({})
        self._left: set[str] = set()
        self._dropped: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._copied: set[str] = set()

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        """Compare names, shapes and dtypes with those of the module.

        Raises:
            OutputError: a name is missing on one side, or a tensor of the module cannot be written into.
            ShapeError: a shape differs.
        """
        targets = writable_tensors(self._module, self.name)
        spellings = _spellings(targets)
        self._check_names(entries, targets, spellings)
        self._check_tensors(entries, targets)
        for names in spellings.values():
            first = next((name for name in names if name in entries), None)
            if first is not None:
                self._targets[first] = targets[first]
        self._hold = share_memory(targets.values(), self._inputs)
        for device in {target.device for target in targets.values() if target.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # what was asked of the module before is still done with it
        self._left = set(entries)
        self._buffers.declare(entries, {})

    def write(self, name: str, start: int, buffer: memoryview) -> None:
        """Keep the buffer as the bytes of that result from byte `start` on."""
        self._buffers.write(name, start, buffer)

    def drop(self, name: str) -> None:
        """State that the module gets nothing under that name."""
        self._dropped.add(name)
        self._let_go(name)

    def finished(self, name: str) -> None:
        """Copy that result, which is complete, into the module, or hold it; a dropped one is none."""
        if name not in self._left:
            return
        result, target = self._buffers.complete(name), self._targets.get(name)
        self._let_go(name)
        if target is None:  # another name of the tensor counts
            return
        if self._hold:
            self._held[name] = result.to(target.dtype)
        else:
            self._copy(name, result)

    def commit(self) -> None:
        """Copy what is not in the module yet.

        Raises:
            OutputError: a result is incomplete or was dropped, or a tensor of the module cannot be written into.
        """
        if lost := [name for name in self._targets if name in self._dropped]:
            raise OutputError(
                f"output {self.name}: {len(lost)} of its {len(self._targets)} tensors got no result, {such_as(lost)}, "
                "as they were left out while merging; give another model that has them, such as fallback_model=, or "
                "merge into a dict"
            )
        for name in self._left:
            self._buffers.complete(name)
        for name in list(self._left):
            self.finished(name)
        while self._held:
            self._copy(*self._held.popitem())
        self._copied = set()
        self.abort()

    def abort(self) -> None:
        """Let go of what is not in the module. Harmless after commit or a second time."""
        if self._copied:
            _logger.warning(
                "output %s: the merge ended early: %d of its %d tensors are merged, the others as they were",
                self.name, len(self._copied), len(self._targets),
            )  # fmt: skip
        self._copied = set()
        self._left, self._held = set(), {}
        self._buffers.abort()

    def _let_go(self, name: str) -> None:
        self._buffers.drop(name)
        self._left.discard(name)

    def _copy(self, name: str, result: Tensor) -> None:
        self._copied.add(name)
        try:
            with torch.no_grad():
                self._targets[name].copy_(result)
        except RuntimeError as error:
            raise OutputError(f"output {self.name}: {name!r} cannot be written into: {error}") from error

    def _check_names(
        self, entries: Mapping[str, TensorEntry], targets: Mapping[str, Tensor], spellings: Mapping[object, list[str]]
    ) -> None:
        unknown = [name for name in entries if name not in targets]
        missing = [names[0] for names in spellings.values() if not any(name in entries for name in names)]
        parts = []
        if unknown:
            parts.append(f"the module lacks {len(unknown)} keys of the result, {such_as(unknown)}")
        if missing:
            parts.append(f"the result lacks {len(missing)} keys of the module, {such_as(missing)}")
        if parts:
            raise OutputError(
                f"output {self.name}: {'; '.join(parts)}; merge models that have its keys, "
                "all of them and no other, or merge into a dict"
            )

    def _check_tensors(self, entries: Mapping[str, TensorEntry], targets: Mapping[str, Tensor]) -> None:
        shapes = []
        for name, entry in entries.items():
            target = targets[name]
            if tuple(target.shape) != entry.shape:
                shapes.append(f"{name!r} has shape {tuple(target.shape)}, the result {entry.shape}")
            elif _loses(entry.dtype, target.dtype):
                raise OutputError(
                    f"output {self.name}: {name!r} is {dtype_name(target.dtype)} and cannot hold a result in "
                    f"{dtype_name(entry.dtype)}; merge into a path or a dict instead"
                )
        if shapes:
            more = [f"... and {len(shapes) - _SHOWN} more"] if len(shapes) > _SHOWN else []
            raise ShapeError([f"output {self.name}: {line}" for line in shapes[:_SHOWN]] + more)


def writable_tensors(module: torch.nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module by the keys of its state dict, themselves.

    Args:
        module: the module.
        name: what messages call it.

    Raises:
        OutputError: a key of the state dict stands for something else, or for a tensor without data.
    """
    own = {id(t) for t in [*module.parameters(), *module.buffers()]}
    found = {}
    for key, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):  # extra state
            continue
        if is_lazy(value) or value.is_meta:
            step = "run it once" if is_lazy(value) else "give it memory with to_empty()"
            raise OutputError(f"output {name}: {key!r} has no data yet; {step} before merging into it")
        if id(value) not in own or value.layout is not torch.strided:
            raise OutputError(
                f"output {name}: {key!r} is no dense parameter or buffer, but one that it makes for its state dict; "
                "merge into a dict and use load_state_dict() instead"
            )
        found[key] = value
    return found


def share_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether writing into some tensors may change others, whatever views they are of each other's memory.

    >>> a = torch.zeros(4)
    >>> share_memory([a[:2]], [a[2:]]), share_memory([a], [a.clone()])
    (True, False)
    """
    ranges = sorted(_range(t) for t in others if t.numel() and not t.is_meta)
    spans = sorted(_range(t) for t in some if t.numel() and not t.is_meta)
    i = 0
    for device, start, end in spans:
        while i < len(ranges) and (ranges[i][0], ranges[i][2]) <= (device, start):
            i += 1
        if i < len(ranges) and ranges[i][0] == device and ranges[i][1] < end:
            return True
    return False


def _range(tensor: Tensor) -> tuple[str, int, int]:
    """Where the memory lies that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return str(tensor.device), storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _spellings(targets: Mapping[str, Tensor]) -> dict[object, list[str]]:
    """The names of each tensor; tied weights have several."""
    found: dict[object, list[str]] = {}
    for name, tensor in targets.items():
        same: object = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        found.setdefault(same if tensor.numel() else id(tensor), []).append(name)
    return found


def _loses(result: torch.dtype, target: torch.dtype) -> bool:
    """Whether results of that dtype would be cut, not rounded, to the other."""
    if result.is_complex:
        return not target.is_complex
    if not is_integral(target):
        return False
    if not is_integral(result) or target is torch.bool:
        return result is not torch.bool
    if result is torch.bool:
        return False
    have, room = torch.iinfo(result), torch.iinfo(target)
    return have.min < room.min or have.max > room.max
