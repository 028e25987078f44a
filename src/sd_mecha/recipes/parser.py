"""Reading `.mecha` text, version 0.1.0.

Reading is linear in the text, evaluates nothing and opens no file. Names are resolved at once, through the
provider, and merge instructions call the method itself: a text means what the same calls mean in Python. What
goes wrong is reported with line, column, the line and a caret.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from sd_mecha.errors import (
    RecipeSyntaxError,
    RecipeTypeError,
    RecipeVersionError,
    UnknownNameError,
)
from sd_mecha.recipes import provider
from sd_mecha.recipes.nodes import LiteralRecipeNode, ModelRecipeNode, RecipeNode
from sd_mecha.recipes.provider import Method, Named
from sd_mecha.recipes.tokens import Ref, Scalar, Token, parse_bare, shown, split_line
from sd_mecha.units import format_size

VERSION = "0.1.0"

MAX_TEXT = 64 << 20
"""Bytes of a text, in UTF-8 and in memory; one of 100,000 merges has 3.4 million."""
_MAX_MEMORY = 450_000_000
# Bytes that they take, about, however little text asks for them: a node; a number that is an argument, which becomes
# two nodes; a value of a dict; one that is copied; and what each token of a line takes beside until that is read.
_NODE, _ARGUMENT, _VALUE, _COPY, _TOKEN = 400, 650, 150, 80, 400

T = TypeVar("T")


def deserialize_text(text: str | Sequence[str]) -> RecipeNode:
    """Read a recipe from text.

    Args:
        text: the text, or its lines. Blank lines, comments, CRLF line ends and a byte order mark are fine.

    Raises:
        RecipeVersionError: the first line is not the header of a version that can be read.
        RecipeSyntaxError: a line cannot be read, or refers to an instruction that is not above it.
        RecipeTypeError: a merge method refuses its arguments.
        UnknownNameError: a method, config or merge space is not registered.
    """
    text = _whole(text)
    parser = _Parser(text_size(text))
    for number, line in enumerate(_lines(text), 1):
        stripped = line.strip(" \t\r")
        if stripped and stripped[0] != "#":
            parser.read(line.rstrip(" \t\r"), number)
    return parser.finish()


def text_size(text: str) -> int:
    """Bytes of a text where it takes most: one wide character makes all of it wide in memory."""
    if text.isascii():
        return len(text)
    return max(sys.getsizeof(text), len(text.encode("utf-8", "surrogatepass")))


def _whole(text: object) -> str:
    if isinstance(text, (list, tuple)) and all(isinstance(line, str) for line in text):
        text = "\n".join([line.removesuffix("\n") for line in text])
    if not isinstance(text, str):
        raise RecipeTypeError(f"a recipe is read from a str or a list of lines, got {type(text).__name__}")
    if len(text) > MAX_TEXT or text_size(text) > MAX_TEXT:
        raise RecipeSyntaxError(f"the text has {len(text)} characters; expected at most {MAX_TEXT} bytes")
    return text


def _lines(text: str) -> Iterator[str]:
    """The lines one by one: a list of them would take as much memory as the text, and more for empty ones."""
    start = 1 if text.startswith("\ufeff") else 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    yield text[start:]


class _Parser:
    """The instructions read so far, and where reading stands."""

    def __init__(self, memory: int) -> None:
        self._provider = provider.current()
        self._has_version = False
        self._results: list[RecipeNode] = []
        self._methods: dict[str, Method] = {}
        self._memory, self._passing = memory, 0
        self._line = ""
        self._number = 0

    def finish(self) -> RecipeNode:
        if not self._has_version:
            raise RecipeVersionError(f"the text is empty: expected 'version {VERSION}' and instructions")
        if not self._results:
            raise RecipeSyntaxError("the text holds a version but no instruction: a recipe has at least one")
        return self._results[-1]

    def read(self, line: str, number: int) -> None:
        """Read one line that is neither blank nor a comment."""
        self._line, self._number = line, number
        # The line, its strings, and what tells the node from others: their repr, which escapes what is not printable.
        size = sys.getsizeof(line)
        self._passing = size * (6 if line.isprintable() else 15)
        self._take(size)
        if not self._has_version:
            self._read_version()
            return
        start = len(line) - len(line.lstrip(" \t"))
        end = line.find(" ", start)
        end = len(line) if end < 0 else end
        command = line[start:end]
        read = self._COMMANDS.get(command)
        if read is None:
            known = ", ".join(self._COMMANDS)
            self._fail(f"unknown instruction {command[:40]!r}: expected one of {known}", start + 1)
        node = read(self, split_line(line, end, number), start + 1)
        self._results.append(node)
        self._take(_NODE)

    def _read_version(self) -> None:
        words = self._line.split()
        if words == ["version", VERSION]:
            self._has_version = True
            return
        if words[:1] == ["version"]:
            message = f"version {' '.join(words[1:])[:40]!r} cannot be read: this release reads version {VERSION}"
        else:
            message = f"the version is missing: the first line of a recipe is 'version {VERSION}'"
        raise RecipeVersionError(message, line=self._number, column=1, source=shown(self._line))

    def _read_dict(self, tokens: Iterator[Token], column: int) -> RecipeNode:
        values: dict[str, Any] = {}
        for token in tokens:
            if token.name is None:
                self._fail("a dict holds key=value pairs, and this has no key", token.column)
            self._check_new(token.name, values, token)
            values[token.name] = self._value(token)
            self._take(_VALUE, _TOKEN)
        return LiteralRecipeNode(values)

    def _read_literal(self, tokens: Iterator[Token], column: int) -> RecipeNode:
        target, config, space = self._declaration("literal", "a reference to a dict", tokens, column)
        node = self._value(target)
        if not isinstance(node, LiteralRecipeNode) or node.model_config is not None or node.merge_space is not None:
            self._fail("a literal takes a reference to a dict instruction, such as &0", target.value_column)
        self._take(_COPY * len(node.value_dict), _TOKEN * len(node.value_dict))
        return LiteralRecipeNode(node.value_dict, config, space)

    def _read_model(self, tokens: Iterator[Token], column: int) -> RecipeNode:
        target, config, space = self._declaration("model", "the path of a file", tokens, column)
        if target.string is None:
            self._fail("a model takes the path of a file as a quoted string", target.value_column)
        return ModelRecipeNode(target.string, config, space)

    def _read_merge(self, tokens: Iterator[Token], column: int) -> RecipeNode:
        name = next(tokens, None)
        if name is None or name.name is not None or name.string is None:
            at = column if name is None else name.column
            self._fail("merge is followed by the name of a method as a quoted string", at)
        method = self._methods.get(name.string)
        if method is None:
            method = self._methods[name.string] = self._resolve(self._provider.method, name)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for token in tokens:
            value = self._value(token)
            self._take(_COPY if isinstance(value, RecipeNode) else _ARGUMENT, _TOKEN)
            if token.name is None:
                args.append(value)
            else:
                self._check_new(token.name, kwargs, token)
                kwargs[token.name] = value
        try:
            return method(*args, **kwargs)
        except UnknownNameError as error:
            raise UnknownNameError(self._located(str(error), name.column)) from error
        except TypeError as error:
            raise RecipeTypeError(self._located(str(error), name.column)) from error

    _COMMANDS: ClassVar[Mapping[str, Callable[[_Parser, Iterator[Token], int], RecipeNode]]] = {
        "model": _read_model,
        "dict": _read_dict,
        "literal": _read_literal,
        "merge": _read_merge,
    }

    def _declaration(
        self, command: str, expected: str, tokens: Iterator[Token], column: int
    ) -> tuple[Token, Named | None, Named | None]:
        """Read `TARGET model_config=... merge_space=...`; both may be absent, or without their name."""
        target = next(tokens, None)
        if target is None or target.name is not None:
            self._fail(f"{command} is followed by {expected}", column if target is None else target.column)
        found: dict[str, Named | None] = {}
        unnamed = iter(["model_config", "merge_space"])
        for token in tokens:
            name = next(unnamed, "") if token.name is None else token.name
            self._check_new(name, found, token)
            if name == "model_config":
                found[name] = self._named(self._provider.config, token)
            elif name == "merge_space":
                found[name] = self._named(self._provider.space, token)
            else:
                self._fail(f"{command} takes model_config and merge_space, and nothing else", token.column)
        return target, found.get("model_config"), found.get("merge_space")

    def _named(self, lookup: Callable[[str], Named], token: Token) -> Named | None:
        if token.string is None:
            if token.bare == "null":
                return None
            self._fail('expected null or a name as a "quoted string"', token.value_column)
        return self._resolve(lookup, token)

    def _resolve(self, lookup: Callable[[str], T], token: Token) -> T:
        try:
            return lookup(token.string or "")
        except UnknownNameError as error:
            raise UnknownNameError(self._located(str(error), token.value_column)) from error

    def _check_new(self, name: str, found: Container[str], token: Token) -> None:
        if name in found:
            self._fail(f"{name!r} is given twice", token.column)

    def _take(self, memory: int, passing: int = 0) -> None:
        """Count bytes: those that stay, and those that are free again after the line."""
        self._memory += memory
        self._passing += passing
        if self._memory + self._passing > _MAX_MEMORY:
            message = f"the recipe is too large: up to here it takes more than {format_size(_MAX_MEMORY)} of memory"
            raise RecipeSyntaxError(message, line=self._number)

    def _value(self, token: Token) -> RecipeNode | Scalar:
        if token.string is not None:
            return token.string
        try:
            value = parse_bare(token.bare)
        except ValueError as error:
            self._fail(str(error), token.value_column)
        if not isinstance(value, Ref):
            return value
        count = len(self._results)
        if 0 <= value < count:
            return self._results[value]
        above = f"&0 to &{count - 1}" if count > 1 else "only &0" if count else "none yet"
        what = "this instruction itself" if value == count else "no instruction above this one"
        self._fail(f"&{int(value)} refers to {what}: those above are {above}", token.value_column)

    def _located(self, message: str, column: int) -> str:
        return str(RecipeSyntaxError(message, line=self._number, column=column, source=shown(self._line)))

    def _fail(self, message: str, column: int) -> NoReturn:
        raise RecipeSyntaxError(message, line=self._number, column=column, source=shown(self._line))
