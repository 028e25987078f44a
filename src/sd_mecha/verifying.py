"""Checking a model file: is it whole, are its values finite, is it what its checksums and its recipe say?"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sd_mecha.checksums import ALGORITHM, CHECKSUMS_KEY, Checksums, digests, in_parallel, parts
from sd_mecha.errors import FileFormatError, MechaError, ModelNotFoundError, OptionError, UnknownFormatError
from sd_mecha.execution.lane import is_finite
from sd_mecha.extensions import model_dirs, model_formats
from sd_mecha.options import MergeOptions
from sd_mecha.outputs import RECIPE_KEY
from sd_mecha.planning.opening import open_models
from sd_mecha.recipes.building import model
from sd_mecha.recipes.nodes import ModelRecipeNode, RecipeNode
from sd_mecha.recipes.walk import toposort
from sd_mecha.remerging import compare_with_recipe, counted
from sd_mecha.serialization import deserialize, deserialize_path
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.dtypes import FLOAT4, is_integral
from sd_mecha.storage.folders.joined import copied_tensors, lost_components
from sd_mecha.storage.folders.pipelines import absent_components, is_pipeline, pipeline_folder, unconfigured_components
from sd_mecha.storage.folders.sharded import is_known_weights
from sd_mecha.storage.locations import LocalLocation, Location, is_address
from sd_mecha.units import format_size, such_as

EMBEDDED = "embedded"
"""What `against` takes for the recipe in the metadata of the file."""

_OUTPUTS = ("output", "output_device", "output_format", "shard_size", "side_files", "resume", "checksums", "tqdm")


@dataclass
class Report:
    """What was found out about a file; printing it says it.

    Attributes:
        name: the file.
        tensors: how many it has.
        nbytes: how many bytes they have.
        non_finite: for each tensor with inf or nan, how many of its values are so.
        compared: how many tensors were merged again.
        problems: what is wrong, a line each.
        notes: what was checked, and what could not be.
    """

    name: str
    tensors: int = 0
    nbytes: int = 0
    non_finite: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        found = "sound" if self.ok else f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        size = f"{self.tensors} tensor{'s' * (self.tensors != 1)}, {format_size(self.nbytes)}"
        lines = [f"  {note}" for note in self.notes] + [f"  problem: {problem}" for problem in self.problems]
        return "\n".join([f"{self.name}: {found} ({size})", *lines])


def verify(
    path: str | os.PathLike[str],
    *,
    against: RecipeNode | str | os.PathLike[str] | None = None,
    sample: int | None = 16,
    seed: int | None = None,
    allow_non_finite: bool = False,
    inputs: bool = True,
    **options: Any,
) -> Report:
    """Check a model of any format that can be read: structure, values, checksums, and whether a recipe makes it.

    Every tensor is read once, through a small buffer. Checksums are compared where the metadata holds some: those of
    the tensors, and those of the models that it was made from, where these are still found on this computer.

    Args:
        path: a file or a folder, found as those of recipes are, or an address.
        against: a recipe, the path of a `.mecha` file, or "embedded" for the recipe in the metadata of the file: some
            tensors are merged again, and their bits compared. On other hardware, or with another version of PyTorch,
            bits may differ although the recipe is the right one.
        sample: how many tensors to merge again, chosen at random; None: all.
        seed: what decides which; None draws one, which the report tells.
        allow_non_finite: count values that are inf or nan, but do not call them a problem.
        inputs: whether to compare the checksums of the models that it was made from.
        options: as for `merge`, without those of outputs; those that decide about bits must be the ones that the file
            was merged with. `output_dtype` is that of the file if it is left out.

    Raises:
        ModelNotFoundError, ModelAccessError: there is no such file, or it cannot be opened.
        OptionError: an option is out of range, or none of verification.

    >>> import tempfile, torch, sd_mecha
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = folder.name + "/merged.safetensors"
    >>> a, b = (sd_mecha.model({"w": torch.full((2, 2), value)}) for value in (1.0, 3.0))
    >>> recipe = sd_mecha.weighted_sum(a, b, alpha=0.25)
    >>> sd_mecha.merge(recipe, output=file, checksums=True)
    >>> print(verify(file, against=recipe))
    /.../merged.safetensors: sound (1 tensor, 8 B)
      the checksums of 1 tensor agree
      input 'in-memory model' is not here and was not compared
      input 'in-memory model (2)' is not here and was not compared
      tensors merged again and compared: 1
    >>> verify(file, against=sd_mecha.weighted_sum(a, b, alpha=0.5)).problems
    ["tensor 'w' is not what the recipe makes: it differs in 4 of 4 elements, first element 0"]
    >>> folder.cleanup()
    """
    if refused := [name for name in _OUTPUTS if name in options]:
        raise OptionError(f"{refused[0]} is an option of outputs; verify reads one, leave it out")
    if sample is not None and (type(sample) is not int or sample < 0):
        raise OptionError(f"sample must be a non-negative integer, or None for all tensors, got {sample!r}")
    if seed is not None and type(seed) is not int:
        raise OptionError(f"seed must be an integer or None, got {seed!r}")
    if against is not None and not isinstance(against, RecipeNode | str | os.PathLike):
        raise OptionError(f"against must be a recipe or the path of one, got a {type(against).__name__}")
    options = {name: value for name, value in options.items() if value is not ...}
    workers = MergeOptions().given(options).workers()
    location = model_dirs.locate(path)
    report = Report(location.name)
    try:
        reader = model_formats.open_model(location)
    except (FileFormatError, UnknownFormatError, ModelNotFoundError) as error:
        if isinstance(error, ModelNotFoundError) and not (location.is_file() or location.is_folder()):
            raise  # else it is a part of the model that is missing
        report.problems.append(_line(error))
        return report
    try:
        report.tensors = len(reader.entries)
        report.nbytes = sum(entry.nbytes for entry in reader.entries.values())
        _check_components(reader, location, report)
        checksums = _checksums(reader, report)
        _check_tensors(reader, checksums.output, report, workers, allow_non_finite)
        if inputs:
            _check_inputs(checksums.inputs, location, report, workers)
        if against is not None:
            seed = secrets.randbits(32) if seed is None else seed
            _check_recipe(reader, location, against, sample, seed, options, report)
    finally:
        reader.close()
    return report


def _check_components(reader: Reader, location: Location, report: Report) -> None:
    lost, absent, unconfigured = lost_components(reader), [], []
    if is_pipeline(location):
        folder = pipeline_folder(location)
        absent = [name for name in absent_components(folder) if name not in lost]
        unconfigured = unconfigured_components(folder)
    for names, problem in (
        (lost, "it has no weights of {} that a merge made"),
        (absent, "it has no files of {} that its model_index.json names"),
        (unconfigured, "it has weights, but no config.json, of {}"),
    ):
        if names:
            count = f"{len(names)} component{'s' * (len(names) != 1)}"
            report.problems.append(f"{problem.format(count)}, {such_as(names)}")
    if copied := copied_tensors(reader):
        parts = dict.fromkeys(name.partition(".")[0] for name in reader.entries if name in copied)
        report.notes.append(
            f"copied, so that no checksum or recipe tells of it: {', '.join(parts)} ({counted(copied)})"
        )


def _checksums(reader: Reader, report: Report) -> Checksums:
    text = reader.metadata.get(CHECKSUMS_KEY)
    if text is None:
        report.notes.append("it has no checksums")
        return Checksums()
    try:
        found = Checksums.from_text(text, reader.name)
    except FileFormatError as error:
        report.problems.append(_line(error))
        return Checksums()
    copied = copied_tensors(reader)
    for told, missing, where in (
        ([name for name in reader.entries if name not in copied], found.output, "it has no checksum of"),
        (found.output, reader.entries, "it lacks, but has a checksum of,"),
    ):
        if names := [name for name in told if name not in missing]:
            report.problems.append(f"{where} {counted(names)}, such as {names[0]!r}")
    return found


def _check_tensors(
    reader: Reader, checksums: Mapping[str, str], report: Report, workers: int, allow_non_finite: bool
) -> None:
    counts: dict[str, int] = {}
    problems: dict[str, str] = {}

    def check(buffer: torch.Tensor, name: str) -> None:
        entry = reader.entries[name]
        checksum = hashlib.new(ALGORITHM)
        try:
            for part in parts(reader.read_into, name, entry.nbytes, buffer):
                if name in checksums:
                    checksum.update(part)
                counts[name] = counts.get(name, 0) + _non_finite(buffer[: len(part)], entry)
        except (MechaError, OSError) as error:
            problems[name] = f"tensor {name!r} cannot be read: {_line(error)}"
            return
        if name in checksums and checksum.hexdigest() != checksums[name]:
            problems[name] = f"tensor {name!r} is not what was written: its checksum differs"

    in_parallel(reader.entries, check, workers)
    for name in reader.entries:
        if name in problems:
            report.problems.append(problems[name])
        if counts.get(name):
            report.non_finite[name] = counts[name]
            total = reader.entries[name].numel
            line = f"tensor {name!r} has {counts[name]} values of {total} that are inf or nan"
            (report.notes if allow_non_finite else report.problems).append(line)
    if checksums:
        agreeing = [name for name in reader.entries if name in checksums and name not in problems]
        report.notes.append(f"the checksums of {counted(agreeing)} agree")


def _non_finite(raw: torch.Tensor, entry: TensorEntry) -> int:
    if is_integral(entry.dtype) or entry.dtype == FLOAT4:
        return 0
    values = raw.view(entry.dtype)
    if is_finite(values):
        return 0
    wide = values if values.is_complex() or values.itemsize > 2 else values.float()
    return int((~torch.isfinite(wide)).sum())


def _check_inputs(checksums: Mapping[str, Mapping[str, str]], location: Location, report: Report, workers: int) -> None:
    for path, expected in checksums.items():
        if is_address(path):
            report.notes.append(f"input {path!r} lies at an address and was not compared")
            continue
        try:
            if _was_replaced(model_dirs.locate(path), location):
                report.notes.append(f"input {path!r} was replaced by this file and was not compared")
                continue
            report.problems += _changes(path, expected, workers)
        except ModelNotFoundError:
            report.notes.append(f"input {path!r} is not here and was not compared")
        except MechaError as error:
            report.problems.append(f"input {path!r} cannot be compared: {_line(error)}")
        else:
            report.notes.append(f"input {path!r} was compared: {counted(expected)}")


def _was_replaced(source: Location, output: Location) -> bool:
    """Whether an output took the place of an input: under whatever names, or as a part of its folder or around it."""
    if not (isinstance(source, LocalLocation) and isinstance(output, LocalLocation)):
        return False
    old, new = (Path(os.path.realpath(place.path)) for place in (source, output))
    if old.is_relative_to(new):
        return old == new or old.is_dir() or is_known_weights(old.name)
    return new.is_relative_to(old) and is_known_weights(new.name)  # any other file there is no part of the model


def _changes(path: str, expected: Mapping[str, str], workers: int) -> list[str]:
    """What is not as it was in a model, by its checksums."""
    node = model(path)
    with open_models(node) as models:
        reader = models[node]
        lost = [key for key in expected if key not in reader.entries]
        sizes = {key: reader.entries[key].nbytes for key in expected if key in reader.entries}
        found = digests(reader.read_into, sizes, workers)
    changed = [key for key, checksum in found.items() if checksum != expected[key]]
    lines = []
    for verb, keys in (("no longer has", lost), ("has other values now in", changed)):
        if keys:
            lines.append(f"input {path!r} {verb} {counted(keys)} that the file was made from, such as {keys[0]!r}")
    return lines


def _check_recipe(
    reader: Reader,
    location: Location,
    against: RecipeNode | str | os.PathLike[str],
    sample: int | None,
    seed: int,
    options: Mapping[str, Any],
    report: Report,
) -> None:
    try:
        recipe = _recipe(reader, against)
        if (path := _replaced_input(recipe, location)) is not None:
            report.notes.append(f"it cannot be compared with the recipe: its input {path!r} was replaced by this file")
            return
        report.compared, problems, notes = compare_with_recipe(reader, recipe, sample, seed, options)
    except OptionError:
        raise
    except MechaError as error:
        report.problems.append(f"it cannot be compared with the recipe: {_line(error)}")
        return
    report.problems += problems
    drawn = "" if sample is None or report.compared == report.tensors else f" of {report.tensors} (seed {seed})"
    report.notes += [f"tensors merged again and compared: {report.compared}{drawn}", *notes]


def _recipe(reader: Reader, against: RecipeNode | str | os.PathLike[str]) -> RecipeNode:
    if isinstance(against, RecipeNode):
        return against
    if against != EMBEDDED:
        return deserialize_path(against)
    text = reader.metadata.get(RECIPE_KEY)
    if text is None:
        raise FileFormatError(f"{reader.name} carries no recipe; give the .mecha file that it was made from")
    return deserialize(text)


def _replaced_input(recipe: RecipeNode, location: Location) -> str | None:
    for node in toposort(recipe):
        if isinstance(node, ModelRecipeNode) and node.path is not None and not is_address(node.path):
            with contextlib.suppress(MechaError):  # opening them all says more
                if _was_replaced(model_dirs.locate(node.path), location):
                    return node.path
    return None


def _line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines())
