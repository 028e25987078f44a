"""Reading pickles without running them: a small machine for those opcodes that data needs.

A pickle is a program for a stack machine, and Python's own machine lets that program import and call anything. This
one never imports: a name in the pickle is only looked up by whoever uses the machine (`Names`), who decides what
comes of it. Opcodes that checkpoints do not need (INST, OBJ, EXT, text protocols) are refused. So is what would take
time or memory out of proportion: objects are charged to a budget of bytes, memo indices follow one another, and dict
keys are kinds whose hashes nobody can choose to collide.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.pytorch.pickle_opcodes import ENTRY, OBJECT, OPCODES, SMALL, Inert
from sd_mecha.storage.strict_json import brief

MAX_PICKLE = 48 * 2**20
"""The longest pickle that is read, in bytes; one of 100,000 tensors has 12 to 20 million."""

BUDGET = 320 * 2**20  # bytes of objects; 100,000 tensors take about 190 million, with what is made of them
_TABLE, _ITEM = 192, 96  # what the first item of a dict takes, and each further one with room for growth
_MAX_NAME = 1024
_MAX_TUPLE_KEYS = 4096
_MAX_KEY = 2**60  # larger integers hash alike in any number, and make a dict of them quadratic


class TruncatedPickleError(FileFormatError):
    """The data ends before the pickle does."""


class Name:
    """A global that a pickle may mention; `make` turns arguments into what calling it gives here."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[[PickleMachine, tuple[Any, ...]], Any] | None = None) -> None:
        self.name = name
        self.make = make

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Names(Protocol):
    """What the globals and persistent ids of a pickle mean."""

    def find(self, machine: PickleMachine, module: str, name: str) -> Any:
        """A `Name`, or a harmless value. Anything unknown is refused through `machine.fail`."""

    def persistent(self, machine: PickleMachine, identifier: Any) -> Any:
        """What a persistent id stands for."""


