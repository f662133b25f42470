"""What the headers of image files say, kept from one run to the next."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

import msgspec
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm.contrib.concurrent import thread_map

from .cache import cache_file, write_cache
from .images import MACHINE_ERRORS, deep_mode, extremes, naming

_TAIL = 1 << 16  # bytes at the end of a file, in which what is behind the pixels lies
_decoding = threading.Semaphore(4)  # how many decoded images are in memory


class Header(msgspec.Struct, array_like=True, omit_defaults=True):
    """What is known of a file; of one that cannot be used, ``problem`` and ``detail`` alone."""

    width: int = 0  # pixels, after the EXIF orientation is applied
    height: int = 0
    orientation: int = 1  # EXIF's, 1 (as stored) to 8
    mode: str = ""  # see images.deep_mode
    low: int | float = 0  # extremes of the values, where there are more than 8 bits
    high: int | float = 0
    num_bytes: int = 0  # of the file; if one of these changes, it is read again
    mtime_ns: int = 0
    problem: str = ""
    detail: str = ""


def read_headers(image_root: str, names: list[str]) -> dict[str, Header]:
    """The headers of different files, by their names relative to ``image_root``, or what an earlier
    run has kept of them. What is wrong with a file is said there. All pixels are decoded where
    nothing else tells whether a file is complete, and where there are more than 8 bits.

    Raises:
        OSError, MemoryError: the machine is short of memory, or of files that may be open at once.
    """
    cached = cache_file("headers", image_root)
    try:
        cache = msgspec.msgpack.decode(Path(cached).read_bytes(), type=dict[str, Header])
    except (OSError, msgspec.MsgspecError):  # none yet, or damaged
        cache = {}
    chunks = [names[i : i + 100] for i in range(0, len(names), 100)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one from each file; what matters is said for all
        headers = thread_map(
            lambda chunk: [_read_header(os.path.join(image_root, n), cache.get(n)) for n in chunk],
            chunks,
            max_workers=16,  # a network drive answers slowly, but many at once
            desc="headers of the images, in hundreds",
            disable=None,  # on a terminal,
            delay=1,  # where it takes longer than a second
        )
    found = dict(zip(names, (h for chunk in headers for h in chunk), strict=True))
    if fresh := {n: h for n, h in found.items() if not h.problem and h is not cache.get(n)}:
        write_cache(cached, lambda p: Path(p).write_bytes(msgspec.msgpack.encode(cache | fresh)))
    return found


def image_size(file_name: str) -> tuple[int, int]:
    """Width and height of an image as :func:`.images.read_image` gives it.

    Raises:
        DataError: the file is no image, or not complete.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f:
        header = _decode(f)
        if header.problem:
            raise ValueError(f"{header.problem} {header.detail}")
    return header.width, header.height


def _read_header(path: str, cached: Header | None) -> Header:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, without end
            folder = stat.S_ISDIR(status.st_mode)
            return Header(problem="a directory" if folder else "a pipe or a device")
        if not status.st_size:
            return Header(problem="an empty file")
        if cached and (cached.num_bytes, cached.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return cached
        with open(path, "rb") as f:
            header = _decode(f)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return Header(problem=f"more than {limit} pixels, which Pillow refuses (cut it into tiles)")
    except Exception as error:  # a damaged file may raise anything
        number = getattr(error, "errno", None)
        if number in MACHINE_ERRORS or isinstance(error, MemoryError):
            raise
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            return Header(problem="a link to a file that does not exist")
        if number:
            return Header(problem=f"cannot be read ({error.strerror})")
        return Header(problem="truncated or damaged", detail=f"{type(error).__name__}: {error}")
    header.num_bytes, header.mtime_ns = status.st_size, status.st_mtime_ns
    return header


def _decode(f: BinaryIO) -> Header:
    """The header of an open file. Reads the pixels only where they are needed."""
    start = f.read(64)
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return Header(problem="a web page (it starts with '<')")
    f.seek(0)
    try:
        image = Image.open(f)
    except UnidentifiedImageError:
        return Header(problem="unknown to Pillow, or cut off", detail=f"starts with {start[:12]!r}")
    # Pillow turns a TIFF as it is decoded, and deletes the orientation.
    turned = _orientation(image) if image.format == "TIFF" else 1
    mode = deep_mode(image)
    if mode or not _is_complete(f, image):
        with _decoding:
            image.load()
    orientation = _orientation(image)
    size = image.size[::-1] if orientation >= 5 else image.size
    return Header(*size, max(turned, orientation), mode, *(extremes(image, mode) if mode else ()))


def _orientation(image: Image.Image) -> int:
    try:  # of the class Image, as that of PNG images decodes all pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # as Detectron2 does
        return 1
    return orientation if orientation in range(1, 9) else 1


def _is_complete(f: BinaryIO, image: Image.Image) -> bool:
    """Whether all of a file is there and its header tells all that is asked here; False where only
    decoding it can say so."""
    if image.format in ("JPEG", "MPO"):
        f.seek(-2, os.SEEK_END)
        return f.read() == b"\xff\xd9"
    if image.format != "PNG":
        return False
    f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL))
    _, _, end = f.read().rpartition(b"IDAT")
    # What may hold an orientation, which Pillow finds behind the pixels as it decodes them.
    turns = any(word in end for word in (b"eXIf", b"exif", b"adobe.xmp"))
    return not turns and end.endswith(b"IEND\xaeB`\x82")
