"""Masks of a COCO JSON: polygons and run-length encodings (RLE), measured before they are used.

pycocotools reads beyond an RLE whose runs do not add up to its image, or never ends; what comes out
of here adds up.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np
from pycocotools import mask as mask_util

from .coco_file import short, whole


class _RLE(msgspec.Struct, gc=False):
    size: tuple[int | float, int | float]
    counts: str | list[int | float]


# pycocotools walks along polygons pixel by pixel: beyond any image, for hours or out of memory.
_FAR = 100_000
_Coordinate = Annotated[float, msgspec.Meta(ge=-_FAR, le=_FAR)]

_decode = msgspec.json.Decoder(list[list[_Coordinate]] | _RLE | None).decode


class MaskError(ValueError):
    """A segmentation that cannot be used: what it is, to follow the name of its annotation, and
    what to do."""


def decode_mask(text: msgspec.Raw, height: int, width: int) -> list[list[float]] | str | None:
    """Decode the segmentation of an annotation.

    Args:
        text: JSON.
        height, width: of its image, in pixels.

    Returns:
        polygons, each x1, y1, x2, y2, ... in pixels, also of fewer than 3 points; the counts of a
        compressed RLE; or None for no mask at all.

    Raises:
        MaskError: it is of another kind, its numbers do not pair, or its runs are not those of the
            image.
    """
    try:
        mask = _decode(text)
    except (msgspec.ValidationError, RecursionError):
        shown = short(bytes(text).decode("utf-8", "replace"))
        raise MaskError(
            "has a segmentation that is neither a list of polygons x1, y1, x2, y2, ... (pixels, of "
            f"{_FAR} at most) nor an RLE with 'size' and 'counts': {shown}"
        ) from None
    except UnicodeDecodeError:
        raise MaskError("has an RLE that is damaged; export the mask again") from None
    if not mask:
        return None
    if isinstance(mask, _RLE):
        return _compressed(mask, height, width)
    lengths = {len(polygon) for polygon in mask}
    if lengths == {2} and len(mask) > 2:
        raise MaskError(
            f"has a list of {len(mask)} points as its segmentation; write them as one polygon, "
            "[[x1, y1, x2, y2, ...]]"
        )
    if odd := [n for n in lengths if n % 2]:
        raise MaskError(f"has a polygon of {odd[0]} numbers; x and y come in pairs")
    return mask


def _compressed(rle: _RLE, height: int, width: int) -> str:
    size = [whole(side) for side in rle.size]
    if size != [height, width]:
        raise MaskError(
            f"has an RLE of {list(rle.size)} pixels, but its image is declared as "
            f"{[height, width]} (height, width)"
        )
    text = isinstance(rle.counts, str)
    runs = decode_runs(rle.counts) if text else [whole(run) for run in rle.counts]
    if runs is None or None in runs or min(runs, default=0) < 0:
        raise MaskError(f"has an RLE with damaged counts, {short(rle.counts)}; export it again")
    if (total := sum(runs)) != height * width:
        raise MaskError(
            f"has an RLE of {total} pixels, its image has {height * width} ({height} x {width}); "
            "export the mask again"
        )
    if text and 0 not in runs[1:]:
        return rle.counts
    compressed = mask_util.frPyObjects({"size": size, "counts": runs}, height, width)
    if 0 in runs[1:]:  # with which pycocotools finds no overlap
        compressed = mask_util.encode(mask_util.decode(compressed))
    return compressed["counts"].decode("ascii")


def decode_runs(counts: str) -> list[int] | None:
    """The runs of a compressed RLE, as pycocotools' ``rleFrString`` (common/maskApi.c) reads them:
    groups of 5 bits, the lowest first, the sixth says that more follow, and from the fourth run on
    the difference to the run before the last. None where the text is no such thing."""
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if position.max() > 6:  # a run of more than 35 bits
        return None
    runs = np.add.reduceat((codes & 31) << (5 * position), starts)
    negative = codes[ends] & 16 != 0
    runs -= negative.astype(np.int64) << (5 * (position[ends] + 1))
    for first in (1, 2):  # runs 3, 5, ... are relative to 1; runs 4, 6, ... to 2
        runs[first::2] = np.cumsum(runs[first::2])
    return runs.tolist()
