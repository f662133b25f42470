"""Whether all images of a dataset can be used, and are as they were declared: before a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import starmap

import numpy as np
from PIL import Image

from . import DataError
from .headers import Header, read_headers
from .images import DEEP_COLOR, RANGE_KEY, depth_defect, value_range

_TURN = (
    "if the annotations were made on the stored pixels, delete the orientation from the files: "
    "exiftool -Orientation= FILES"
)


def check_images(
    json_file: str,
    image_root: str,
    file_names: Sequence[str],
    heights: Iterable[int],
    widths: Iterable[int],
    *,
    bit_depth_range: Sequence[float] = (),
) -> list[str]:
    """Compare the files of all images with the sizes that are declared, in pixels.

    Returns:
        warnings, one sentence each.

    Raises:
        ConfigError: ``bit_depth_range`` is no range, see :func:`.images.value_range`.
        DataError: files that cannot be used: each kind of defect with its count and first names.
    """
    headers = read_headers(image_root, list(dict.fromkeys(file_names)))
    defects = defaultdict(list)  # kind -> images
    for name, *declared in zip(file_names, map(int, widths), map(int, heights), strict=True):
        header = headers[name]
        size = [header.width, header.height]
        if header.problem:
            defects[header.problem].append(f"{name}{header.detail and ': '}{header.detail}")
        elif size != declared:
            kind = "another size than declared (correct the declaration, or replace the file)"
            if size == declared[::-1] and header.orientation >= 5:
                kind = f"declared with the size before their EXIF orientation is applied ({_TURN})"
            elif size == declared[::-1]:
                kind = "declared with width and height swapped (correct the declaration)"
            defects[kind].append("{} is {} x {}, declared {} x {}".format(name, *size, *declared))
    usable = {name: header for name, header in headers.items() if not header.problem}
    notes = _check_depth(usable, bit_depth_range, defects)
    if defects:
        raise DataError(
            f"{json_file}, images in {image_root}: {'; '.join(starmap(_listed, defects.items()))}; "
            "correct or replace them, or take them out of the annotations"
        )
    if turned := [name for name, header in usable.items() if header.orientation > 1]:
        notes.append(f"{_listed('an EXIF orientation, which is applied', turned)}; {_TURN}")
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if large := [n for n, header in usable.items() if header.width * header.height > limit]:
        notes.append(_listed(f"more than {limit} pixels, 3 bytes of memory each", large))
    return notes


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    images = f"{len(names)} image{'s' if len(names) > 1 else ''}"
    return f"{images}: {kind} ({', '.join(names[:3])}{more})"


def _check_depth(
    headers: dict[str, Header], bit_depth_range: Sequence[float], defects: dict[str, list[str]]
) -> list[str]:
    """Add to ``defects`` what does not fit the range. Returns the rules that are applied."""
    notes, images = [], defaultdict(list)
    for name, header in headers.items():
        if header.mode:
            images[header.mode].append((name, header.low, header.high))
    for mode, items in images.items():
        names, lows, highs = zip(*items, strict=True)
        low, high = np.min(lows).item(), np.max(highs).item()  # NaN if one is
        if defect := depth_defect(mode, low, high, bit_depth_range):
            defects[defect] += [n for n, *r in items if depth_defect(mode, *r, bit_depth_range)]
            continue
        lowest, highest = value_range(mode, bit_depth_range)
        note = f"mode {mode}, of which {lowest, highest} is scaled to 8 bits ({RANGE_KEY})"
        if 0 < high - low < (highest - lowest) / 8:
            way = "convert them to 8 bits" if mode == DEEP_COLOR else "set it to what there can be"
            note += f", but all values are {low, high}, and little contrast is left: {way}"
        notes.append(_listed(note, names))
    if bit_depth_range and not images:
        value_range("I", bit_depth_range)
        notes.append(f"{RANGE_KEY} has no effect: no image has more than 8 bits")
    return notes
