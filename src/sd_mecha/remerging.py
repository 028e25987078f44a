"""Merging some tensors of a recipe again, to see whether a file has the same bits."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sd_mecha.execution.run import Runner
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue
from sd_mecha.merging import plan, run_options
from sd_mecha.options import MergeOptions
from sd_mecha.resuming import telling
from sd_mecha.storage.buffers import byte_view
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.dtypes import dtype_name
from sd_mecha.storage.folders.joined import copied_tensors
from sd_mecha.storage.gguf.reader import GgufReader
from sd_mecha.storage.gguf.remade import StoredForms
from sd_mecha.storage.memory import MemoryWriter
from sd_mecha.storage.quantised.scaled_fp8 import MARKER, ScaledWriter, find_scales
from sd_mecha.units import such_as

_CHUNK = 1 << 18  # elements; a multiple of every block
_SHOWN = 3


def compare_with_recipe(
    reader: Reader, recipe: RecipeNodeOrValue, sample: int | None, seed: int, options: Mapping[str, Any]
) -> tuple[int, list[str], list[str]]:
    """Merge some tensors of a recipe again and compare their bits with those of a file.

    Names, shapes and dtypes of all tensors are compared as well. Where the options leave it open, the output dtype is
    that of the file, and scaled fp8 if the file is so. Results take the form that a GGUF file stores them in.

    Args:
        reader: the file.
        recipe: what it should be made of.
        sample: how many tensors to merge; None: all.
        seed: what decides which.
        options: as for `merge`, without those of outputs.

    Returns:
        How many tensors were compared; what differs; and what could not be found out.

    Raises:
        MechaError: the recipe cannot be planned or merged.
    """
    checked = MergeOptions().given({**_of_the_file(reader), **options})
    given = {**options, "output_dtype": checked.output_dtype}
    with plan(recipe, **given) as planned:
        sink = _Comparison(reader)
        writer = ScaledWriter(sink) if checked.scaled_fp8 else sink
        writer.declare(planned.outputs[0], {})
        problems = sink.compare_headers()
        keys = list(planned.outputs[0])
        chosen = random.Random(seed)
        alike = [key for key in keys if key in reader.entries and key not in sink.unlike]
        foreign = {key: kind for key in alike if (kind := sink.forms.foreign(key))}
        present = _sample(chosen, [key for key in alike if key not in foreign], sample)
        absent = [k for k in keys if k not in reader.entries]
        probed = _sample(chosen, absent, sample)
        wanted = {*present, *probed}
        programs = [p for p in planned.programs if any(key in wanted for _, key, _ in p.outputs)]
        sink.wanted = wanted | {name for name in sink.entries if name not in planned.outputs[0]}
        done = telling([writer], lambda target, key, nbytes: None)
        Runner(planned, [writer], run_options(checked), done).run(programs)
    problems += sink.differences()
    notes = []
    if checked.output_dtype is None and "output_dtype" not in options and sink.has_other_dtypes:
        notes.append("it does not tell what output_dtype (--dtype) it was merged with: give that")
    if foreign:
        kinds = ", ".join(sorted(set(foreign.values())))
        notes.append(f"{counted(foreign)} in {kinds}, which other programs write, cannot be compared with the recipe")
    if lost := [key for key in present if key in sink.dropped]:
        problems.append(f"the recipe cannot make {counted(lost)} any more, {such_as(lost)}")
    if made := [key for key in probed if key not in sink.dropped]:
        least = "" if len(probed) == len(absent) else "at least "
        problems.append(f"it lacks {least}{counted(made)} that the recipe makes, {such_as(made)}")
    elif len(probed) < len(absent):
        notes.append(f"it lacks {counted(absent)} of the recipe; {len(probed)} of them cannot be made")
    return len(present), problems, notes


class _Comparison(MemoryWriter):
    """Compares each result with a file when it is finished, and lets go of it.

    Attributes:
        entries: what the recipe makes.
        forms: what becomes of it in the file.
        unlike: names whose shape or dtype is another in the file.
        has_other_dtypes: whether that is the dtype of any.
        wanted: names to compare.
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__({})
        self._reader = reader
        self.forms = StoredForms(reader)
        self._lines: dict[str, str] = {}
        self._guard = threading.Lock()
        self.entries: dict[str, TensorEntry] = {}
        self.unlike: set[str] = set()
        self.has_other_dtypes = False
        self.wanted: Collection[str] = ()
        self._compared: set[str] = set()

    @property
    def dropped(self) -> set[str]:
        """What cannot be made; what was let go of after it was compared does not count."""
        return self._dropped - self._compared

    def declare(self, entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> None:
        super().declare(entries, metadata)
        self.entries = dict(entries)

    def compare_headers(self) -> list[str]:
        """What shapes, dtypes and names differ in, in a few lines; names that only the recipe has do not count yet."""
        stored = self._reader.entries
        made = {name: self.forms.entry(name, entry) for name, entry in self.entries.items()}
        unlike = {name: entry for name, entry in made.items() if name in stored and stored[name] != entry}
        self.unlike = set(unlike)
        self.has_other_dtypes = any(stored[name].dtype != entry.dtype for name, entry in unlike.items())
        lines = [
            f"tensor {name!r} is {_shown(stored[name])}; the recipe makes {_shown(entry)}"
            for name, entry in list(unlike.items())[:_SHOWN]
        ]
        if len(unlike) > _SHOWN:
            lines.append(f"... and {len(unlike) - _SHOWN} more are of another shape or dtype")
        copied = copied_tensors(self._reader)
        if extra := [name for name in stored if name not in self.entries and name not in copied]:
            lines.append(f"it has {counted(extra)} that the recipe does not make, {such_as(extra)}")
        return lines

    def finished(self, name: str) -> None:
        """All of that result is there, unless it was dropped."""
        if name in self._dropped:
            return
        self._compared.add(name)
        if name in self.wanted and name in self._reader.entries and name not in self.unlike:
            line = self._compare(name, self.complete(name))
            if line:
                with self._guard:
                    self._lines[name] = line
        self.drop(name)

    def differences(self) -> list[str]:
        """A line for each tensor that differs, in the order of the recipe."""
        return [self._lines[name] for name in self.entries if name in self._lines]

    def _compare(self, name: str, made: torch.Tensor) -> str:
        flat = made.reshape(-1)
        size = self._reader.entries[name].dtype.itemsize
        buffer = torch.empty(min(_CHUNK, made.numel()) * size, dtype=torch.uint8)
        count, first = 0, -1
        for start in range(0, made.numel(), _CHUNK):
            ours = self.forms.values(name, flat[start : start + _CHUNK]).view(torch.uint8)
            part = buffer[: len(ours)]
            self._reader.read_into(name, start * size, byte_view(part))
            if not torch.equal(part, ours):
                unequal = (part != ours).view(-1, size).any(dim=1)
                first = start + int(unequal.int().argmax()) if first < 0 else first
                count += int(unequal.sum())
        if not count:
            return ""
        where = f"{count} of {made.numel()} elements, first element {first}"
        return f"tensor {name!r} is not what the recipe makes: it differs in {where}"


def _of_the_file(reader: Reader) -> dict[str, Any]:
    """Output options that a file was written with, as far as it tells."""
    copied = copied_tensors(reader)
    entries = {name: entry for name, entry in reader.entries.items() if name not in copied}
    scales = find_scales(entries, "") if any(name.rpartition(".")[2] == MARKER for name in entries) else {}
    scaled = {*scales, *scales.values()}
    plain = (e for name, e in entries.items() if name not in scaled and name.rpartition(".")[2] != MARKER)
    dtypes = reader.written_dtypes if isinstance(reader, GgufReader) else set()
    dtypes = dtypes or {entry.dtype for entry in plain if entry.dtype.is_floating_point}
    found: dict[str, Any] = {"output_dtype": next(iter(dtypes)) if len(dtypes) == 1 else None}
    if scales:
        found["scaled_fp8"] = True
    return found


def _sample(chosen: random.Random, keys: Sequence[str], count: int | None) -> list[str]:
    return list(keys) if count is None or count >= len(keys) else chosen.sample(keys, count)


def counted(names: Collection[str]) -> str:
    """How many tensors there are.

    >>> counted(["a"]), counted(["a", "b"])
    ('1 tensor', '2 tensors')
    """
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _shown(entry: TensorEntry) -> str:
    return f"{dtype_name(entry.dtype)} of shape {entry.shape}"
