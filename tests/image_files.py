"""Image files that Pillow does not write."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = value
    return exif


def write_png(path: str | Path, pixels: np.ndarray, orientation: int = 1) -> None:
    """A PNG of (height, width, 3) uint8 or uint16, with its EXIF orientation behind the pixels."""
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    size = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 8 * pixels.itemsize, 2, 0, 0, 0)
    exif, data = with_orientation(orientation).tobytes()[6:], b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + size, b"IDAT" + zlib.compress(rows), b"eXIf" + exif, b"IEND"):
        data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    Path(path).write_bytes(data)
