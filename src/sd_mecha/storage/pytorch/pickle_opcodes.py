"""What each opcode of a pickle does to the machine that reads it; those that checkpoints do not need are refused."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from sd_mecha.storage.pytorch.pickle_machine import PickleMachine

MAX_INT_BYTES = 64
MAX_NESTING = 10_000
ENTRY = 16  # what a place on the stack, or in the memo, and later one in a list takes from the budget of memory ...
SMALL, OBJECT = 64, 160  # ... and what tuples and numbers, and larger objects, take


class Inert:
    """Stands for an object that is neither needed nor made: its class's name, and what it would be made of."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}>"


_U1, _U2, _U4, _U8 = (struct.Struct(code) for code in ("<B", "<H", "<I", "<Q"))
_I4, _FLOAT = struct.Struct("<i"), struct.Struct(">d")


def _refuse(machine: PickleMachine) -> NoReturn:
    code = machine.data[machine.at - 1]
    machine.fail(f"it has the opcode {bytes([code])!r}, which checkpoints do not need")


OPCODES: list[Callable[[PickleMachine], None]] = [_refuse] * 256


def _opcode(*codes: int) -> Callable[[Callable[[PickleMachine], None]], Callable[[PickleMachine], None]]:
    def register(function: Callable[[PickleMachine], None]) -> Callable[[PickleMachine], None]:
        for code in codes:
            OPCODES[code] = function
        return function

    return register


def _constant(code: int, value: Any) -> None:
    OPCODES[code] = lambda machine: machine.push(value)


def _sized(code: int, length: struct.Struct, decode: Callable[[bytes], Any]) -> None:
    """An opcode of a length and as many bytes; a length beyond the data is found before memory is taken."""

    def push(machine: PickleMachine) -> None:
        value = decode(machine.take(machine.number(length)))
        machine.charge(sys.getsizeof(value))
        machine.push(value)

    OPCODES[code] = push


def _numeric(code: int, form: struct.Struct) -> None:
    def push(machine: PickleMachine) -> None:
        machine.charge(SMALL)
        machine.stack.append(machine.number(form))

    OPCODES[code] = push


def _text(raw: bytes) -> str:
    return raw.decode("utf-8")


def _old_text(raw: bytes) -> str | bytes:
    """A str of Python 2, which is text or bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


_constant(ord("N"), None)
_constant(0x88, True)
_constant(0x89, False)
_constant(ord(")"), ())
_sized(ord("X"), _U4, _text)
_sized(0x8C, _U1, _text)
_sized(0x8D, _U8, _text)
_sized(ord("B"), _U4, bytes)
_sized(ord("C"), _U1, bytes)
_sized(0x8E, _U8, bytes)
_sized(0x96, _U8, bytes)  # BYTEARRAY8
_sized(ord("T"), _U4, _old_text)
_sized(ord("U"), _U1, _old_text)
_numeric(ord("J"), _I4)
_numeric(ord("M"), _U2)
_numeric(ord("G"), _FLOAT)
OPCODES[ord("K")] = lambda machine: machine.push(machine.byte())
OPCODES[ord("q")] = lambda machine: machine.remember(machine.byte())
OPCODES[ord("h")] = lambda machine: machine.recall(machine.byte())
OPCODES[ord("r")] = lambda machine: machine.remember(machine.number(_U4))
OPCODES[ord("j")] = lambda machine: machine.recall(machine.number(_U4))


@_opcode(0x8A, 0x8B)
def _long(machine: PickleMachine) -> None:
    length = machine.number(_U1 if machine.data[machine.at - 1] == 0x8A else _I4)
    if not 0 <= length <= MAX_INT_BYTES:
        machine.fail(f"it holds an integer of {length} bytes; expected at most {MAX_INT_BYTES}")
    machine.charge(SMALL)
    machine.stack.append(int.from_bytes(machine.take(length), "little", signed=True))


@_opcode(0x94)
def _memoize(machine: PickleMachine) -> None:
    machine.remember(len(machine.memo))


@_opcode(0x95)
def _frame(machine: PickleMachine) -> None:
    length = machine.number(_U8)
    if length > len(machine.data) - machine.at:
        raise machine.truncated()


@_opcode(ord("("))
def _mark(machine: PickleMachine) -> None:
    if len(machine.outer) >= MAX_NESTING:
        machine.fail(f"it is nested more than {MAX_NESTING} levels deep")
    machine.outer.append(machine.stack)
    machine.stack = []


@_opcode(ord("0"))
def _pop(machine: PickleMachine) -> None:
    machine.stack.pop()


@_opcode(ord("1"))
def _pop_to_mark(machine: PickleMachine) -> None:
    machine.pop_mark()


@_opcode(ord("t"))
def _tuple(machine: PickleMachine) -> None:
    machine.charge(SMALL)
    items = machine.pop_mark()
    machine.stack.append(tuple(items))


@_opcode(0x85, 0x86, 0x87)
def _short_tuple(machine: PickleMachine) -> None:
    count = machine.data[machine.at - 1] - 0x84
    stack = machine.stack
    if len(stack) < count:
        raise IndexError
    machine.charge(SMALL)
    stack[-count:] = [tuple(stack[-count:])]


@_opcode(ord("]"))
def _list(machine: PickleMachine) -> None:
    machine.charge(SMALL * 2)
    machine.stack.append([])


@_opcode(ord("}"))
def _dict(machine: PickleMachine) -> None:
    machine.charge(SMALL)
    machine.push({})


@_opcode(0x8F)
def _set(machine: PickleMachine) -> None:
    machine.charge(OBJECT)
    machine.stack.append(Inert("set"))


@_opcode(0x91)
def _frozenset(machine: PickleMachine) -> None:
    machine.pop_mark()
    machine.charge(OBJECT)
    machine.stack.append(Inert("frozenset"))


@_opcode(ord("a"))
def _append_one(machine: PickleMachine) -> None:
    value = machine.stack.pop()
    machine.append(machine.stack[-1], [value])


@_opcode(ord("e"), 0x90)
def _append_many(machine: PickleMachine) -> None:
    items = machine.pop_mark()
    machine.append(machine.stack[-1], items)


@_opcode(ord("s"))
def _set_one(machine: PickleMachine) -> None:
    value = machine.stack.pop()
    key = machine.stack.pop()
    machine.set_items(machine.stack[-1], [key, value])


@_opcode(ord("u"))
def _set_many(machine: PickleMachine) -> None:
    items = machine.pop_mark()
    machine.set_items(machine.stack[-1], items)


@_opcode(ord("c"))
def _global(machine: PickleMachine) -> None:
    module = machine.line()
    machine.look_up(module, machine.line())


@_opcode(0x93)
def _stack_global(machine: PickleMachine) -> None:
    name = machine.stack.pop()
    machine.look_up(machine.stack.pop(), name)


@_opcode(ord("R"), 0x81)
def _reduce(machine: PickleMachine) -> None:
    args = machine.stack.pop()
    machine.call(machine.stack.pop(), args)


@_opcode(0x92)
def _new_with_keywords(machine: PickleMachine) -> None:
    machine.stack.pop()
    _reduce(machine)


@_opcode(ord("b"))
def _set_state(machine: PickleMachine) -> None:
    machine.build()


@_opcode(ord("Q"))
def _persistent(machine: PickleMachine) -> None:
    machine.charge(OBJECT)
    machine.stack.append(machine.names.persistent(machine, machine.stack.pop()))
