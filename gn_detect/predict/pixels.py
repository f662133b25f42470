"""Images of any kind as RGB pixels."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np
from PIL import Image

from gn_detect.data import DataError
from gn_detect.data.images import naming, to_pixels

AnyImage = Union[str, os.PathLike, np.ndarray, Image.Image]  # noqa: UP007  # made at run time
MAX_PIXELS = 178_956_970  # as Pillow, beyond which a file may be a "decompression bomb"
MAX_TILED_PIXELS = 3 * MAX_PIXELS  # which take 4 GB while they are decoded
_LOCK = threading.Lock()  # of Pillow's limit, which all threads share


def read_rgb(
    image: AnyImage, *, bit_depth_range: Sequence[float] = (), max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """The pixels of an image, as an evaluation reads them.

    Args:
        image: a path; an image of Pillow; or an array of RGB pixels, (height, width, 3) uint8, or
            of gray ones, (height, width) uint8.
        bit_depth_range: see :func:`gn_detect.data.images.value_range`.
        max_pixels: of a path or an image of Pillow, which are decoded here.

    Returns:
        (height, width, 3) uint8 RGB, the EXIF orientation of a path or of Pillow's applied.

    Raises:
        DataError: it cannot be read, is of another kind, or larger.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        with naming(name), _without_pillows_limit(), open(name, "rb") as file:
            opened = Image.open(file)
            _check_size(opened.size, max_pixels, name)
            return to_pixels(opened, "RGB", bit_depth_range=bit_depth_range, name=name)
    if isinstance(image, Image.Image):
        _check_size(image.size, max_pixels)
        with naming("of Pillow"):
            return to_pixels(image, "RGB", bit_depth_range=bit_depth_range)
    if not isinstance(image, np.ndarray):
        raise DataError(
            f"an image is a {type(image).__name__}; give a path, an image of Pillow, or an array "
            "of RGB pixels, (height, width, 3) uint8"
        )
    gray, color = image.ndim == 2, image.ndim == 3 and image.shape[2] == 3
    if image.dtype != np.uint8 or not (gray or color) or 0 in image.shape:
        raise DataError(
            f"an array of {image.dtype} {image.shape} is no image; give RGB pixels, uint8 of 0 to "
            "255, (height, width, 3), or (height, width) of gray ones"
        )
    return np.repeat(image[..., None], 3, axis=2) if gray else image


def _check_size(size: tuple[int, int], max_pixels: int, name: str = "an image") -> None:
    width, height = size
    if width * height > max_pixels:
        remedy = "cut it into pieces"
        if max_pixels < MAX_TILED_PIXELS:
            remedy = f"a model would see it shrunk to a fraction: use --tiles, or {remedy}"
        raise DataError(f"{name} has {width} x {height} pixels, more than {max_pixels}; {remedy}")


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """In whose place :func:`_check_size` refuses, and nothing warns."""
    with _LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
