"""Whether a COCO dataset says what its user means: questions about all annotations at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from . import DataError
from .coco_data import CocoData


def check_masks(
    data: CocoData, needed: np.ndarray, *, scored: bool, key: str = "MODEL.MASK_ON"
) -> None:
    """
    Args:
        needed: annotations whose mask the run needs, (A,) bool.
        scored: pycocotools is to score against them.
        key: of the config, which asks for masks.

    Raises:
        DataError: a mask cannot be used, or is absent.
    """
    bad = [index for index in data.mask_errors if needed[index]]
    data.refuse(bad, data.mask_errors.get)
    bad = np.flatnonzero(needed & data.no_mask)
    how = f"has no segmentation; add it, or train boxes alone with {key} False"
    data.refuse(bad, lambda _: how)
    if scored:
        bad = np.flatnonzero(needed & _no_polygon(data))
        how = "has only polygons of fewer than 3 points, which cannot be scored"
        data.refuse(bad, lambda _: how)


def check_keypoints(data: CocoData, key: str) -> None:
    """
    Args:
        key: of the config, which asks for keypoints.

    Raises:
        DataError: the keypoints of an annotation cannot be used, or there are none.
    """
    data.refuse(list(data.keypoint_errors), data.keypoint_errors.get)
    if not (data.keypoints[:, 2::3] > 0).any():
        raise DataError(
            f"{data.json_file} has no visible keypoints; add them to its annotations, or set {key} "
            "False"
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
    if not count + unknown:
        raise DataError(
            f"{data.json_file} has an empty list of annotations: nothing to train on, or to score; "
            "to predict alone, delete the list"
        )
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
            f"{count + unknown} annotations {reasons}"
        )
    warnings = []
    if degenerate:
        warnings.append(
            f"degenerate annotations; as training data they are dropped, as ground truth "
            f"pycocotools takes them as they are: {degenerate}"
        )
    if nowhere:
        warnings.append(f"of {count + unknown} annotations {nowhere}: left out")
    boxes = np.column_stack([data.image, data.category, data.bbox])
    if repeated := _again(row.tobytes() for row in boxes):
        warnings.append(
            f"{len(repeated)} annotations have the image, class and box of another one, the first: "
            f"{data.where(repeated[0])}; no detection fits both"
        )
    if repeated := _again(data.file_names):
        warnings.append(
            f"{len(repeated)} images are listed again with another id, the first: "
            f"{data.file_names[repeated[0]]}; the objects of one entry are background to the other"
        )
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


def _again(items: Iterable[Hashable]) -> list[int]:
    """The positions of items that came before."""
    known = set()
    return [i for i, item in enumerate(items) if item in known or known.add(item)]


def _no_polygon(data: CocoData) -> np.ndarray:
    """Annotations whose mask is of polygons, and none of them of 3 points or more."""
    empty = ~data.no_mask & (np.diff(data.mask_ends, prepend=0) == 0)
    empty[[*data.rles, *data.mask_errors]] = False
    return empty
