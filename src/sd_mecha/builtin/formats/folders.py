"""What the formats that are folders share: finding weights, and the files that go along with an output."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from sd_mecha.errors import FileFormatError, MechaError, OptionError, OutputError
from sd_mecha.extensions.model_formats import LocationFormat, ModelFormat, OutputRequest, get_all, open_model
from sd_mecha.storage.contract import Reader, TensorEntry
from sd_mecha.storage.folders.sharded import STEMS, find_weights, is_index, open_sharded, weight_choices
from sd_mecha.storage.folders.sharded_writer import SideFile
from sd_mecha.storage.folders.side_files import CONFIG, MAX_SIDE_FILE, fitted_config, side_files
from sd_mecha.storage.locations import LocalLocation, Location


def open_weights(location: Location) -> Reader:
    """Open the model in a folder, the model of an index, or one file, whatever its format."""
    if location.is_folder():
        found = find_weights(location)
        if found is None:
            raise FileFormatError(f"{location.name}: has no weights in it; name a model file")
        location = found
    return open_sharded(location, open_model) if is_index(location) else open_model(location)


def reference(request: OutputRequest, marker: str) -> Location | None:
    """The folder that an output is made after: that of the side files asked for, or of the first input in one.

    Args:
        request: what the user asks for.
        marker: the name of a file that such a folder has.

    Raises:
        OptionError: the side files asked for lie in no such folder.
    """
    given = request.side_files
    if given is not None:
        named = given.is_folder() or given.child(marker).is_file()  # the web knows no folders
        folder = given if named else given.parent()
        if not folder.child(marker).is_file():
            raise OptionError(
                f"side_files={given.name!r}: there is no {marker} in {folder.name!r}; name the folder of a model "
                "that has one"
            )
        return folder
    for location in request.inputs:
        folder = location if location.is_folder() else location.parent()
        if (
            folder is location
            or location.basename.startswith((*STEMS, "pytorch_model", marker))
            or (folder.children() and location.basename in [place.basename for place in weight_choices(folder)])
        ) and folder.child(marker).is_file():
            return folder
    return None


def check_kind(path: Path, written: ModelFormat) -> None:
    """Refuse to write over the folder of a model of another format: what makes it one would stay, and old weights too.

    Args:
        path: the output.
        written: the format of the output.

    Raises:
        OutputError: there is a model of another format.
    """
    place = LocalLocation(path)
    if not place.is_folder():
        return
    found = next((known for known in get_all() if isinstance(known, LocationFormat) and known.recognises(place)), None)
    if found is None or isinstance(written, type(found)):
        return
    name = found.identifier
    writable = type(found).writer_for is not ModelFormat.writer_for
    same = f", or output_format={name!r} (--format {name}) to write one like it" if writable else ""
    raise OutputError(
        f"output {str(path)!r}: a model of the format {name!r} stands there, and a folder of the format "
        f"{written.identifier!r} does not replace it; choose another name{same}"
    )


def files_along(folder: Location, entries: Mapping[str, TensorEntry], inside: str = "") -> Iterator[SideFile]:
    """The side files of a model for an output, with a configuration that fits it.

    Args:
        folder: the model that the output is made after.
        entries: the tensors of the output.
        inside: the folder in the output that they go to, with a slash behind it.
    """
    for name, place in side_files(folder):
        if name == CONFIG:
            raw = place.read(MAX_SIDE_FILE)
            yield inside + name, fitted_config(raw, entries, _names(folder), place.name)
        else:
            yield inside + name, place.open


def _names(folder: Location) -> Collection[str]:
    """What tensors a model has; nothing where only its side files are there."""
    choices = weight_choices(folder)
    if not choices:
        return ()
    try:
        reader = open_weights(choices[0])
    except MechaError:
        return ()
    names = list(reader.entries)
    reader.close()
    return names
