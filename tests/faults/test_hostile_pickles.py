"""Pickles made to do harm: nothing of theirs is executed, and none costs time or memory out of proportion."""

from __future__ import annotations

import contextlib
import copyreg
import os
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sd_mecha
from sd_mecha.errors import FileFormatError, MechaError
from sd_mecha.storage.pytorch import pickle_machine
from sd_mecha.storage.pytorch.names import TorchNames
from sd_mecha.storage.pytorch.pickle_machine import PickleMachine
from tests.faults.support import refused
from tests.storage.torch_files import legacy_with_pickle, opened, read_all, saved, small_model, with_pickle

SAFE = pickle.dumps({"w": 1}, 2)


class Evil:
    """Becomes a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def call(module: str, name: str, *args: bytes) -> bytes:
    return b"".join((f"c{module}\n{name}\n".encode(), b"(", *args, b"tR"))


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def program(*parts: bytes, protocol: int = 2) -> bytes:
    """A pickle of those opcodes that leaves the last value."""
    return b"\x80" + bytes([protocol]) + b"".join(parts) + b"."


def refuses(raw: bytes, message: str) -> None:
    """Both kinds of file with that pickle are refused, quickly."""
    for data in (with_pickle(raw), legacy_with_pickle(raw)):
        start = time.monotonic()
        with pytest.raises(FileFormatError, match=message):
            opened(data)
        assert time.monotonic() - start < 5


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_command_is_not_run(tmp_path: Path, suffix: str, new: bool, protocol: int) -> None:
    trace = tmp_path / "executed"
    evil = Evil(os.system, f"touch {trace}")
    path = tmp_path / f"model{suffix}"
    path.write_bytes(saved({"state_dict": {"w": torch.ones(2)}, "extra": evil}, new, pickle_protocol=protocol))
    output = tmp_path / "out.safetensors"
    with refused(FileFormatError, says=[path, "system", "can run programs", "nothing was executed"]):
        sd_mecha.merge(sd_mecha.model(path), output=output)
    assert not trace.exists()
    assert not output.exists()


GLOBALS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("builtins", "type"),
    ("__builtin__", "eval"),
    ("sys", "modules"),
    ("importlib", "import_module"),
    ("pickle", "loads"),
    ("runpy", "run_path"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("webbrowser", "open"),
    ("torch", "load"),
    ("torch", "hub"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch._utils", "_import_dotted_name"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.jit", "load"),
    ("torch.utils._config_module", "load_config"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("collections", "namedtuple"),
    ("torch.Size", "__class__"),
    ("lightning.x", "y\u0000os.system"),
    ("omegaconf.a b", "c"),
    ("lightningx", "y"),
    ("_codecs", "lookup"),
    ("__main__", "Config"),
    ("", ""),
    ("..", ".."),
]


@pytest.mark.parametrize(("module", "name"), GLOBALS, ids=map(str, GLOBALS))
def test_a_name_that_is_not_on_the_list_is_refused(module: str, name: str) -> None:
    shown = "can run programs|not on the list"
    refuses(program(b"}", text("w"), call(module, name, text("id")), b"s"), shown)
    refuses(program(text(module), text(name), b"\x93", protocol=4), shown)


@pytest.mark.parametrize("evil", [b"\x80\x04" + text("os") + text("system") + b"\x93", b"cos\nsystem\n"])
def test_it_is_refused_wherever_it_hides(evil: bytes) -> None:
    bare = evil.removeprefix(b"\x80\x04")
    hidden = [
        b"(" + bare + b"1" + b"}",
        bare + b"0" + b"}",
        call("collections", "OrderedDict", bare, b"\x85"),
        call("torch._tensor", "_rebuild_from_type_v2", bare, b"N", b"(tN"),
        call("collections", "defaultdict", bare),
        b"cargparse\nNamespace\n)\x81" + bare + b"b",
        b"}}" + bare + b"N" + b"ss",
        bare + b"Q",
    ]
    for part in hidden:
        refuses(program(part, protocol=4), "can run programs")


def test_a_pickle_within_a_pickle_is_only_bytes(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    inner = pickle.dumps(Evil(os.system, f"touch {trace}"))
    content = {"state_dict": {"w": torch.ones(2)}, "blob": inner}
    assert list(read_all(saved(content, pickle_protocol=4))) == ["w"]
    assert not trace.exists()


def test_the_registry_of_extension_codes_is_not_asked() -> None:
    copyreg.add_extension("os", "system", 200)  # type: ignore[arg-type]
    try:
        refuses(program(b"\x82\xc8"), "opcode")
    finally:
        copyreg.remove_extension("os", "system", 200)  # type: ignore[arg-type]


OPCODES = {
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(cos\nsystem\no",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pos\n",
    "NEXT_BUFFER": b"\x97",
    "DUP": b"N2",
    "INT": b"I1\n",
    "STRING": b"S'x'\n",
    "GET": b"g0\n",
    "second PROTO": b"\x80\x02",
    "unknown": b"\xff",
}


@pytest.mark.parametrize("raw", OPCODES.values(), ids=OPCODES)
def test_opcodes_that_checkpoints_do_not_need_are_refused(raw: bytes) -> None:
    refuses(program(raw), "opcode|can run programs")


# --- broken programs -------------------------------------------------------------------------------------------------


BROKEN = {
    "protocol 0": (b"(dp0\n.", "does not start as a pickle"),
    "protocol 9": (b"\x80\x09}.", "does not start as a pickle"),
    "empty stack": (program(b""), "other than one value"),
    "two values": (program(b"NN"), "other than one value"),
    "mark left": (program(b"(N"), "other than one value"),
    "pop from nothing": (program(b"0"), "more from its stack than is there"),
    "tuple of too few": (program(b"N\x86"), "more from its stack than is there"),
    "pop beyond a mark": (program(b"N(0"), "more from its stack than is there"),
    "no mark": (program(b"t"), "more from its stack than is there"),
    "memo of nothing": (program(b"q\x00"), "more from its stack than is there"),
    "memo entry not set": (program(b"h\x05"), "wants memo entry 5 of 0"),
    "memo index skipped": (program(b"Nr\xff\xff\xff\x7f"), "skips from memo entry 0 to 2147483647"),
    "bytes beyond the end": (program(b"B\xff\xff\xff\xff"), "before it is complete"),
    "8-byte length": (program(b"\x8e" + b"\xff" * 8), "before it is complete"),
    "bytearray beyond the end": (program(b"\x96" + b"\xff" * 7 + b"\x7f"), "before it is complete"),
    "frame beyond the end": (program(b"\x95" + b"\xff" * 8), "before it is complete"),
    "huge integer": (program(b"\x8b\x00\x00\x10\x00" + bytes(1 << 20)), "an integer of 1048576 bytes"),
    "negative length": (program(b"\x8b\xff\xff\xff\xff"), "an integer of -1 bytes"),
    "invalid text": (program(b"X\x01\x00\x00\x00\xff"), "not valid UTF-8"),
    "half a surrogate": (program(b"X\x03\x00\x00\x00\xed\xa0\x80"), "not valid UTF-8"),
    "endless name": (program(b"c" + b"a" * 5000), "longer than 1,024 bytes"),
    "name of a number": (program(b"K\x01K\x02\x93"), "is no text"),
    "call of a dict": (program(b"})R"), "which is no function"),
    "call of text": (program(text("os.system") + b")R"), "which is no function"),
    "call with a list": (program(b"ccollections\nOrderedDict\n]R"), "which is no function"),
    "new object of a number": (program(b"K\x01)\x81"), "which is no function"),
    "dict item without value": (program(b"}(Nu"), "a key without a value"),
    "items for a list": (program(b"]NNs"), "adds items to a list"),
    "items for a tuple": (program(b")NNs"), "adds items to a tuple"),
    "append to a dict": (program(b"}Na"), "appends to a dict"),
    "append to text": (program(text("x") + b"Na"), "appends to a str"),
    "state of a function": (program(b"ccollections\nOrderedDict\n}" + text("__init__") + b"Nsb"), "sets the state"),
    "state of a dtype": (program(b"ctorch\nfloat32\n}b"), "sets the state"),
    "state of a list": (program(b"]}b"), "sets the state"),
    "key that is a list": (program(b"}]Ns"), "a key of a dict is a list"),
    "key that is a dict": (program(b"}}Ns"), "a key of a dict is a dict"),
    "key of nested tuples": (program(b"})\x85Ns"), "nests tuples in a key"),
    "pairs that are none": (program(call("collections", "OrderedDict", b"(K\x01t")), "than pairs"),
    "size of text": (program(call("torch", "Size", text("abc"))), "torch.Size of something else"),
    "tensor of nothing": (
        program(call("torch._utils", "_rebuild_tensor_v2", b"NNNN")),
        "something else than a storage",
    ),
    "tensor without arguments": (program(call("torch._utils", "_rebuild_tensor_v2")), "something else than a storage"),
    "parameter of text": (
        program(call("torch._utils", "_rebuild_parameter", text("w"))),
        "something else than a tensor",
    ),
    "persistent text": (program(text("storage") + b"Q"), "no storage of a tensor"),
    "persistent tuple": (program(b"(" + text("module") + b"NNNNtQ"), "no storage of a tensor"),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_program_is_refused(raw: bytes, message: str) -> None:
    refuses(raw, message)


# --- cost ------------------------------------------------------------------------------------------------------------


def colliding_integers() -> bytes:
    modulus = 2**61 - 1
    numbers = b"".join(b"\x8a\x10" + (modulus * (i + 1)).to_bytes(16, "little") + b"N" for i in range(100_000))
    return program(b"}(", numbers, b"u")


def doubled() -> bytes:
    """A list of two references to a list of two references to ...: 2**64 leaves."""
    value: list[Any] = []
    for _ in range(64):
        value = [value, value]
    return pickle.dumps(value, 2)


COSTLY = {
    "colliding integers as keys": (colliding_integers(), "beyond 2\\*\\*60"),
    "tuples as keys": (
        program(b"}(", *(b"M%c%c\x85N" % (i % 256, i // 256) for i in range(9000)), b"u"),
        "4096 tuples",
    ),
    "deep marks": (program(b"(" * 200_000), "nested more than"),
    "deep lists": (program(b"]" * 10 + b"a" * 9), "holds \\[\\["),
    "deep tuples": (program(b")" + b"\x85" * 300_000), "expected a dict of tensors"),
    "many sets": (program(b"(" + b"\x8f" * 20_000 + b"t"), "would make objects of more than"),
    "many dicts": (program(b"(" + b"}NNs" * 20_000 + b"t"), "would make objects of more than"),
    "copies of a list": (
        program(b"]q\x00(" + b"N)\x86" * 500 + b"e0(" + b"ccollections\nOrderedDict\nh\x00\x85R" * 1_000 + b"t"),
        "would make objects of more than",
    ),
    "sizes of a list": (
        program(b"]q\x00(" + b"N" * 100_000 + b"e0(" + b"ctorch\nSize\nh\x00\x85R" * 1_000 + b"t"),
        "would make objects of more than",
    ),
    "doubled lists": (doubled(), "expected a dict of tensors"),
    "a long name, in many names": (
        program(text("torch.optim." + "a" * 2**20) + b"q\x00(", *(b"h\x00" + text(i) + b"\x93" for i in "ab"), b"t"),
        "longer than 1,024 characters",
    ),
}


@pytest.mark.parametrize(("raw", "message"), COSTLY.values(), ids=COSTLY)
def test_what_would_take_long_or_much_is_refused(raw: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "BUDGET", 2**21 if "objects" in message else 2**25)
    refuses(raw, message)


def test_long_keys_beside_the_model_are_not_shown_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    data = saved({"w": torch.ones(1), (b"\xff" * 2**22,) * 5: 1}, pickle_protocol=4)
    tracemalloc.start()
    try:
        assert list(opened(data).entries) == ["w"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "is left out" in caplog.text
    assert peak < 2**24  # the pickle, twice, and the key; not what would be four times as long


def test_a_structure_of_exponential_size_is_not_walked() -> None:
    value: Any = {"w": 1}
    for _ in range(200):
        value = dict.fromkeys(("state_dict", "model", "module", "params", "net", "ema"), value)
    refuses(pickle.dumps(value, 2), "holds no dict of tensors")


def test_a_pickle_that_holds_itself_is_refused_without_recursion() -> None:
    refuses(program(b"]q\x00h\x00a"), "expected a dict of tensors")
    refuses(program(b"}q\x00" + text("model") + b"h\x00s"), "holds no dict of tensors")


def test_a_pickle_beyond_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd_mecha.storage.pytorch.reader.MAX_PICKLE", 1000)
    with pytest.raises(FileFormatError, match="expected at most 1000"):
        opened(with_pickle(program(text("x" * 2000))))
    monkeypatch.setattr("sd_mecha.storage.pytorch.reader._WINDOW", 500)
    with pytest.raises(FileFormatError, match="before it is complete"):
        opened(legacy_with_pickle(program(text("x" * 2000))))


# --- anything at all -------------------------------------------------------------------------------------------------

FILES = [saved(small_model(), new) for new in (True, False)]
GLOBAL_WORDS = ["Size", "FloatStorage", "float16", "Tensor"]
GLOBAL_WORDS += ["_utils._rebuild_tensor_v2", "_utils._rebuild_tensor_v3", "_utils._rebuild_parameter"]
GLOBAL_WORDS += ["_tensor._rebuild_from_type_v2", "nn.parameter.Parameter"]
WORDS = st.sampled_from(
    [
        *(bytes([code]) for code in b"()]}N01tRbsuaeQ.\x81\x85\x86\x87\x88\x8f\x90\x91\x92\x93\x94"),
        *(b"c%s\n%s\n" % tuple(f"torch.{name}".encode().rsplit(b".", 1)) for name in GLOBAL_WORDS),
        *(b"q\x00", b"h\x00", b"h\x01", b"K\x02", b"\x8a\x08" + bytes(7) + b"\x40", b"G\x7f\xf8" + bytes(6)),
        *(b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n"),
        *map(text, ("storage", "state_dict", "0", "w")),
    ]
)


def damaged(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, piece in edits:
        at = place % (len(data) + 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = data[:at] + piece + data[at + len(piece) :]
    return data


EDIT = st.tuples(
    st.sampled_from(["cut", "insert", "delete", "replace", "replace"]),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=9),
)
EDITS = st.lists(EDIT, min_size=1, max_size=4)


def survives(data: bytes) -> None:
    with contextlib.suppress(MechaError):
        read_all(data)


@given(st.sampled_from(FILES), EDITS)
@settings(max_examples=300)
def test_damaged_files_give_tensors_or_errors_of_the_family(data: bytes, edits: list[tuple[str, int, bytes]]) -> None:
    survives(damaged(data, edits))


@given(st.lists(WORDS | st.binary(min_size=1, max_size=3), max_size=40))
@settings(max_examples=400)
def test_random_programs_give_values_or_errors_of_the_family(parts: list[bytes]) -> None:
    raw = program(*parts)
    with contextlib.suppress(MechaError):
        PickleMachine(raw, TorchNames(), "random").run()
    survives(with_pickle(raw))


@pytest.mark.slow
@given(st.sampled_from(FILES), EDITS, st.lists(WORDS | st.binary(min_size=1, max_size=3), max_size=80))
@settings(max_examples=4000, suppress_health_check=list(HealthCheck))
def test_much_damage_and_many_programs(data: bytes, edits: list[tuple[str, int, bytes]], parts: list[bytes]) -> None:
    survives(damaged(data, edits))
    survives(with_pickle(program(*parts)))
    survives(legacy_with_pickle(program(*parts)))
