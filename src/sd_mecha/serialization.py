"""Recipes to `.mecha` text and back."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from sd_mecha.errors import RecipeError, RecipeFileError
from sd_mecha.extensions.merge_methods import RecipeNodeOrValue, value_to_node
from sd_mecha.graph import open_graph
from sd_mecha.recipes.nodes import RecipeNode
from sd_mecha.recipes.parser import MAX_TEXT, text_size
from sd_mecha.recipes.text import deserialize_text, serialize_text
from sd_mecha.recipes.tokens import SUFFIX
from sd_mecha.storage.output_file import OutputFile


def serialize(recipe: RecipeNodeOrValue, *, finalize: bool = True, output: str | os.PathLike[str] | None = None) -> str:
    """Write a recipe as `.mecha` text, version 0.1.0.

    Args:
        recipe: what to write.
        finalize: fill in inferred model configs and merge spaces, for which models are opened (headers only);
            False writes the recipe as it is and opens nothing.
        output: a file to write the text to as well.

    Raises:
        RecipeError: the text would be larger than what is read.
        RecipeTypeError: the recipe holds tensors or in-memory models, which text cannot.
        PlanError: it cannot be finalised.
        OutputError: the text cannot be written; a file of that name stays as it was.
    """
    node = value_to_node(recipe)
    if finalize:
        _text(node)  # what cannot be written is refused before any file is opened
        with open_graph(node) as graph:
            node = graph.finalize_root(check_extra_keys=False, check_mandatory_keys=False)
    text = _text(node)
    if output is not None:
        _write(text.encode("utf-8"), output)
    return text


def _text(node: RecipeNode) -> str:
    text = serialize_text(node)
    size = text_size(text)
    if size > MAX_TEXT:
        raise RecipeError(f"the recipe is too large: its text has {size} bytes; expected at most {MAX_TEXT}")
    return text


def _write(data: bytes, path: str | os.PathLike[str]) -> None:
    output = OutputFile(path)
    try:
        output.create(len(data))
        output.write_at(0, memoryview(data))
        output.publish(len(data))
    finally:
        output.discard()


def deserialize(recipe: str | Sequence[str]) -> RecipeNode:
    """Read a recipe from `.mecha` text, or from its lines. No model is opened and nothing is evaluated.

    Raises:
        RecipeSyntaxError: the text is malformed; the message shows where.
        UnknownNameError: it names a method, config or merge space that is not registered.
    """
    return deserialize_text(recipe)


def deserialize_path(recipe: str | os.PathLike[str]) -> RecipeNode:
    """Read a recipe from a `.mecha` file.

    Raises:
        RecipeFileError: there is no such file, or it is no `.mecha` text file.
        RecipeSyntaxError, UnknownNameError: as `deserialize`.
    """
    path = Path(recipe)
    if path.suffix != SUFFIX:
        raise RecipeFileError(f"{path}: a recipe file ends in {SUFFIX}, this one in {path.suffix or 'nothing'}")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for somebody to write into it
            raise ValueError("it is a directory, a pipe or a device")
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT + 1)
        if len(raw) > MAX_TEXT:
            raise ValueError(f"it has more than {MAX_TEXT} bytes")
        text = raw.decode("utf-8")
        del raw  # it is as large as the text
    except UnicodeDecodeError as error:
        raise RecipeFileError(f"{path}: not a .mecha text: byte {error.start} is not UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RecipeFileError(f"{path}: the recipe cannot be read: {getattr(error, 'strerror', error)}") from error
    return deserialize_text(text)
