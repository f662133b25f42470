"""From the records of a COCO JSON to canonical form."""

from __future__ import annotations

import math
import sys
from array import array
from collections import Counter
from typing import Any

import msgspec
import numpy as np

from . import DataError
from .coco_data import CocoData
from .coco_file import NULL, Annotation, CocoFile, decode_coco, others, paused_gc, shown, whole
from .coco_masks import MaskError, decode_mask


def read_coco(json_file: str) -> CocoData:
    """Read a COCO JSON into canonical form.

    Raises:
        DataError: it cannot be read, or holds what has no place in that form. Errors of masks and
            keypoints, which not every run needs, are kept in the result.
    """
    with paused_gc():
        return _pack(json_file, decode_coco(json_file))


def _pack(json_file: str, content: CocoFile) -> CocoData:
    images = _sorted(json_file, "image", content.images)
    categories = _sorted(json_file, "category", content.categories)
    for side in ("height", "width"):
        if bad := [i for i in images if (whole(getattr(i, side)) or 0) <= 0]:
            raise DataError(
                f"{json_file}: image {bad[0].id!r} ({bad[0].file_name}) has the {side} "
                f"{shown(getattr(bad[0], side))}; it must be a whole number of pixels"
                f"{others(len(bad) - 1, 'images')}"
            )
    heights, widths = ([int(getattr(i, side)) for i in images] for side in ("height", "width"))
    file_names = [image.file_name for image in images]

    annotations = content.annotations or []
    positions = {image.id: position for position, image in enumerate(images)}
    known = [positions.get(whole(a.image_id), -1) for a in annotations]
    unknown = known.count(-1)
    first_unknown = ""
    if unknown:
        a = annotations[known.index(-1)]
        first_unknown = f"annotation {a.id!r}, with the image_id {shown(a.image_id)}"
        annotations = [a for a, image in zip(annotations, known, strict=True) if image >= 0]
    image = [position for position in known if position >= 0]

    classes = {category.id: position for position, category in enumerate(categories)}
    category = [classes.get(whole(a.category_id), -1) for a in annotations]
    area = np.array([_area(a.area) for a in annotations], np.float64)
    masks, short = _pack_masks(annotations, image, heights, widths)
    data = CocoData(
        json_file=json_file,
        categories=categories,
        image_ids=[i.id for i in images],
        file_names=file_names,
        heights=np.array(heights),
        widths=np.array(widths),
        has_annotations=content.annotations is not msgspec.UNSET,
        annotation_ids=[a.id for a in annotations],
        image=np.array(image, np.int64),
        category=np.array(category, np.int64),
        bbox=np.array([a.bbox for a in annotations], np.float64).reshape(-1, 4),
        area=area,
        crowd=np.array([bool(a.iscrowd) for a in annotations], bool),
        unknown_images=(unknown, first_unknown),
        mended=_mended(annotations, area, short),
        **masks,
        **_pack_keypoints(annotations),
    )
    declared = ", ".join(map(repr, list(classes)[:10])) + (", ..." if len(classes) > 10 else "")
    data.refuse(
        [i for i, position in enumerate(category) if position < 0],
        lambda i: (
            f"has the category_id {shown(annotations[i].category_id)}, which 'categories' does not "
            f"declare (it declares {declared})"
        ),
    )
    data.refuse(
        [i for i, a in enumerate(annotations) if a.iscrowd not in (0, 1, None)],
        lambda i: f"has the iscrowd {shown(annotations[i].iscrowd)}; it must be 0 or 1",
    )
    data.refuse(
        [i for i, a in enumerate(annotations) if a.ignore],
        lambda i: "has 'ignore', which Detectron2 does not support; use 'iscrowd', or delete it",
    )
    return data


