"""What the headers of image files say, kept from one run to the next."""

from __future__ import annotations

import logging
import os
import stat
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from .cache import cache_file, write_cache
from .images import (
    DEEP_MODES,
    MACHINE_ERRORS,
    exif_orientation,
    extremes,
    is_deep_color,
    turned_size,
)

logger = logging.getLogger(__name__)

DEEP_COLOR = "16-bit color"  # in place of a mode

_THREADS, _CHUNK = 16, 100  # a network drive answers slowly, but many at once; files of a task
_MANY = 2000  # images, from which on the user may have to wait
_decoding = threading.Semaphore(4)  # how many decoded images are in memory


class Header(msgspec.Struct, array_like=True, omit_defaults=True):
    """What is known of a file.

    Attributes:
        num_bytes, mtime_ns: of the file; if they change, it is read again.
        width, height: in pixels, after the EXIF orientation is applied.
        orientation: EXIF's, 1 to 8.
        mode: of Pillow, or ``DEEP_COLOR``, where there are more than 8 bits.
        low, high: of its values, in that case.
        problem, detail: why the file cannot be used; the rest is then not known.
    """

    num_bytes: int = 0
    mtime_ns: int = 0
    width: int = 0
    height: int = 0
    orientation: int = 1
    mode: str = ""
    low: float = 0
    high: float = 0
    problem: str = ""
    detail: str = ""


def read_headers(image_root: str, names: list[str]) -> dict[str, Header]:
    """Read the headers of files, or what an earlier run has kept of them.

    All pixels are decoded where nothing else tells whether a file is complete, and where there are
    more than 8 bits.

    Args:
        image_root: directory of the images.
        names: of different files, relative to ``image_root``.

    Returns:
        name -> header. What is wrong with a file is said there.

    Raises:
        OSError: the machine is short of memory, or of files that may be open at a time.
    """
    cached = cache_file("headers", image_root)
    try:
        with open(cached, "rb") as f:
            cache = msgspec.msgpack.decode(f.read(), type=dict[str, Header])
    except (OSError, msgspec.MsgspecError):  # none yet, or damaged
        cache = {}

    def read(chunk: list[str]) -> list[Header]:
        return [_read_header(os.path.join(image_root, name), cache.get(name)) for name in chunk]

    headers = []
    if len(names) > _MANY:
        logger.info(f"reading the headers of {len(names)} images in {image_root}")
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(_THREADS) as pool,
        # On a terminal, where it takes longer than a second.
        tqdm(total=len(names), disable=True if len(names) <= _MANY else None, delay=1) as bar,
    ):
        warnings.simplefilter("ignore")  # one from each file; what matters is said for all
        for chunk in pool.map(read, (names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK))):
            headers += chunk
            bar.update(len(chunk))
    found = dict(zip(names, headers, strict=True))
    fresh = {n: h for n, h in found.items() if not h.problem and h is not cache.get(n)}
    if fresh:
        content = msgspec.msgpack.encode(cache | fresh)
        write_cache(cached, lambda path: Path(path).write_bytes(content))
    return found


def _read_header(path: str, cached: Header | None) -> Header:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return Header(problem="a directory")
        if not stat.S_ISREG(status.st_mode):  # would be waited for, without end
            return Header(problem="a pipe or a device")
        if not status.st_size:
            return Header(problem="an empty file")
        if cached and (cached.num_bytes, cached.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return cached
        with open(path, "rb") as f:
            header = _decode(f)
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            return Header(problem="a link to a file that does not exist")
        return Header(problem=f"cannot be read ({error.strerror})")
    header.num_bytes, header.mtime_ns = status.st_size, status.st_mtime_ns
    return header


def _decode(f: BinaryIO) -> Header:
    """The header of an open file. Reads the pixels only where they are needed."""
    start = f.read(64)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return Header(problem="a web page (it starts with '<')")
    f.seek(0)
    try:
        with Image.open(f) as image:
            # Pillow turns a TIFF as it is decoded, and deletes the orientation.
            orientation = exif_orientation(image) if image.format == "TIFF" else 1
            deep_color = is_deep_color(image)
            if deep_color or image.mode in DEEP_MODES or not _is_complete(f, image):
                with _decoding:
                    image.load()
            width, height = turned_size(image)
            orientation = max(orientation, exif_orientation(image))
            header = Header(width=width, height=height, orientation=orientation)
            if image.mode in DEEP_MODES:
                header.mode = image.mode
                header.low, header.high = extremes(image)
            elif deep_color:
                header.mode = DEEP_COLOR
                bands = image.convert("RGB").getextrema()
                header.high = 256.0 * max(high + 1 for _, high in bands)
            return header
    except MemoryError:
        raise
    except UnidentifiedImageError:
        if start.startswith((b"\xff\xd8\xff", b"\x89PNG")):
            return Header(problem="truncated or damaged")
        return Header(problem="no image that Pillow knows", detail=f"starts with {start[:12]!r}")
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return Header(problem=f"more than {limit} pixels, which Pillow refuses (cut it into tiles)")
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        return Header(problem="truncated or damaged", detail=f"{type(error).__name__}: {error}")


def _is_complete(f: BinaryIO, image: Image.Image) -> bool:
    """Whether all of a file is there and its header tells all that is asked here; False where only
    decoding it can say so."""
    if image.format in ("JPEG", "MPO"):
        f.seek(-2, os.SEEK_END)
        return f.read() == b"\xff\xd9"
    if image.format == "PNG":
        f.seek(8)
        pixels = False
        while len(chunk := f.read(8)) == 8:
            length, kind = struct.unpack(">I4s", chunk)
            if kind == b"IEND":
                return True
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return False  # may hold an orientation, which Pillow finds after the pixels
            pixels |= kind == b"IDAT"
            f.seek(length + 4, os.SEEK_CUR)
    return False
