"""Pixels of an image file: as Detectron2 reads them, and with one rule for more than 8 bits."""

from __future__ import annotations

import contextlib
import errno
import math
from collections.abc import Iterator, Sequence

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from gn_detect.config import ConfigError

from . import DataError

DEEP_COLOR = "16-bit color"  # in place of a mode: more channels than one, of 16 bits
RANGE_KEY = "INPUT.BIT_DEPTH_RANGE (in lazy configs bit_depth_range of the mappers)"
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file that was opened


@contextlib.contextmanager
def naming(file_name: str, errors: type[Exception] | tuple = Exception) -> Iterator[None]:
    """Raise what is wrong with an image, which may be anything in Pillow, as a DataError; what is
    not the fault of the image is raised as it is."""
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
        return to_pixels(Image.open(f), format, bit_depth_range=bit_depth_range, name=file_name)


def to_pixels(
    image: Image.Image,
    format: str | None = None,
    *,
    bit_depth_range: Sequence[float] = (),
    name: str = "the image",
) -> np.ndarray:
    """What :func:`read_image` returns, of an image that is open, which messages call ``name``."""
    mode = deep_mode(image)
    image.load()  # a TIFF is turned here, and then has no orientation any more
    image = _apply_exif_orientation(image)
    if mode and (defect := depth_defect(mode, *extremes(image, mode), bit_depth_range)):
        raise DataError(f"{name} has {defect}")
    if mode not in ("", DEEP_COLOR):
        lowest, highest = value_range(mode, bit_depth_range)
        # float32 holds 16 bits exactly, but not 32.
        dtype = np.float64 if mode == "I" else np.float32
        values = np.subtract(np.asarray(image), lowest, dtype=dtype)
        values *= 255 / (highest - lowest)
        image = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
    return convert_PIL_to_numpy(image, format)


def read_labels(
    file_name: str, dtype: type = np.uint8, count: int = 255, ignored: int = 255
) -> np.ndarray:
    """The semantic labels of an image, (height, width) ``dtype``: the values of the file, and so of
    a palette the indices, of which Detectron2 trains on the brightness.

    Raises:
        DataError: the file cannot be decoded, or has other labels than 0 to ``count`` - 1 and
            ``ignored``.
    """
    with naming(file_name), PathManager.open(file_name, "rb") as f:
        labels = np.asarray(Image.open(f))
    unknown = labels[~np.isin(labels, [*range(count), ignored])]
    if labels.ndim != 2 or unknown.size:
        found = f"the label {unknown[0]}" if labels.ndim == 2 else "colors"
        raise DataError(
            f"{file_name} has {found}; labels are one channel of 0 to {count - 1}, the classes, "
            f"and {ignored} where there is none"
        )
    return labels.astype(dtype)


def check_image_format(image_format: str | None) -> None:
    """Raise a ConfigError unless it gives channels of 8 bits, which augmentations and models need;
    the "YUV-BT.601" of :func:`read_image` does not."""
    formats = ("BGR", "RGB", "L", "HSV", "YCbCr", "CMYK", "RGBA")
    if image_format not in (None, *formats):
        raise ConfigError(
            f"INPUT.FORMAT (in lazy configs image_format of the mappers) is {image_format!r}; it "
            f"must be one of {', '.join(formats)}"
        )


def deep_mode(image: Image.Image) -> str:
    """The mode of an image, not decoded yet, with more than 8 bits, ``DEEP_COLOR`` for several
    channels; "" with 8 bits. Pillow gives the upper 8 of colors, and would clip the others at 255:
    16-bit photos become white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return image.mode
    return DEEP_COLOR if image.format in ("PNG", "TIFF") and ";16" in str(image.tile) else ""


def extremes(image: Image.Image, mode: str) -> tuple[float, float]:
    """The lowest and the highest value of a decoded image of :func:`deep_mode`; NaN if one is."""
    values, scale = np.asarray(image), 256 if mode == DEEP_COLOR else 1
    return values.min().item() * scale, values.max().item() * scale


def value_range(mode: str, bit_depth_range: Sequence[float]) -> tuple[float, float]:
    """The values of an image of :func:`deep_mode` that become 0 and 255: ``bit_depth_range``, or if
    it is empty, 0 and 1 of floats (``"F"``), else 0 and 65535, as Pillow opens some 16-bit files as
    ``"I"``.

    Raises:
        ConfigError: ``bit_depth_range`` is neither empty nor two numbers that increase.
    """
    with contextlib.suppress(TypeError, ValueError):
        lowest, highest = bit_depth_range or (0, 1 if mode == "F" else 65535)
        if -math.inf < lowest < highest < math.inf:
            return lowest, highest
    raise ConfigError(
        f"{RANGE_KEY} is {bit_depth_range!r}; it must be the lowest and the highest value of the "
        "images, or empty for the range of their type"
    )


def depth_defect(mode: str, low: float, high: float, bit_depth_range: Sequence[float]) -> str:
    """What keeps values of ``low`` to ``high`` from being scaled to 8 bits; "" for nothing."""
    scaled = value_range(mode, bit_depth_range)
    if mode == DEEP_COLOR and scaled != (0, 65535):
        return (
            f"colors of 16 bits, of which Pillow gives the upper 8, whatever {RANGE_KEY} is "
            "(convert the images to 8 bits, or to one channel of 16)"
        )
    if not scaled[0] <= low <= high <= scaled[1]:
        return (
            f"values of {low, high}, beyond {scaled}, which is scaled to 8 bits (replace them, or "
            f"set {RANGE_KEY} to the range of all images)"
        )
    return ""
