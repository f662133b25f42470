"""Whether the boxes of a COCO dataset are x, y, width, height in pixels, as they should be.

In another format they can be trained on all the same, to an AP near 0: what tells is that they
reach beyond their image, or disagree with the mask of their object.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_util

from . import DataError
from .coco_data import CocoData

# A share of the boxes that disagree, above which it is no slip of a few, but another format; how
# many may always be a slip; and the share that a format must fit to be named.
_SHARE, _FEW, _NAMED = 0.1, 2, 0.9
# IoU of a box with that of its mask: what a format must reach to be named, and any box.
_TIGHT, _LOOSE = 0.8, 0.5


def check_boxes(data: CocoData, masks: bool, guarded: bool, key: str) -> list[str]:
    """Compare the boxes of the objects with their images and their masks.

    Args:
        masks: the masks matter by themselves; if not, they only help to name the format.
        guarded: many that disagree are refused.
        key: of the config, which lets them pass.

    Returns:
        warnings: of boxes that disagree, and of those that reach a few pixels beyond their image.

    Raises:
        DataError: many disagree; names the format that they seem to have.
    """
    objects = np.flatnonzero(~data.crowd & (data.bbox[:, 2:] > 0).all(axis=1))
    image = data.image[objects]
    size = np.stack([data.widths[image], data.heights[image]] * 2, axis=1).astype(float)
    bbox, extents = data.bbox[objects], mask_extents(data)[objects]
    boxes = np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)
    # A box within one pixel in the corner is taken for a normalized one.
    inside = _inside(boxes, size) & ~((boxes <= 1).all(axis=1) & (size > 8).all(axis=1))
    bad, seem = ~(inside & _agree(boxes, extents, _TIGHT)), ""
    if bad.sum() > _SHARE * len(objects):
        seem = _seeming_format(bbox, extents, size, masks)
    if not seem:  # nothing but boxes that are drawn loosely, for the most part
        bad = ~(inside & _agree(boxes, extents, _LOOSE)) if masks else ~inside
    # Around its mask and within the image, a box is drawn loosely, or around hidden parts, too.
    wrong = bad if seem else bad & ~(inside & _holds(boxes, extents))
    refused = wrong.sum() > max(_SHARE * len(objects), _FEW) or (wrong.any() and wrong.all())
    warnings = []
    if bad.any():
        first = np.flatnonzero(bad)[0]
        numbers, mask = (
            ", ".join(f"{x:g}" for x in np.round(values[first], 2)) for values in (bbox, extents)
        )
        text = (
            f"the boxes of {bad.sum()} of {len(objects)} objects reach beyond their image or "
            f"disagree with their mask, the first: {data.where(objects[first])} with the bbox "
            f"[{numbers}] on {size[first, 0]:g} x {size[first, 1]:g} pixels"
        )
        if not np.isnan(extents[first]).any():
            text += f" and a mask from x1, y1 to x2, y2 = {mask}"
        if guarded and refused:
            raise DataError(
                f"{data.json_file}: {text}; COCO boxes are x, y, width, height in pixels"
                f"{seem and ', '}{seem} ({key} False lets them pass)"
            )
        warnings.append(text)
    beyond = np.maximum(-boxes, boxes - size).max(axis=1, initial=0)
    over = ~bad & (beyond >= 1)
    if over.any():
        warnings.append(
            f"boxes that reach beyond their image are clipped in training ({over.sum()}, by "
            f"{beyond[over].max():.0f} pixels)"
        )
    return warnings


def _seeming_format(bbox: np.ndarray, extents: np.ndarray, size: np.ndarray, masks: bool) -> str:
    """The format that fits images and masks, in words; "" for none.

    Args:
        bbox: as in the file, (N, 4).
        extents: boxes of the masks, x1, y1, x2, y2 in pixels, (N, 4); NaN where there is none.
        size: width, height, width, height of the images in pixels, (N, 4).
        masks: it may be the masks that are in another format.
    """
    a, b, c, d = bbox.T
    formats = {
        "x, y, width, height": (a, b, a + c, b + d),
        "x1, y1, x2, y2": (a, b, c, d),
        "centre x, centre y, width, height": (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    }
    if masks:  # else it may be those where x and y are exchanged
        formats["y, x, height, width"] = (b, a, b + d, a + c)
        formats["y1, x1, y2, x2"] = (b, a, d, c)
    fits = {}
    for name, corners in formats.items():
        boxes = np.stack(corners, axis=1)
        normalized = f"these seem to be {name}, divided by the size of the image: convert them"
        fits[f"these seem to be {name}: convert them"] = _fit(boxes, extents, size)
        fits[normalized] = _fit(boxes * size, extents, size)
    boxes = np.stack(formats["x, y, width, height"], axis=1)
    exchanged, normalized = extents[:, [1, 0, 3, 2]], extents * size
    others = {
        "have x and y exchanged": exchanged,
        "be divided by the size of the image": normalized,
    }
    for name, other in others.items() if masks else ():
        fits[f"and the polygons seem to {name}: convert those"] = _fit(boxes, other, size)
    best = max(fits, key=fits.get)
    return best if fits[best] >= _NAMED else ""


def _fit(boxes: np.ndarray, extents: np.ndarray, size: np.ndarray) -> float:
    return (_inside(boxes, size) & _agree(boxes, extents, _TIGHT)).mean()


def mask_extents(data: CocoData) -> np.ndarray:
    """The boxes of the masks, x1, y1, x2, y2 in pixels, (A, 4) float64; NaN where there is none."""
    extents = np.full((len(data.image), 4), np.nan)
    ends = np.diff(data.mask_ends, prepend=0)
    index = np.repeat(np.arange(len(ends)), ends)  # of the annotation of each polygon
    if len(index):
        starts = np.concatenate([[0], data.polygon_ends[:-1]]) // 2
        first = np.flatnonzero(ends)
        of_masks = np.concatenate([[0], np.cumsum(ends[first])[:-1]])
        for axis in (0, 1):
            values = data.coordinates[axis::2]
            for column, ufunc in ((axis, np.minimum), (axis + 2, np.maximum)):
                polygons = ufunc.reduceat(values, starts)
                extents[first, column] = ufunc.reduceat(polygons, of_masks)
    for i in data.rles:
        x, y, width, height = mask_util.toBbox(data.segmentation(i))
        extents[i] = x, y, x + width, y + height
    return extents


def _inside(boxes: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Boxes (x1, y1, x2, y2) of positive area in their image, but for 2 pixels and 2 %."""
    slack = 2 + 0.02 * size
    positive = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return positive & (boxes >= -slack).all(axis=1) & (boxes <= size + slack).all(axis=1)


def _holds(boxes: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """Boxes that hold the whole of their masks, but for 2 pixels."""
    outer = np.array([1, 1, -1, -1]) * (boxes - extents)
    return (outer <= 2).all(axis=1)  # NaN does not


def _agree(boxes: np.ndarray, extents: np.ndarray, iou: float) -> np.ndarray:
    """IoU of at least ``iou``, with a pixel on each side for what rounding does to thin ones; also
    where there is no mask."""
    border = np.array([-1, -1, 1, 1])
    boxes, extents = boxes + border, extents + border
    upper, lower = np.minimum(boxes, extents), np.maximum(boxes, extents)
    inner = (upper[:, 2:] - lower[:, :2]).clip(0).prod(axis=1)
    areas = sum((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (boxes, extents))
    return ~(inner < iou * (areas - inner))  # NaN agrees
