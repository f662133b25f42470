"""The directory of the zip archives that ``torch.save`` writes (since PyTorch 1.6).

Only what it writes is taken: members stored as they are, one after the other, none twice, and a
directory that can be read in one way. PyTorch's reader checks none of this, so a file could show
it other members than it shows us. Layout: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import re
import stat
import struct
from typing import BinaryIO

from .untrusted import Damage, Refusal

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_MAX_MEMBERS = 100_000
_MEMBERS = re.compile(
    r"data\.pkl|byteorder|version|\.data/serialization_id|\.format_version|\.storage_alignment"
    r"|data/[0-9A-Za-z_]+"
)


def read_directory(file: BinaryIO, size: int) -> dict[str, tuple[int, int]]:
    """The members of the archive.

    Args:
        file: starts with the archive, which is all of it.
        size: of the file in bytes.

    Returns:
        name without the root folder -> first byte, byte after the last.

    Raises:
        Refusal: it is another kind of archive than ``torch.save`` writes.
        Damage: it is cut off or inconsistent.
    """
    count, start, end = _find_directory(file, size)
    file.seek(start)
    directory = file.read(end - start)
    entries, position = [], 0
    for _ in range(count):
        name, header, length, position = _read_entry(directory, position)
        entries.append((header, length, name))
    if position != len(directory):
        raise Damage("its zip directory has another length than its entries")
    members = {}
    roots, seen = set(), set()
    free = 0  # the first byte that is not of a member before
    for header, length, name in sorted(entries):
        first = _start_of_data(file, header, length, name, start)
        if header < free:
            raise Refusal("it is a zip archive with members that overlap")
        free = first + length
        root, member = _split(name)
        roots.add(root)
        if member.lower() in seen:  # PyTorch's reader does not tell upper from lower case
            raise Refusal(f"it is a zip archive with two members {name!r}")
        seen.add(member.lower())
        members[member] = (first, free)
    if len(roots) != 1 or "data.pkl" not in members:
        raise Refusal("it is a zip archive without the one folder that torch.save writes")
    return members


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of entries, first byte, byte after the last."""
    tail_size = min(size, _END.size + _LOCATOR.size + _END64.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise Damage("it is a zip archive without its end")
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    tail = tail[: -_END.size]
    if len(tail) >= _LOCATOR.size and tail[-_LOCATOR.size :][:4] == b"PK\6\7":
        _, disk64, end64, disks = _LOCATOR.unpack(tail[-_LOCATOR.size :])
        end = size - _END.size - _LOCATOR.size - _END64.size
        if end64 != end or disk64 != 0 or disks > 1:
            raise Damage("its zip directory has two ends")
        sig, rest, _, _, *numbers = _END64.unpack(tail[: _END64.size])
        short = (disk, first_disk, here, count, length, start)
        maxima = (_MAX16,) * 4 + (_MAX32,) * 2
        if sig != b"PK\6\6" or rest != _END64.size - 12:
            raise Damage("its zip directory has two ends")
        for narrow, wide, largest in zip(short, numbers, maxima, strict=True):
            if narrow not in (wide, largest):
                raise Damage("its zip directory has two ends that differ")
        disk, first_disk, here, count, length, start = numbers
    if (disk, first_disk, comment) != (0, 0, 0) or here != count or start + length != end:
        raise Damage("its zip directory is inconsistent")
    if count > _MAX_MEMBERS:
        raise Refusal(f"it is a zip archive of more than {_MAX_MEMBERS:,} members")
    return count, start, end


def _read_entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """Name, first byte of the local header, length, and the position of the next entry."""
    (sig, _, _, flags, method, _, _, _, packed, length, *rest) = _ENTRY.unpack_from(
        directory, position
    )
    name_length, extra_length, comment_length, disk, _, attributes, header = rest
    position += _ENTRY.size
    raw = directory[position : position + name_length]
    extra = directory[position + name_length : position + name_length + extra_length]
    name = raw.decode("utf-8")
    if sig != b"PK\1\2" or len(raw) != name_length or len(extra) != extra_length or disk:
        raise Damage("its zip directory is inconsistent")
    if flags & ~0x0808:  # sizes after the data; names in UTF-8
        raise Refusal(f"its member {name!r} is encrypted")
    if stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
        raise Refusal(f"its member {name!r} is a link or a folder")
    wide = [value == _MAX32 for value in (length, packed, header)]
    numbers = iter(_read_zip64(extra, sum(wide)))
    length, packed, header = (
        next(numbers) if is_wide else value
        for value, is_wide in zip((length, packed, header), wide, strict=True)
    )
    if method != 0 or packed != length:
        raise Refusal(f"its member {name!r} is compressed, as torch.save never does")
    return name, header, length, position + name_length + extra_length + comment_length


def _read_zip64(extra: bytes, count: int) -> tuple[int, ...]:
    found, position = [], 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            found.append(extra[position + 4 : position + 4 + size])
        position += 4 + size
    if len(found) > 1 or (count and not found) or (found and len(found[0]) < 8 * count):
        raise Damage("its zip directory is inconsistent")
    return struct.unpack_from(f"<{count}Q", found[0]) if count else ()


def _start_of_data(file: BinaryIO, header: int, length: int, name: str, end: int) -> int:
    if header + _LOCAL.size > end:
        raise Damage(f"its member {name!r} lies outside of it")
    file.seek(header)
    sig, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    if sig != b"PK\3\4" or method != 0 or file.read(name_length) != name.encode():
        raise Damage(f"its member {name!r} is not where its zip directory says")
    start = header + _LOCAL.size + name_length + extra_length
    if start + length > end:
        raise Damage(f"its member {name!r} lies outside of it")
    return start


def _split(name: str) -> tuple[str, str]:
    root, _, member = name.partition("/")
    if member == "constants.pkl" or member.startswith("code/"):
        raise Refusal("it is a TorchScript archive, which is a program, not weights")
    if not root or root in (".", "..") or "\\" in name or "\0" in name:
        raise Refusal(f"it is a zip archive with a member {name[:100]!r}")
    if not _MEMBERS.fullmatch(member):
        raise Refusal(f"it is a zip archive with a member {name[:100]!r}, unlike torch.save's")
    return root, member
