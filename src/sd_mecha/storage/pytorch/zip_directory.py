"""The members of a zip archive whose data lies in it as it is, found by reading its directory only.

What a checkpoint needs of the format is little, and everything else is refused: compression, encryption, archives of
several files, members that overlap or leave the file, names that occur twice, a directory and headers that disagree.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, NoReturn

from sd_mecha.errors import FileFormatError
from sd_mecha.storage.contract import ByteSource
from sd_mecha.storage.strict_json import brief

MAX_MEMBERS = 500_000
MAX_DIRECTORY = 2**26
"""The longest directory that is read, in bytes."""

_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_MEMBER = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 2**16 - 1
_FULL16, _FULL32 = 2**16 - 1, 2**32 - 1
_ENCRYPTED = 0x1 | 0x40 | 0x2000


class Member(NamedTuple):
    """A member: where its header begins, its size, and where the next one begins."""

    name: bytes
    header: int
    size: int
    limit: int


class ZipDirectory:
    """The directory of an archive.

    Args:
        file: the archive, which stays open.
        largest: how many bytes the directory may have.

    Raises:
        FileFormatError: it is broken, or not of the plain kind.
    """

    def __init__(self, file: ByteSource, largest: int = MAX_DIRECTORY) -> None:
        self._file = file
        self._largest = largest
        self.members: dict[str, Member] = {}
        count, size, offset = self._find()
        found: list[tuple[int, int, bytes]] = []
        raw, at = file.read(offset, size), 0
        for _ in range(count):
            member, at = self._entry(raw, at)
            found.append(member)
        if at != size:
            self._fail(f"its directory has {size} bytes, but its {count} entries have {at}")
        if not found:
            self._fail("its directory is empty")
        found.sort()
        for (header, length, name), (limit, _, _) in zip(found, [*found[1:], (offset, 0, b"")], strict=True):
            if header + _LOCAL.size + len(name) + length > limit:
                self._fail(f"member {brief(name)} of {length} bytes at byte {header} reaches into what follows")
            self.members[name.decode("utf-8", "surrogateescape")] = Member(name, header, length, limit)
        if len(self.members) != count:
            self._fail("it names a member twice")

    def data_offset(self, member: Member) -> int:
        """Where the data of a member begins, which its own header says."""
        name, header, size, limit = member
        raw = self._file.read(header, _LOCAL.size + len(name))
        magic, _, flags, method, *_, name_size, extra_size = _LOCAL.unpack_from(raw)
        if magic != b"PK\x03\x04" or raw[_LOCAL.size :] != name or name_size != len(name):
            self._fail(f"its directory says that member {brief(name)} is at byte {header}, where it is not")
        if flags & _ENCRYPTED or method:
            self._fail(f"member {brief(name)} is compressed or encrypted, although the directory says it is not")
        begin = header + _LOCAL.size + len(name) + int(extra_size)
        if begin + size > limit:
            self._fail(f"member {brief(name)} of {size} bytes at byte {begin} reaches into what follows")
        return begin

    def read(self, member: Member, limit: int) -> bytes:
        """A small member as a whole."""
        if member.size > limit:
            self._fail(f"member {brief(member.name)} has {member.size} bytes; expected at most {limit}")
        return self._file.read(self.data_offset(member), member.size)

    def _find(self) -> tuple[int, int, int]:
        """Entries, bytes and place of the directory, from the record at the end of the file."""
        total = self._file.size
        start = max(total - _END.size - _MAX_COMMENT, 0)
        tail = self._file.read(max(total - 4096, 0), min(total, 4096))
        if tail[-_END.size :][:4] != b"PK\x05\x06":
            tail = self._file.read(start, total - start)
        place = tail.rfind(b"PK\x05\x06")
        while place >= 0 and not _ends(tail, place):
            place = tail.rfind(b"PK\x05\x06", 0, place)
        if place < 0:
            self._fail("it has no directory at its end; the file is truncated, fetch it again")
        _, disk, first_disk, here, count, size, offset, _ = _END.unpack_from(tail, place)
        end = total - len(tail) + place
        if _FULL16 in (disk, first_disk, here, count) or _FULL32 in (size, offset):
            end, disk, first_disk, here, count, size, offset = self._find64(end)
        if disk or first_disk or here != count:
            self._fail("it is one of an archive's several files")
        if count > MAX_MEMBERS or size > self._largest:
            limit = f"{MAX_MEMBERS} members and {self._largest} bytes of directory"
            self._fail(f"it has {count} members in {size} bytes; expected at most {limit}")
        if count * _MEMBER.size > size or offset + size > end:
            self._fail(f"its directory of {count} members and {size} bytes at byte {offset} does not fit")
        return count, size, offset

    def _find64(self, end: int) -> tuple[int, ...]:
        problem = "its directory needs the record of large archives, which is not there"
        if end < _END64_PLACE.size:
            self._fail(problem)
        magic, _, place, _ = _END64_PLACE.unpack(self._file.read(end - _END64_PLACE.size, _END64_PLACE.size))
        if magic != b"PK\x06\x07" or place + _END64.size + _END64_PLACE.size > end:
            self._fail(problem)
        magic, _, _, _, disk, first, here, count, size, offset = _END64.unpack(self._file.read(place, _END64.size))
        if magic != b"PK\x06\x06":
            self._fail(problem)
        return place, disk, first, here, count, size, offset

    def _entry(self, raw: bytes, at: int) -> tuple[tuple[int, int, bytes], int]:
        if at + _MEMBER.size > len(raw):
            self._fail("its directory ends within an entry")
        fields = _MEMBER.unpack_from(raw, at)
        magic, _, _, flags, method, _, _, _, packed, size, name_size, extra_size, comment_size, disk, _, _, header = (
            fields
        )
        name_end = at + _MEMBER.size + name_size
        end = name_end + extra_size + comment_size
        name = raw[at + _MEMBER.size : name_end]
        if magic != b"PK\x01\x02" or end > len(raw):
            self._fail("its directory is broken")
        if flags & _ENCRYPTED:
            self._fail(f"member {brief(name)} is encrypted; decrypt the file first")
        if method:
            self._fail(
                f"member {brief(name)} is compressed, which torch.save never does; unpack the archive and pack it "
                "again without compression, or load it with PyTorch and save it again"
            )
        if _FULL32 in (packed, size, header):
            packed, size, header = self._large(raw[name_end : name_end + extra_size], packed, size, header)
        if packed != size or disk not in (0, _FULL16):
            self._fail(f"member {brief(name)} has {packed} bytes in the file that stand for {size}")
        return (header, size, name), end

    def _large(self, extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
        """Numbers too large for an entry, which stand in an extra field of kind 1, in this order."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            at += 4
            if at + length > len(extra):
                self._fail("an extra field in its directory is longer than its entry")
            if kind == 1:
                numbers = [value for (value,) in struct.iter_unpack("<Q", extra[at : at + length // 8 * 8])]
                found = []
                for value in (size, packed, header):
                    if value == _FULL32 and numbers:
                        value = numbers.pop(0)
                    found.append(value)
                return found[1], found[0], found[2]
            at += length
        return packed, size, header

    def _fail(self, problem: str) -> NoReturn:
        raise FileFormatError(f"{self._file.name}: cannot read this zip archive: {problem}")


def _ends(tail: bytes, place: int) -> bool:
    """Whether the record at that place, with its comment, is the last thing in the file."""
    return place + _END.size + int.from_bytes(tail[place + 20 : place + 22], "little") == len(tail)
