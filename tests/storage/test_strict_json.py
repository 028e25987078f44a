"""JSON of unknown origin: strict where it matters, and never of more memory than it was given."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable

import pytest

from sd_mecha.checksums import CHECKSUMS_KEY, Checksums
from sd_mecha.errors import FileFormatError
from sd_mecha.storage import strict_json
from sd_mecha.storage.safetensors_header import parse_header
from sd_mecha.storage.strict_json import parse_object


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n \t", b"\xef\xbb\xbf\r\n"])
def test_white_space_and_a_byte_order_mark_around_it_mean_nothing(before: bytes) -> None:
    assert parse_object(before + b'{"a": [1]}\n', "x") == {"a": [1]}


@pytest.mark.parametrize(
    "raw", [b"[1]", b"", b"\xff", b"{", b'{"a": NaN}', b'{"a": 1, "a": 1}', b'{"a":' + b"[" * 99999]
)
def test_what_is_wrong_is_not_said_of_a_header(raw: bytes) -> None:
    with pytest.raises(FileFormatError, match=r"^index\.json: ") as caught:
        parse_object(raw, "index.json")
    assert "header" not in str(caught.value)


def listed(value: str) -> Callable[[int], bytes]:
    return lambda count: ('{"a":[' + f"{value}," * count + "0]}").encode()


def mapped(value: str) -> Callable[[int], bytes]:
    return lambda count: ('{"__metadata__":{' + ",".join(f'"{n:06x}":{value}' for n in range(count)) + "}}").encode()


def repeated(before: str, letter: str, after: str) -> Callable[[int], bytes]:
    return lambda count: ('{"__metadata__":{"a":"' + before + letter * count + after + '"}}').encode()


def tensors(count: int) -> bytes:
    return json.dumps(
        {f"{n:07x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}
    ).encode()


HOSTILE = {
    "lists": listed("[]"),
    "lists of lists": listed("[[[[]]]]"),
    "objects": listed("{}"),
    "objects of a number": listed('{"b":0}'),
    "numbers": listed("999"),
    "texts": listed('"ab"'),
    "texts that end like texts within texts": listed('"ab\\\\"'),
    "a map to texts": mapped('"vv"'),
    "a map to texts that end like texts within texts": mapped('"vv\\\\"'),
    "a map to numbers": mapped("99999999999"),
    "a map to objects": mapped('{"b":0}'),
    "a name twice": lambda count: mapped("0")(count)[:-2] + b',"000000":0}}',
    "empty tensors": tensors,
    "a text": repeated("", "x", ""),
    "a text with an escape": repeated("", "x", "\\n"),
    "a wide text": repeated("\u0416", "x", ""),
    "a text with an escape for a wide letter": repeated("\\u0416", "x", ""),
    "a wider text": repeated("", "x", "\U0001f600\\n"),
    "a text with a pair of escapes": repeated("", "x", "\\ud83d\\ude00"),
    "a text with half a pair of escapes": repeated("\U0001f600", "x", "\\uD83D"),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_no_header_takes_more_memory_than_the_limit(
    make: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 6_000_000
    monkeypatch.setattr(strict_json, "_MAX_MEMORY", limit, raising=False)
    for count in (2**power for power in range(10, 24)):
        raw, said = make(count), ""
        tracemalloc.start()
        try:
            parse_header(raw, 0, "x")
        except FileFormatError as error:
            said = str(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak + len(raw) <= limit + 2**16
        if "too large" in said:
            assert peak < 2**16
            return
    pytest.fail("none was refused")


def test_there_is_room_for_large_models_and_their_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand tensors and the checksums of three inputs, and a hundredth of the limit."""
    monkeypatch.setattr(strict_json, "_MAX_MEMORY", 4_800_000, raising=False)
    keys = [f"model.layers.{n}.mlp.experts.7.down_proj.weight" for n in range(1000)]
    sums = {key: f"{n:016x}" for n, key in enumerate(keys)}
    text = Checksums(sums, {f"\u043c\u043e\u0434\u0435\u043b\u044c-{n}": sums for n in range(3)}).to_text()
    header: dict[str, object] = {
        "__metadata__": {CHECKSUMS_KEY: text, "recipe": "\u043c\u043e\u0434\u0435\u043b\u044c"}
    }
    header |= {
        key: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * n, 2 * n + 2]} for n, key in enumerate(keys)
    }
    entries, metadata = parse_header(json.dumps(header, ensure_ascii=False).encode(), 2000, "x")
    assert list(entries) == keys
    assert Checksums.from_text(metadata[CHECKSUMS_KEY], "x").output == sums


@pytest.mark.parametrize("name", ["models/\U0001f600", "C:\\udata", "C:\\upscale", "m\u043e"])
def test_escapes_of_a_text_within_a_text_make_nothing_wide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    keys = {f"model.layers.{n}.mlp.experts.7.down_proj.weight": f"{n:064x}" for n in range(1000)}
    needed = []
    for model in ("plain", name):
        raw = json.dumps({"__metadata__": {CHECKSUMS_KEY: Checksums(keys, {model: keys}).to_text()}}).encode()
        monkeypatch.setattr(strict_json, "_MAX_MEMORY", 0)
        with pytest.raises(FileFormatError, match="may take") as caught:
            parse_object(raw, "x")
        needed.append(int(str(caught.value).split(" may take ")[1].split()[0]))
    assert needed[1] < needed[0] + 1000
