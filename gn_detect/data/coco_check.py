"""Whether a COCO dataset says what its user means: questions about all annotations at once."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_util

from . import DataError
from .coco_data import CocoData
from .coco_file import others

# A share of the boxes that disagree with their image or their mask, from which on it is no slip of
# a few, but another format.
_SHARE = 0.1


def check_masks(data: CocoData, needed: np.ndarray, scored: bool) -> None:
    """
    Args:
        needed: annotations whose mask the run needs, (A,) bool.
        scored: pycocotools is to score against them.

    Raises:
        DataError: a mask cannot be used, or is absent.
    """
    bad = [index for index in data.mask_errors if needed[index]]
    _refuse(data, bad, data.mask_errors)
    bad = np.flatnonzero(needed & data.no_mask)
    _refuse(
        data,
        bad,
        "has no segmentation; add it, or train boxes alone with MODEL.MASK_ON False (in lazy "
        "configs use_instance_mask=False of the mapper)",
    )
    if scored:
        bad = np.flatnonzero(needed & _no_polygon(data))
        _refuse(data, bad, "has only polygons of fewer than 3 points, which cannot be scored")


def check_keypoints(data: CocoData) -> None:
    """
    Raises:
        DataError: the keypoints of an annotation cannot be used, or there are none.
    """
    _refuse(data, list(data.keypoint_errors), data.keypoint_errors)
    if data.has_annotations and not data.keypoints.size:
        raise DataError(
            f"{data.json_file} has no keypoints; add them to its annotations, or set "
            "MODEL.KEYPOINT_ON False"
        )


def check_objects(data: CocoData, masks: bool) -> list[str]:
    """
    Returns:
        warnings.

    Raises:
        DataError: no annotation is of an object that could be used; says what they are.
    """
    count, crowds = len(data.image), int(data.crowd.sum())
    unknown, first = data.unknown_images
    no_box = data.bbox[:, 2:].min(axis=1, initial=np.inf) <= 0
    no_polygon = _no_polygon(data) if masks else np.zeros(count, bool)
    kinds = [
        (no_box & ~data.crowd, "a box of zero area"),
        (no_polygon & ~no_box & ~data.crowd, "only polygons of fewer than 3 points"),
    ]
    degenerate = "; ".join(
        f"{which.sum()} with {kind}, the first: {data.where(np.flatnonzero(which)[0])}"
        for which, kind in kinds
        if which.any()
    )
    nowhere = f"{unknown} are of no image that the file lists ({first})" if unknown else ""
    if not (~data.crowd & ~no_box & ~no_polygon).any():
        crowd = f"{crowds} have iscrowd 1; if they are objects, set 0" if crowds else ""
        reasons = "; ".join(filter(None, (crowd, nowhere, degenerate)))
        raise DataError(
            f"{data.json_file} holds no annotation of an object that could be used: of its "
            f"{count + unknown} annotations {reasons or 'none is there'}"
        )
    warnings = []
    if degenerate:
        warnings.append(
            f"degenerate annotations; as training data they are dropped, as ground truth "
            f"pycocotools takes them as they are: {degenerate}"
        )
    if nowhere:
        warnings.append(f"of {count + unknown} annotations {nowhere}: left out")
    if crowds > count / 2:
        warnings.append(
            f"{crowds} of {count} annotations have iscrowd 1 and are not trained on; if they are "
            "objects, set 0"
        )
    return warnings


def check_classes(data: CocoData) -> list[str]:
    """
    Returns:
        warnings of classes that cannot be meant so.
    """
    counts = np.bincount(data.category[~data.crowd], minlength=len(data.categories))
    names = [category.name for category in data.categories]
    parents = {str(category.supercategory) for category in data.categories}
    kinds = {
        "are named twice": sorted({name for name in names if names.count(name) > 1}),
        "seem to be the background, which Detectron2 has without a category": [
            name for name in names if name.strip("_ ").lower() == "background"
        ],
        "have no object, and seem to be groups of the others": [
            name for name, count in zip(names, counts, strict=True) if not count and name in parents
        ],
    }
    named = {name for found in kinds.values() for name in found}
    kinds["have no object"] = [
        name for name, count in zip(names, counts, strict=True) if not count and name not in named
    ]
    return [
        f"the categories {', '.join(found[:20])}{', ...' if len(found) > 20 else ''} {kind}"
        for kind, found in kinds.items()
        if found
    ]


def check_boxes(data: CocoData, masks: bool, guarded: bool = True) -> list[str]:
    """Compare the boxes of the objects with their images and their masks.

    Args:
        masks: the masks matter by themselves; if not, they are only asked for the format of boxes.
        guarded: a share of boxes that disagree is refused.

    Returns:
        warnings: of single boxes that disagree, and of those that reach a few pixels beyond.

    Raises:
        DataError: many disagree; says in which format they seem to be.
    """
    objects = ~data.crowd & (data.bbox[:, 2:] > 0).all(axis=1)
    size = np.stack([data.widths, data.heights], 1)[data.image].astype(float)
    size = np.concatenate([size, size], axis=1)  # (A, 4), as x1, y1, x2, y2
    a, b, c, d = data.bbox.T
    boxes = np.stack([a, b, a + c, b + d], axis=1)
    extents = mask_extents(data)

    def fit(boxes: np.ndarray, extents: np.ndarray = extents) -> np.ndarray:
        return _inside(boxes, size) & _agree(boxes, extents)

    tiny = (boxes <= 1).all(axis=1) & (size > 8).all(axis=1)  # a pixel in the corner: normalized
    inside = _inside(boxes, size) & ~tiny
    bad = objects & ~(inside & _agree(boxes, extents))
    formats = {
        "x1, y1, x2, y2": np.stack([a, b, c, d], 1),
        "y, x, height, width": np.stack([b, a, b + d, a + c], 1),
        "y1, x1, y2, x2": np.stack([b, a, d, c], 1),
        "centre x, centre y, width, height": np.stack(
            [a - c / 2, b - d / 2, a + c / 2, b + d / 2], 1
        ),
    }
    for name in list(formats):
        formats[f"{name}, divided by the size of the image"] = formats[name] * size
    formats["x, y, width and height divided by the size of the image"] = boxes * size
    fits = {name: fit(other)[objects].mean() for name, other in formats.items() if bad.any()}
    best = max(fits, key=fits.get, default="")
    explained = bool(best) and fits[best] >= 0.9
    polygons = ""
    if bad.any() and not explained:
        for text, other in {
            "x and y exchanged": extents[:, [1, 0, 3, 2]],
            "coordinates divided by the size of the image": extents * size,
        }.items():
            if fit(boxes, other)[objects].mean() >= 0.9:
                polygons = text
    if not masks and not explained:
        bad, polygons = objects & ~inside, ""
    first = int(np.flatnonzero(bad)[0]) if bad.any() else 0
    text = (
        f"the boxes of {bad.sum()} of {objects.sum()} annotations reach beyond their image or "
        "disagree with their mask"
    )
    if bad.any():
        numbers = ", ".join(f"{value:g}" for value in data.bbox[first])
        text += (
            f", the first: {data.where(first)} with the bbox [{numbers}] on {size[first, 0]:g} x "
            f"{size[first, 1]:g} pixels"
        )
    warnings = []
    if guarded and bad.sum() > _SHARE * objects.sum():
        if polygons:
            why = f"; its polygons seem to have {polygons}: convert them"
        elif explained:
            why = f"; COCO boxes are x, y, width, height, these seem to be {best}: convert them"
        else:
            why = "; COCO boxes are x, y, width, height in pixels"
        raise DataError(f"{data.json_file}: {text}{why} (GUARDS.BOX_FORMAT False lets them pass)")
    if bad.any():
        warnings.append(text)
    beyond = np.maximum(-boxes, boxes - size).max(axis=1, initial=0)
    over = objects & ~bad & (beyond >= 1)
    if over.any():
        warnings.append(
            f"{over.sum()} boxes reach beyond their image, by {beyond[over].max():.0f} pixels at "
            "most: training clips them"
        )
    return warnings


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


def _agree(boxes: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """IoU of at least 0.5, with a pixel on each side for what rounding does to thin ones; also
    where there is no mask."""
    border = np.array([-1, -1, 1, 1])
    boxes, extents = boxes + border, extents + border
    upper, lower = np.minimum(boxes, extents), np.maximum(boxes, extents)
    inner = (upper[:, 2:] - lower[:, :2]).clip(0).prod(axis=1)
    areas = sum((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (boxes, extents))
    return ~(inner < 0.5 * (areas - inner))  # NaN agrees


def _no_polygon(data: CocoData) -> np.ndarray:
    """Annotations whose mask is of polygons, and none of them of 3 points or more."""
    empty = ~data.no_mask & (np.diff(data.mask_ends, prepend=0) == 0)
    empty[[*data.rles, *data.mask_errors]] = False
    return empty


def _refuse(data: CocoData, bad: np.ndarray | list[int], why: str | dict[int, str]) -> None:
    if len(bad):
        text = why if isinstance(why, str) else why[bad[0]]
        more = others(len(bad) - 1, "annotations")
        raise DataError(f"{data.json_file}: {data.where(bad[0])} {text}{more}")
