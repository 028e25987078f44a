"""Reading what `torch.save` wrote, by range and without running it.

Since PyTorch 1.6 that is a zip archive: `X/data.pkl` describes the tensors, `X/data/KEY` holds the bytes of each
storage as they are, `X/byteorder` says how numbers lie. Before, it was a row of pickles - a magic number, a version,
the kind of computer, the tensors, the keys of the storages - and then the storages, each after its size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.file_reader import FileReader
from sd_mecha.storage.pytorch.names import Storage, StoredTensor, TorchNames, UnreadableTensor
from sd_mecha.storage.pytorch.pickle_machine import MAX_PICKLE, PickleMachine, TruncatedPickleError
from sd_mecha.storage.pytorch.state_dicts import pick_state_dict
from sd_mecha.storage.pytorch.tensors import Place, PlacedTensor, place_tensor
from sd_mecha.storage.pytorch.zip_directory import MAX_DIRECTORY, Member, ZipDirectory
from sd_mecha.storage.strict_json import brief

ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_LEGACY_VERSION = 1001
_PICKLE = re.compile(r"([^/]+)/data\.pkl")
_WINDOW = 2**20
_MEMBER, _PLACED = 256, 320  # what a member of an archive, and a tensor of the model, take from the budget of a pickle


class TorchContent:
    """What a file holds, before anything is taken from it.

    Attributes:
        value: what was saved; tensors in it are `StoredTensor` or `UnreadableTensor`.
        find: where a storage lies; a ValueError says why it cannot be read.
        swapped: whether the bytes of numbers lie the other way round.
    """

    def __init__(self, value: Any, find: Callable[[Storage], Place], swapped: bool, machine: PickleMachine) -> None:
        self.value = value
        self.find = find
        self.swapped = swapped
        self._machine = machine

    def place(self, key: str, found: object, file: ByteSource) -> PlacedTensor:
        """A tensor of it, checked."""
        self._machine.charge(_PLACED)  # keys may share a tensor
        return place_tensor(key, found, self.find, file.name, file_size=file.size, swapped=self.swapped)


class TorchReader(FileReader):
    """A PyTorch checkpoint. Opening reads its pickle, and no data.

    Args:
        file: the file, which the reader closes.

    Raises:
        FileFormatError: the file is broken, holds no tensors, or holds something that could not be read safely.
    """

    def _open(self) -> None:
        content = open_content(self._file)
        picked = pick_state_dict(content.value, is_tensor, self.name)
        placed = {key: content.place(key, found, self._file) for key, found in picked.items()}
        self._tensors = dict(sorted(placed.items(), key=lambda item: (item[1].place.order, item[1].view.offset)))
        self.entries = {key: tensor.entry for key, tensor in self._tensors.items()}
        self.metadata = {}

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill the buffer from byte `start` of that tensor on; safe from several threads.

        Raises:
            ChangedInputError: the file was replaced or shortened meanwhile.
            FileFormatError: what stands before the data contradicts the rest of the file.
        """
        self._tensors[name].read_into(self._file, name, start, buffer)


def is_tensor(value: object) -> bool:
    """Whether something in a pickle is a tensor, readable or not."""
    return type(value) is StoredTensor or type(value) is UnreadableTensor


def is_legacy(head: bytes) -> bool:
    """Whether a file begins as `torch.save` began files before PyTorch 1.6."""
    return head[:1] == b"\x80" and _LEGACY_MAGIC in head[:32]


def is_archive(file: ByteSource, head: bytes) -> bool:
    """Whether a file that begins as a zip archive is a checkpoint, as far as can be told if it is damaged."""
    if not head.startswith(ZIP_MAGIC):
        return False
    length = int.from_bytes(head[26:28], "little")
    if _PICKLE.fullmatch(head[30 : 30 + length].decode("latin-1")):
        return True
    try:
        return any(map(_PICKLE.fullmatch, ZipDirectory(file).members))
    except FileFormatError:
        return False


def open_content(file: ByteSource) -> TorchContent:
    """Read the pickle of a checkpoint of either kind.

    Raises:
        FileFormatError: it is broken, or wants something that is not on the list.
    """
    return open_archive(file) if file.read(0, min(4, file.size)) == ZIP_MAGIC else _open_legacy(file)


