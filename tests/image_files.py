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


def write_png(path: Path, pixels: np.ndarray, orientation: int = 1) -> None:
    """A PNG of 16 bits, (height, width, 1 or 3), with its EXIF orientation behind the pixels."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    exif = with_orientation(orientation).tobytes()[6:]
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"eXIf": exif, b"IEND": b""}
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
