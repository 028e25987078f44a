"""Model formats: how tensors lie in files.

A format recognises paths by content, opens a reader and creates a writer; both are described in
`sd_mecha.storage.contract`. `find` picks the format of an input, `for_output` that of an output.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from sd_mecha.errors import ModelNotFoundError, UnknownFormatError, UnknownNameError
from sd_mecha.extensions.legacy_formats import MappingReader, MappingWriter
from sd_mecha.extensions.model_dirs import AnyPath
from sd_mecha.extensions.output_requests import OutputRequest
from sd_mecha.extensions.registry import Registry
from sd_mecha.storage.contract import Reader, Writer
from sd_mecha.storage.folders.incomplete import describe_folder
from sd_mecha.storage.foreign import HEAD_SIZE, describe_foreign
from sd_mecha.storage.links import broken_link
from sd_mecha.storage.locations import LocalLocation, Location
from sd_mecha.storage.remote.addresses import is_web

__all__ = [
    "LocationFormat",
    "ModelFormat",
    "OutputRequest",
    "find",
    "for_output",
    "get_all",
    "open_model",
    "register_model_format",
    "resolve",
]


class ModelFormat(ABC):
    """Base of formats. A subclass overrides `matches`, and `reader`, `writer` (or `writer_for`) or both.

    A format written for sd-mecha 1 overrides `get_read_dict` and `get_write_dict` instead; the defaults of
    `reader` and `writer` adapt these.
    """

    identifier: str = ""
    """Name in the registry and in messages."""
    suffixes: tuple[str, ...] = ()
    """Endings of output paths that ask for this format, such as `.safetensors`."""

    @abstractmethod
    def matches(self, path: Path) -> bool:
        """Tell by content whether an existing path is of this format."""

    def matches_output(self, path: Path) -> bool:
        """Tell by name whether a path that may not exist yet should be written in this format."""
        if self.suffixes:
            return path.name.lower().endswith(self.suffixes)
        if type(self).get_write_dict is ModelFormat.get_write_dict:
            return False
        try:
            return self.matches(path)  # sd-mecha 1 had no other question
        except OSError:  # it looks into a file that does not exist yet
            return False

    def reader(self, path: Path) -> Reader:
        """Open a path for reading."""
        return MappingReader(self.get_read_dict(path, 2**28), str(path))

    def writer_for(self, path: Path, request: OutputRequest) -> Writer:
        """Create the writer of an output path, with what the user asked for beside the tensors.

        Raises:
            OptionError: the format has no such thing; the default knows none of them.
        """
        request.refuse(self.identifier, path, *(name for name, _ in request.given()))
        return self.writer(path)

    def writer(self, path: Path) -> Writer:
        """Create the writer of an output path; the default asks `writer_for`, where that is overridden."""
        if type(self).get_write_dict is not ModelFormat.get_write_dict:
            return MappingWriter(lambda config, recipe: self.get_write_dict(path, config, recipe, 2**28))
        if type(self).writer_for is not ModelFormat.writer_for:
            return self.writer_for(path, OutputRequest())
        raise self._one_way(path, "write", "reading")

    def get_read_dict(self, path: Path, buffer_size: int) -> Any:
        """Return a mapping of key -> tensor (sd-mecha 1)."""
        raise self._one_way(path, "read", "writing")

    def get_write_dict(self, path: Path, model_config: Any, mecha_recipe: str, buffer_size: int) -> Any:
        """Return a mapping that writes the tensors put into it (sd-mecha 1)."""
        raise self._one_way(path, "write", "reading")

    def _one_way(self, path: Path, verb: str, only: str) -> UnknownFormatError:
        return UnknownFormatError(f"format {self.identifier!r} cannot {verb} {str(path)!r}: it is for {only} only")


class LocationFormat(ModelFormat):
    """A format that is recognised and read wherever it lies: on this computer or at an address."""

    @abstractmethod
    def recognises(self, location: Location) -> bool:
        """Tell by content whether what lies there is of this format; for a file, by its `head`."""

    @abstractmethod
    def open(self, location: Location) -> Reader:
        """Open it for reading."""

    def matches(self, path: Path) -> bool:
        return self.recognises(LocalLocation(path))

    def reader(self, path: Path) -> Reader:
        return self.open(LocalLocation(path))


DEFAULT_OUTPUT = "safetensors"
"""The format of outputs whose names ask for none."""

_UNKNOWN = "a file of no known format; check that it is a model, and completely downloaded"
_registry: Registry[ModelFormat] = Registry("model format")
_logger = logging.getLogger("sd_mecha")


def register_model_format(model_format: Any = None, *, identifier: str | None = None) -> Any:
    """Add a format: a `ModelFormat`, its class, or a function that returns one; works as a decorator too.

    Args:
        model_format: the format.
        identifier: its name; by default that of the format, else of the class or function.

    Raises:
        DuplicateNameError: the name is taken.
        TypeError: it is no format.
    """
    if model_format is None:
        return lambda decorated: register_model_format(decorated, identifier=identifier)
    made = model_format() if callable(model_format) else model_format
    missing = [name for name in ("matches", "reader", "writer") if not callable(getattr(made, name, None))]
    if missing:
        raise TypeError(f"a model format needs {', '.join(missing)}; derive {type(made).__name__} from ModelFormat")
    own = getattr(made, "identifier", "")
    name = str(identifier or own or getattr(model_format, "__name__", type(made).__name__))
    if not own:
        made.identifier = name
    _registry.register(name, made)
    return model_format


def resolve(identifier: str) -> ModelFormat:
    """Return the format of that name.

    Raises:
        UnknownNameError: there is none.
    """
    try:
        return _registry.resolve(identifier)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error}; there are {', '.join(_registry)}") from None


def get_all() -> list[ModelFormat]:
    """Return all formats in the order in which they are asked."""
    return _registry.get_all()


def find(path: AnyPath, *, without: str = "") -> ModelFormat:
    """Return the format of an existing path.

    Args:
        path: where a model is.
        without: name of a format that is not meant, as one that shows what another has read.

    Raises:
        UnknownFormatError: no format recognises it; the message says what it looks like and what to do.
    """
    path = Path(path)
    formats = get_all()
    for model_format in formats:
        if model_format.identifier != without and model_format.matches(path):
            return model_format
    known = ", ".join(_registry) or "none"
    raise UnknownFormatError(f"cannot read {str(path)!r}: it is {_look(path)} (formats that can be read: {known})")


def open_model(location: Location, *, without: str = "") -> Reader:
    """Open what lies somewhere in the format that recognises it.

    Args:
        location: where a model is.
        without: name of a format that is not meant, as one that shows what another has read.

    Raises:
        UnknownFormatError: no format does; the message says what it looks like and what to do.
    """
    if isinstance(location, LocalLocation):
        return find(location.path, without=without).reader(location.path)
    for model_format in get_all():
        if not isinstance(model_format, LocationFormat) or model_format.identifier == without:
            continue
        if model_format.recognises(location):
            return model_format.open(location)
    if location.is_folder():
        look = f"a folder{describe_folder(location)}"
    elif location.is_file():
        look = describe_foreign(location.head) or _UNKNOWN
    else:
        try:
            location.open().close()
        except ModelNotFoundError as error:  # it says what is missing, and whether a login might help
            hint = " (of a folder on a web server, name the index or the file of the model)"
            raise ModelNotFoundError(f"{error}{hint if is_web(location.name) else ''}") from error
        look = _UNKNOWN
    raise UnknownFormatError(f"cannot read {location.name!r}: it is {look}")


def for_output(path: AnyPath) -> ModelFormat:
    """Return the format that an output path asks for by its name; where it asks for none, safetensors.

    Raises:
        UnknownFormatError: none goes by that ending, and there is no safetensors format either.
    """
    path = Path(path)
    for model_format in get_all():
        if getattr(model_format, "matches_output", model_format.matches)(path):
            return model_format
    if DEFAULT_OUTPUT in _registry:
        if path.suffix:
            _logger.warning("%s is written as %s, although its name ends in %s", path, DEFAULT_OUTPUT, path.suffix)
        return resolve(DEFAULT_OUTPUT)
    endings = sorted({suffix for f in get_all() for suffix in getattr(f, "suffixes", ())})
    has = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
    raise UnknownFormatError(
        f"cannot write {str(path)!r}: the name {has}; use one of {', '.join(endings) or '(none known)'}"
    )


def _look(path: Path) -> str:
    """Return what an unrecognised path is, and what to do about it."""
    if path.is_dir():
        return f"a directory{describe_folder(LocalLocation(path))}"
    if path.exists() and not path.is_file():  # reading a pipe would wait for somebody to write into it
        return "neither a file nor a directory; name a model file"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_SIZE)
    except OSError as error:
        if link := broken_link(path):
            raise ModelNotFoundError(f"model {str(path)!r} cannot be read: {link}; mend the link") from None
        if not isinstance(error, FileNotFoundError):
            raise
        raise ModelNotFoundError(f"model {str(path)!r} does not exist; check the path") from None
    return describe_foreign(head) or _UNKNOWN
