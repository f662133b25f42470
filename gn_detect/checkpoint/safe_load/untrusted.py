"""What all readers of untrusted files share: why a file is refused, and reading within bounds."""

from __future__ import annotations

from typing import BinaryIO


class Refusal(Exception):
    """What a file asks for that weights do not need: the end of a sentence about the file."""


class Damage(Exception):
    """How a file differs from what its format demands: the end of a sentence about the file."""


class Window:
    """A part of a file; reading past its end is damage, and takes no memory.

    Args:
        file: seekable.
        start, end: of the part, in bytes.
    """

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._file, self.position, self.end = file, start, end
        file.seek(start)

    def read(self, size: int) -> bytes:
        self.position += size
        if self.position > self.end:
            raise Damage("it ends in the middle of its content")
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self.end - self.position)
        self.position += len(line)
        return line
