"""The error family.

Every message says what was found, what was expected, where, and what to do next. Each class also derives from the
built-in type that a Python user would catch, so that code written against plain exceptions keeps working.
"""

from __future__ import annotations

from collections.abc import Sequence


class MechaError(Exception):
    """Root of everything this library raises on purpose."""


class RecipeError(MechaError):
    """Something is wrong with the recipe itself."""


class RecipeSyntaxError(RecipeError, ValueError):
    """A `.mecha` text cannot be read; the message shows line, column and the line itself with a caret."""

    def __init__(self, message: str, *, line: int | None = None, column: int | None = None, source: str = "") -> None:
        self.line = line
        self.column = column
        where = "" if line is None else f"line {line}" + ("" if column is None else f", column {column}") + ": "
        caret = "" if column is None else f"\n    {source}\n    {' ' * (column - 1)}^"
        super().__init__(f"{where}{message}{caret}")


class RecipeFileError(RecipeError, ValueError, FileNotFoundError):
    """A recipe file is missing, or is no `.mecha` text."""


class RecipeVersionError(RecipeSyntaxError, RuntimeError):
    """The version header of a `.mecha` text is missing or not supported."""


class RecipeTypeError(RecipeError, TypeError):
    """A value cannot stand where the recipe puts it."""


class ParameterError(RecipeError, ValueError, RuntimeError):
    """A merge method is given a value outside the range of a parameter, or too few models."""


class UnknownNameError(MechaError, KeyError):
    """A method, config, merge space or format of that name is not registered."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class DuplicateNameError(MechaError, ValueError):
    """An identifier is registered twice."""


class ModelNotFoundError(MechaError, FileNotFoundError):
    """A model path leads to no file."""


class ModelAccessError(MechaError, PermissionError):
    """A model path leads to something that cannot be read as a file: a folder, a device, a file without permission."""


class FileFormatError(MechaError, ValueError):
    """A file breaks a rule of its format; nothing was read from it."""


class UnknownFormatError(MechaError, TypeError):
    """No registered format recognises a path."""


class OptionError(MechaError, ValueError, RuntimeError):
    """An option of merge() has a value outside its range."""


class PlanError(MechaError, RuntimeError):
    """The recipe cannot be planned: one line per contradiction found."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(PlanError, TypeError):
    """Model configs of connected nodes contradict each other."""


class MergeSpaceError(PlanError, TypeError):
    """Merge spaces of connected nodes contradict each other."""


class ShapeError(PlanError, ValueError):
    """Tensors that a merge method combines differ in shape."""


class AdapterError(PlanError, ValueError):
    """An adapter file cannot be read, or does not fit the model that it should change."""


class EmptyMergeError(PlanError):
    """The recipe produces no key at all."""


class ContractError(MechaError, AssertionError):
    """A merge method broke what it declared: keys, shape or dtype."""


class ChangedInputError(MechaError, OSError):
    """An input changed or vanished while it was being merged."""


class OutputError(MechaError, OSError):
    """The output cannot be written; whatever stood under its name is untouched."""


class OutputFolderError(OutputError, FileNotFoundError):
    """The folder that an output should go to does not exist."""


class StateDictKeyError(KeyError):
    """Raised by a merge method to skip a key: the output then lacks it or takes it from a fallback."""


class NonFiniteStateDictKeyError(StateDictKeyError):
    """An input tensor holds inf or nan and counts as missing."""
