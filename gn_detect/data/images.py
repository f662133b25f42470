"""Pixels of an image file: as Detectron2 reads them, and with one rule for more than 8 bits."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from gn_detect.config import ConfigError

from . import DataError

# Modes of Pillow with more than 8 bits. It would clip them at 255, and 16-bit photos become white.
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
RANGE_KEY = "INPUT.BIT_DEPTH_RANGE (in lazy configs bit_depth_range of the mappers)"
DEEP_COLOR_SENTENCE = (
    f"{RANGE_KEY} does not act on colors of 16 bits, of which Pillow gives the upper 8 (value // "
    "256); convert the images to 8 bits, or to one channel of 16 bits"
)

MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file that was opened


@contextlib.contextmanager
def naming(file_name: str, errors: type[Exception] | tuple = Exception) -> Iterator[None]:
    """Raise what is wrong with an image as a DataError.

    A damaged file may raise anything in Pillow (RuntimeError for AVIF, struct.error for TIFF).
    What is not the fault of the image is raised as it is.
    """
    try:
        yield
    except (ConfigError, DataError, ImportError, MemoryError):
        raise
    except errors as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise DataError(
            f"cannot use the image {file_name} ({type(error).__name__}: {error}); replace it, or "
            "leave it out"
        ) from error


def read_image(
    file_name: str, format: str | None = None, *, bit_depth_range: Sequence[float] = ()
) -> np.ndarray:
    """Detectron2's ``read_image``, with images of more than 8 bits scaled to 8.

    Of 8-bit images the result is the same, except for TIFF files with an EXIF orientation: recent
    Pillow applies it while it decodes them, and Detectron2 a second time.

    Args:
        file_name: path of the image.
        format: ``"BGR"``, ``"YUV-BT.601"`` or a mode of Pillow; None for that of the file.
        bit_depth_range: see :func:`value_range`.

    Returns:
        (height, width, channels) uint8, the EXIF orientation applied; (height, width) where
        ``format`` is None and the image is gray.

    Raises:
        ConfigError: ``bit_depth_range`` is no range.
        DataError: the file cannot be decoded, or holds values beyond the range.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f:
        image = Image.open(f)
        if is_deep_color(image) and not takes_deep_color(bit_depth_range):
            raise DataError(f"{file_name}: {DEEP_COLOR_SENTENCE}")
        image.load()  # a TIFF is turned here, and then has no orientation any more
        image = _apply_exif_orientation(image)
        if image.mode in DEEP_MODES:
            image = _to_8_bits(image, file_name, bit_depth_range)
        return convert_PIL_to_numpy(image, format)


def read_labels(file_name: str) -> np.ndarray:
    """Semantic labels as Detectron2 reads them, (height, width) uint8.

    Raises:
        DataError: the file cannot be decoded, or has labels that Detectron2 would clip: above 255,
            with which it marks pixels that are ignored, or below 0.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f, Image.open(f) as image:
        low, high = extremes(image) if image.mode in DEEP_MODES else (0, 0)
        if not 0 <= low <= high <= 255:
            raise DataError(
                f"{file_name} has semantic labels of {shown_range(low, high)}; they must be 0 to "
                "255, of which 255 is ignored"
            )
        return read_image(file_name, "L", bit_depth_range=(0, 255)).squeeze(2)


def check_image_format(image_format: str | None) -> None:
    """
    Raises:
        ConfigError: it does not give images of 8 bits and of channels, as the augmentations and
            models need them; "YUV-BT.601" of :func:`read_image` does not.
    """
    try:
        pixel = convert_PIL_to_numpy(Image.new("RGB", (1, 1)), image_format)
        usable = pixel.ndim == 3 and pixel.dtype == np.uint8
    except (KeyError, TypeError, ValueError):  # no mode of Pillow
        usable = False
    if not usable:
        raise ConfigError(
            f"INPUT.FORMAT (in lazy configs image_format of the mappers) is {image_format!r}; it "
            "must be BGR, RGB, L, or another mode of Pillow that has channels of 8 bits"
        )


def image_size(file_name: str) -> tuple[int, int]:
    """Width and height of an image as :func:`read_image` gives it, from its header where possible.

    Raises:
        DataError: the file is no image.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f, Image.open(f) as image:
        if image.format in ("PNG", "TIFF"):  # may say how to turn it behind the pixels, or turn it
            image.load()
        return turned_size(image)


def exif_orientation(image: Image.Image) -> int:
    """1 (as stored) to 8, of what has been read of the file; 1 where it has none, or a bad one."""
    try:  # of the class Image, as that of PNG images decodes all pixels
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # as Detectron2 does
        return 1
    return orientation if orientation in range(1, 9) else 1


def turned_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image after its EXIF orientation is applied."""
    return image.size[::-1] if exif_orientation(image) >= 5 else image.size


def is_deep_color(image: Image.Image) -> bool:
    """An image that is not decoded yet has 16 bits in each of several channels (PNG, TIFF). Pillow
    can give the upper 8 of them only."""
    return image.mode not in DEEP_MODES and ";16" in str([tile[3] for tile in image.tile])


def takes_deep_color(bit_depth_range: Sequence[float]) -> bool:
    """Whether the range is the one that Pillow takes of 16 bits in each of several channels."""
    return value_range("I", bit_depth_range) == (0, 65535)


def value_range(mode: str, bit_depth_range: Sequence[float]) -> tuple[float, float]:
    """The values of an image that become 0 and 255.

    Args:
        mode: one of ``DEEP_MODES``.
        bit_depth_range: lowest and highest value; if it is empty, those of the type: 0 and 1 of
            floats (``"F"``), else 0 and 65535, as Pillow opens some 16-bit files as ``"I"``.

    Raises:
        ConfigError: ``bit_depth_range`` is neither empty nor two numbers that increase.
    """
    if not bit_depth_range:
        return (0, 1) if mode == "F" else (0, 65535)
    try:
        lowest, highest = map(float, bit_depth_range)
    except (TypeError, ValueError):
        lowest = highest = math.nan
    if not -math.inf < lowest < highest < math.inf:
        raise ConfigError(
            f"{RANGE_KEY} is {bit_depth_range!r}; it must be the lowest and the highest value of "
            "the images, or empty for the range of their type"
        )
    return lowest, highest


def extremes(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest value of an image of ``DEEP_MODES``; both NaN if one is NaN."""
    values = np.asarray(image)
    return float(values.min()), float(values.max())


def shown_range(low: float, high: float) -> str:
    """``(low, high)`` as it can be typed, to the last digit."""
    low, high = (int(value) if value == value // 1 else value for value in (low, high))
    return f"({low}, {high})"


def _to_8_bits(image: Image.Image, file_name: str, bit_depth_range: Sequence[float]) -> Image.Image:
    """Scale an image of ``DEEP_MODES`` to ``"L"``, to the nearest of 256 values."""
    lowest, highest = value_range(image.mode, bit_depth_range)
    low, high = extremes(image)
    if not math.isfinite(low + high):
        raise DataError(f"{file_name} has values that are NaN or infinite; replace them")
    if not lowest <= low <= high <= highest:
        raise DataError(
            f"{file_name} has values of {shown_range(low, high)}, beyond "
            f"{shown_range(lowest, highest)}, which is scaled to 8 bits; set {RANGE_KEY} to the "
            "range of all images"
        )
    # float32 holds 16 bits exactly, but not 32.
    dtype = np.float64 if image.mode == "I" else np.float32
    values = np.subtract(np.asarray(image), lowest, dtype=dtype)
    values *= 255 / (highest - lowest)
    return Image.fromarray(np.rint(values, out=values).astype(np.uint8))