def _sorted(json_file: str, thing: str, items: list) -> list:
    """``items`` by their ids, which are made whole numbers where they are such."""
    if not items:
        empty = {"image": "lists no images", "category": "declares no categories"}
        raise DataError(f"{json_file} {empty[thing]}")
    for item in items:
        if (id_ := whole(item.id)) is None:
            raise DataError(
                f"{json_file}: the id of one {thing} is {item.id}; it must be a whole number"
            )
        item.id = id_
    by_kind = {isinstance(item.id, str): item.id for item in items}
    if len(by_kind) > 1:
        raise DataError(
            f"{json_file}: some {thing} ids are numbers ({by_kind[False]!r}) and some text "
            f"({by_kind[True]!r}); make them all numbers"
        )
    ((id_, count),) = Counter(item.id for item in items).most_common(1)
    if count > 1:
        verb = "lists" if thing == "image" else "declares"
        times = "twice" if count == 2 else f"{count} times"
        raise DataError(f"{json_file} {verb} {thing} id {id_!r} {times}")
    return sorted(items, key=lambda item: item.id)


def _area(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 < value <= sys.float_info.max else math.nan


def _mended(annotations: list[Annotation], area: np.ndarray, short: int) -> list[str]:
    ids = {a.id for a in annotations if type(a.id) is int and a.id > 0}
    kinds = {
        "ids that are absent, 0, no whole number, or not unique are renumbered": (
            len(annotations) - len(ids)
        ),
        "an iscrowd of null is taken as 0": sum(a.iscrowd is None for a in annotations),
        "an area that is no number above 0 is taken from the mask, or the box": (
            int(np.isnan(area).sum())
        ),
    }
    mended = [f"{text} ({count} annotations)" for text, count in kinds.items() if count]
    if short:
        mended.append(f"polygons of fewer than 3 points are left out ({short})")
    return mended


def _pack_masks(
    annotations: list[Annotation], images: list[int], heights: list[int], widths: list[int]
) -> tuple[dict[str, Any], int]:
    """The fields of the masks, and how many polygons of fewer than 3 points are left out."""
    coordinates, polygon_ends, mask_ends = array("d"), array("q"), array("q")
    rles, errors, no_mask, short = {}, {}, np.zeros(len(annotations), bool), 0
    for index, (annotation, image) in enumerate(zip(annotations, images, strict=True)):
        try:
            mask = decode_mask(annotation.segmentation, heights[image], widths[image])
        except MaskError as error:
            errors[index], mask = str(error), []
        if mask is None:
            no_mask[index] = True
        elif isinstance(mask, str):
            rles[index] = mask
        else:
            for polygon in mask:
                if len(polygon) < 6:
                    short += 1
                    continue
                coordinates.fromlist(polygon)
                polygon_ends.append(len(coordinates))
        mask_ends.append(len(polygon_ends))
    return {
        "coordinates": np.array(coordinates, copy=False),
        "polygon_ends": np.array(polygon_ends, copy=False),
        "mask_ends": np.array(mask_ends, copy=False),
        "rles": rles,
        "mask_errors": errors,
        "no_mask": no_mask,
    }, short


_decode_keypoints = msgspec.json.Decoder(list[float] | None).decode


def _pack_keypoints(annotations: list[Annotation]) -> dict[str, Any]:
    """Where an object has none, they are of visibility 0, as COCO writes them."""
    found, errors = {}, {}
    for index, annotation in enumerate(annotations):
        if annotation.keypoints is NULL:
            continue
        try:
            keypoints = _decode_keypoints(annotation.keypoints)
        except (msgspec.ValidationError, RecursionError):
            errors[index] = "has keypoints that are no list of the numbers x, y, visibility"
            continue
        if keypoints:
            found[index] = keypoints
    length = Counter(map(len, found.values())).most_common(1)[0][0] if found else 0
    for index, keypoints in list(found.items()):
        if len(keypoints) != length or length % 3:
            other = f"; others have {length}" if len(keypoints) != length else ""
            errors[index] = (
                f"has {len(keypoints)} numbers as keypoints{other}; three are needed for each "
                "keypoint: x, y, visibility"
            )
        elif not {0, 1, 2}.issuperset(keypoints[2::3]):
            bad = next(v for v in keypoints[2::3] if v not in (0, 1, 2))
            errors[index] = f"has a keypoint of visibility {bad:g}; it must be 0, 1 or 2"
        else:
            continue
        del found[index]
    packed = np.zeros((len(annotations), length - length % 3))
    for index, keypoints in found.items():
        packed[index] = keypoints
    return {"keypoints": packed, "keypoint_errors": errors}
