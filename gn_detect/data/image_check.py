"""Whether all images of a dataset can be used, and are as they were declared: before a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from PIL import Image

from . import DataError
from .headers import DEEP_COLOR, Header, read_headers
from .images import DEEP_COLOR_SENTENCE, RANGE_KEY, shown_range, takes_deep_color, value_range

_NAMED = 3  # images in a sentence
_EXIF_SIZE = (
    "declared with the size before their EXIF orientation is applied (if the annotations are made "
    "on the stored pixels, delete the orientation from the files: exiftool -Orientation= FILES)"
)
_SWAPPED = "declared with width and height swapped (correct the declaration)"
_SIZE = (
    "another size than declared (correct the declaration, or replace the file, whichever the "
    "annotations do not fit)"
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
    """Compare the files of all images (:func:`.headers.read_headers`) with what is declared.

    Args:
        json_file: for messages.
        image_root: directory of the images.
        file_names, heights, widths: of each image, as declared, in pixels.
        bit_depth_range: see :func:`.images.value_range`.

    Returns:
        warnings, one sentence each.

    Raises:
        ConfigError: ``bit_depth_range`` is no range.
        DataError: files that cannot be used: each kind of defect with its count and first names.
    """
    headers = read_headers(image_root, list(dict.fromkeys(file_names)))
    unusable, unfit = defaultdict(list), defaultdict(list)  # kind of defect -> images
    for name, *declared in zip(file_names, map(int, widths), map(int, heights), strict=True):
        header = headers[name]
        size = [header.width, header.height]
        if header.problem:
            unusable[header.problem].append(f"{name}{header.detail and ': '}{header.detail}")
        elif size != declared:
            kind = _SIZE
            if size == declared[::-1]:
                kind = _EXIF_SIZE if header.orientation >= 5 else _SWAPPED
            unfit[kind].append("{} is {} x {}, declared {} x {}".format(name, *size, *declared))
    usable = {name: header for name, header in headers.items() if not header.problem}
    notes = _check_depth(usable, bit_depth_range, unfit)
    if unusable or unfit:
        sentences = [_listed(*item) for item in unusable.items()]
        if sentences:
            sentences[-1] += "; replace them, or take them out of the annotations"
        sentences += [_listed(*item) for item in unfit.items()]
        raise DataError(f"{json_file}, images in {image_root}: {'; '.join(sentences)}")
    if turned := [name for name, header in usable.items() if header.orientation > 1]:
        notes.append(
            _listed("an EXIF orientation, which is applied", turned)
            + "; annotations that were made on the stored pixels do not fit (delete the "
            "orientation from the files: exiftool -Orientation= FILES)"
        )
    limit = Image.MAX_IMAGE_PIXELS or math.inf
    if large := [n for n, header in usable.items() if header.width * header.height > limit]:
        notes.append(
            _listed(f"more than {limit} pixels, of which Pillow warns", large)
            + "; each takes 3 bytes of memory a pixel, and more while it is scaled"
        )
    return notes


def _listed(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _NAMED else ""
    images = f"{len(names)} image{'s' if len(names) > 1 else ''}"
    return f"{images}: {kind} ({', '.join(names[:_NAMED])}{more})"


def _check_depth(
    headers: dict[str, Header], bit_depth_range: Sequence[float], unfit: dict[str, list[str]]
) -> list[str]:
    """Add to ``unfit`` what does not fit the range. Returns the rules that are applied."""
    notes, images = [], defaultdict(list)
    for name, header in headers.items():
        if header.mode == DEEP_COLOR:
            images[DEEP_COLOR].append(name)
        elif header.mode:
            images["float" if header.mode == "F" else "integer"].append(name)
    for kind, names in images.items():
        if broken := [n for n in names if not math.isfinite(headers[n].low + headers[n].high)]:
            unfit["values that are NaN or infinite (replace them)"] += broken
            continue
        low = min(headers[name].low for name in names)
        high = max(headers[name].high for name in names)
        if kind == DEEP_COLOR:
            if not takes_deep_color(bit_depth_range):
                unfit[DEEP_COLOR_SENTENCE] += names
            note = "of colors of 16 bits, Pillow takes the upper 8"
            if high < 65536 / 8:
                note += f"; they stay below {high:.0f}, almost black: convert them to 8 bits before"
            notes.append(_listed(note, names))
            continue
        lowest, highest = value_range("F" if kind == "float" else "I", bit_depth_range)
        taken, found = shown_range(lowest, highest), shown_range(low, high)
        for name in names:
            values = headers[name].low, headers[name].high
            if not lowest <= values[0] <= values[1] <= highest:
                defect = (
                    f"values beyond {taken}, which is scaled to 8 bits (set {RANGE_KEY} to "
                    f"{found}, or to all that there can be)"
                )
                unfit[defect].append(f"{name} has {shown_range(*values)}")
        note = f"{kind} pixels, of which {taken} is scaled to 8 bits ({RANGE_KEY})"
        if 0 < high - low < (highest - lowest) / 8:
            # A camera of 12 bits rather than the values that these images happen to have.
            bits = 2 ** int(high).bit_length() - 1
            likely = kind == "integer" and low >= 0 and high - low >= bits / 8
            note += (
                f", but their values are {found}, and little contrast is left; set it to "
                f"{shown_range(0, bits) if likely else found}"
            )
        notes.append(_listed(note, names))
    if bit_depth_range and not images:
        notes.append(f"{RANGE_KEY} has no effect: no image has more than 8 bits")
    return notes