def open_archive(file: ByteSource, largest: int | None = None) -> TorchContent:
    """Read the pickle of a checkpoint that is a zip archive.

    Args:
        file: the archive.
        largest: how many bytes its directory and its pickle may have each, if there is less to them than to a model's.

    Raises:
        FileFormatError: it is broken, or wants something that is not on the list.
    """
    archive = ZipDirectory(file, MAX_DIRECTORY if largest is None else largest)
    members = archive.members
    pickles = [match for match in map(_PICKLE.fullmatch, members) if match]
    if len(pickles) != 1:
        _fail(file, f"the zip archive has {len(pickles)} members named */data.pkl; expected one, as torch.save writes")
    folder = pickles[0][1]
    if f"{folder}/constants.pkl" in members:
        _fail(file, "it is a TorchScript program; load it with torch.jit.load and save module.state_dict()")
    order = archive.read(members[f"{folder}/byteorder"], 64) if f"{folder}/byteorder" in members else b"little"
    if order.strip() not in (b"little", b"big"):
        _fail(file, f"its byte order is {brief(order)}; expected 'little' or 'big'")
    raw = archive.read(members[pickles[0][0]], MAX_PICKLE if largest is None else largest)
    machine = PickleMachine(raw, TorchNames(), file.name)
    machine.charge(_MEMBER * len(members))
    value = machine.run()
    if machine.at != len(raw):
        _fail(file, f"{len(raw) - machine.at} bytes follow the pickle in {pickles[0][0]!r}; expected none")
    places: dict[str, Place] = {}

    def find(storage: Storage) -> Place:
        place = places.get(storage.key)
        member = members.get(f"{folder}/data/{storage.key}")
        if member is None or member.size != storage.nbytes:
            got = "is not in the archive" if member is None else f"has {member.size} bytes"
            raise ValueError(f"its storage {brief(storage.key)} {got}; expected {storage.nbytes} bytes")
        if place is None:
            place = places[storage.key] = Place(_located(archive, member), member.header)
        return place

    return TorchContent(value, find, order.strip() == b"big", machine)


def _located(archive: ZipDirectory, member: Member) -> Callable[[], int]:
    return lambda: archive.data_offset(member)


def _open_legacy(file: ByteSource) -> TorchContent:
    names = TorchNames()
    (_, version, system, value, keys), machine = _read_pickles(file, names)
    at = machine.at
    if version != _LEGACY_VERSION:
        _fail(file, f"its version is {brief(version)}; expected {_LEGACY_VERSION}")
    if type(system) is not dict or type(keys) is not list:
        _fail(file, "what follows its magic number is not what torch.save writes")
    places: dict[str, Place] = {}
    for key in keys:
        storage = names.storages.get(key) if type(key) is str else None
        if storage is None or key in places:
            _fail(file, f"it lists a storage {brief(key)} that no tensor has, or lists it twice")
        places[key] = Place(_sized(file, storage, at), at)
        at += 8 + storage.nbytes
    if at != file.size:
        problem = "the file is truncated, fetch it again" if at > file.size else "something else follows"
        _fail(file, f"its storages end at byte {at}, the file at byte {file.size}; {problem}")

    def find(storage: Storage) -> Place:
        if storage.key not in places or names.storages[storage.key].nbytes != storage.nbytes:
            raise ValueError(f"its storage {brief(storage.key)} of {storage.nbytes} bytes is not in the file")
        return places[storage.key]

    return TorchContent(value, find, False, machine)  # these were written little-endian on every machine


def _read_pickles(file: ByteSource, names: TorchNames) -> tuple[list[Any], PickleMachine]:
    """The five pickles at the beginning, whose length nothing says: more is read until they are complete.

    The machine is that of the last one.
    """
    length = min(file.size, _WINDOW)
    while True:
        data = file.read(0, length)
        values: list[Any] = []
        at = 0
        budget: int | None = None
        names.storages.clear()
        try:
            while len(values) < 5:
                machine = PickleMachine(data, names, file.name, at, budget)
                values.append(machine.run())
                at, budget = machine.at, machine.budget
        except TruncatedPickleError:
            if length == min(file.size, MAX_PICKLE):
                raise
            length = min(length * 4, file.size, MAX_PICKLE)
        else:
            return values, machine


def _sized(file: ByteSource, storage: Storage, at: int) -> Callable[[], int]:
    def locate() -> int:
        raw = file.read(at, 8)
        if int.from_bytes(raw, "little") != storage.numel:
            _fail(file, f"storage {brief(storage.key)} at byte {at} has another size there than in the pickle")
        return at + 8

    return locate


def _fail(file: ByteSource, problem: str) -> NoReturn:
    raise FileFormatError(f"{file.name}: cannot read this PyTorch checkpoint: {problem}")