class PickleMachine:
    """Reads one pickle.

    Args:
        data: bytes in which it lies.
        names: what its globals mean.
        source: what messages call the file.
        start: where in the data it begins.
        budget: how many bytes of objects it may make, if not `BUDGET`.
    """

    def __init__(self, data: bytes, names: Names, source: str, start: int = 0, budget: int | None = None) -> None:
        self.data = data
        self.source = source
        self.names = names
        self._begin = self.at = start
        self.budget = BUDGET if budget is None else budget
        self._tuple_keys = 0
        self.memo: list[Any] = []
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []

    def run(self) -> Any:
        """The value; `at` is then the place after it.

        Raises:
            TruncatedPickleError: the data ends first.
            FileFormatError: the pickle is broken, or wants something that a checkpoint does not need.
        """
        if self.take(1) != b"\x80" or not 2 <= self.take(1)[0] <= 5:
            self.fail("it does not start as a pickle of protocol 2 to 5")
        collecting = gc.isenabled()
        gc.disable()  # it would look at all the new objects over and over; the budget bounds what they take
        try:
            return self._run()
        except struct.error:
            raise self.truncated() from None
        except IndexError:
            if self.at > len(self.data):
                raise self.truncated() from None
            self.fail("it takes more from its stack than is there")
        except UnicodeDecodeError:
            self.fail("it holds text that is not valid UTF-8")
        finally:
            if collecting:
                gc.enable()

    def _run(self) -> Any:
        data, opcodes, size = self.data, OPCODES, len(self.data)
        while self.at < size:
            opcode = data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                if len(self.stack) != 1 or self.outer:
                    self.fail("it ends with other than one value on its stack")
                return self.stack.pop()
            opcodes[opcode](self)
        raise self.truncated()

    def charge(self, nbytes: int) -> None:
        """Take memory from the budget."""
        self.budget -= nbytes
        if self.budget < 0:
            self.fail(f"it would make objects of more than {BUDGET} bytes")

    def push(self, value: Any) -> None:
        """Put something on the stack that costs little or nothing but its place there."""
        self.charge(ENTRY)
        self.stack.append(value)

    def fail(self, problem: str) -> NoReturn:
        """Refuse the pickle."""
        raise FileFormatError(
            f"{self.source}: cannot read its pickle at byte {self.at - self._begin}: {problem}; nothing was executed"
        )

    def put(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        """Add an item to a dict."""
        kind = type(key)
        if kind is not str:
            self._check_key(key)
        self.charge(_ITEM if target else _TABLE)
        target[key] = value

    def _check_key(self, key: Any) -> None:
        if type(key) is tuple:
            self._tuple_keys += 1
            if self._tuple_keys > _MAX_TUPLE_KEYS or len(key) > 64:
                self.fail(f"it has more than {_MAX_TUPLE_KEYS} tuples as keys of dicts, or one of more than 64 parts")
            for part in key:
                if type(part) is tuple:
                    self.fail("it nests tuples in a key of a dict")
                self._check_key(part)
        elif type(key) is int:
            if abs(key) >= _MAX_KEY:
                self.fail("a key of a dict is an integer beyond 2**60")
        elif not isinstance(key, str | float | bytes | bool | Inert | Name | torch.dtype | None):
            self.fail(f"a key of a dict is a {type(key).__name__}")

    def truncated(self) -> TruncatedPickleError:
        return TruncatedPickleError(
            f"{self.source}: its pickle ends at byte {len(self.data) - self._begin} before it is complete; "
            "the file is truncated, fetch it again"
        )

    def take(self, length: int) -> bytes:
        start = self.at
        end = self.at = start + length
        if end > len(self.data):
            raise self.truncated()
        return self.data[start:end]

    def number(self, form: struct.Struct) -> Any:
        """The number that stands here; `run` deals with data that ends within it."""
        at = self.at
        self.at = at + form.size
        return form.unpack_from(self.data, at)[0]

    def byte(self) -> int:
        """The byte that stands here; `run` deals with data that ends before it."""
        at = self.at
        self.at = at + 1
        return self.data[at]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_NAME)
        if end < 0:
            if self.at + _MAX_NAME > len(self.data):
                raise self.truncated()
            self.fail(f"a name in it is longer than {_MAX_NAME:,} bytes")
        line, self.at = self.data[self.at : end], end + 1
        return line.decode("utf-8")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def remember(self, index: int) -> None:
        """Store the top of the stack; picklers count up, so that a larger step is no pickler's work."""
        if index < len(self.memo):
            self.memo[index] = self.stack[-1]
        elif index == len(self.memo):
            self.charge(ENTRY)
            self.memo.append(self.stack[-1])
        else:
            self.fail(f"it skips from memo entry {len(self.memo)} to {index}")

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            self.fail(f"it wants memo entry {index} of {len(self.memo)}")
        self.push(self.memo[index])

    def look_up(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.fail("a name in it is no text")
        if len(module) + len(name) > _MAX_NAME:  # one long text could be a part of any number of names
            self.fail(f"a name in it is longer than {_MAX_NAME:,} characters")
        self.charge(SMALL)
        self.stack.append(self.names.find(self, module, name))

    def call(self, function: Any, args: Any) -> None:
        if type(function) is not Name or type(args) is not tuple:
            self.fail(f"it calls {brief(function)}, which is no function")
        self.charge(OBJECT)
        made = Inert(function.name, args) if function.make is None else function.make(self, args)
        self.stack.append(made)

    def set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is dict:
            if len(items) % 2:
                self.fail("it adds a key without a value to a dict")
            for index in range(0, len(items), 2):
                self.put(target, items[index], items[index + 1])
        elif type(target) is not Inert:
            self.fail(f"it adds items to a {type(target).__name__}")

    def append(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Inert:
            self.fail(f"it appends to a {type(target).__name__}")

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is Inert:
            target.state = state
        elif type(target) is not dict:  # a dict's attributes, such as `_metadata` of a state dict, say nothing here
            self.fail(f"it sets the state of {brief(target)}")
