"""LabelMe: a JSON for each image, with the shapes drawn on it (https://github.com/wkentaro/labelme).

supervision turns polygons into masks of whole pixels, and leaves out circles and masks.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path, PureWindowsPath

import msgspec
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from gn_detect.data import DataError

from .to_coco import LabeledImages, LabeledObject, Notes, check_size, list_images

# Points that each kind of shape with an area needs: those of a rectangle are opposite corners; of
# a circle its centre and a point on it; of a mask the corners of its box.
NUM_POINTS = {"polygon": 3, "oriented_rectangle": 3, "rectangle": 2, "circle": 2, "mask": 2}
# Labels that LabelMe's own converters leave out.
NO_CLASS = ("__ignore__", "_background_")


class Shape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = "polygon"
    group_id: int | str | None = None
    mask: str | None = None
    where: str = ""  # file and item, for messages


class LabelMe(msgspec.Struct):
    shapes: list[Shape]
    imagePath: str
    imageHeight: float | None = None
    imageWidth: float | None = None


def is_labelme(path: Path) -> bool:
    """Whether a JSON has what LabelMe writes, be it whole or not."""
    return b'"shapes"' in path.read_bytes()


def read_labelme(source: Path, images: Path | None) -> LabeledImages:
    """
    Args:
        source: folder of the JSON files.
        images: folder of the images; else ``source``.
    """
    root = images or source
    labels = {path: path.with_suffix(".json") for path in list_images(root)}
    files = {path for path in source.rglob("*.json") if is_labelme(path)}
    named: dict[Path, Path] = {}
    for label_file in sorted(files):
        name = PureWindowsPath(_decode(label_file).imagePath)  # takes / and \
        beside = root / label_file.parent.relative_to(source)
        usual = (beside / name.as_posix(), beside / name.name, root / name.name)
        found = next((p for p in usual if p in labels), None)
        if found and (other := named.setdefault(found, label_file)) != label_file:
            raise DataError(f"{other} and {label_file} are both of {found}; take one away")
    return LabeledImages(root, labels | named, files, _parse)


def _decode(label_file: Path) -> LabelMe:
    try:
        return msgspec.json.decode(label_file.read_bytes(), type=LabelMe)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{label_file} is no file of LabelMe: {error}") from None


def _parse(label_file: Path, size: tuple[int, int], notes: Notes) -> list[LabeledObject]:
    content = _decode(label_file)
    check_size(label_file, (content.imageWidth or 0, content.imageHeight or 0), size)
    groups: dict[tuple, list[Shape]] = {}
    for index, shape in enumerate(content.shapes):
        shape.where = f"{label_file}, shapes[{index}] ({shape.label})"
        if shape.label in NO_CLASS:
            notes.add("shapes that are no objects by their label, left out", shape.where)
            continue
        key = (shape.label, shape.group_id)
        groups.setdefault(key if shape.group_id is not None else (index,), []).append(shape)
    return [o for shapes in groups.values() if (o := _object(shapes, size, notes))]


def _object(shapes: list[Shape], size: tuple[int, int], notes: Notes) -> LabeledObject | None:
    """The object that the shapes of one label and ``group_id`` are parts of."""
    polygons, masks = [], []
    for shape in shapes:
        kind, points = shape.shape_type or "polygon", np.array(shape.points).reshape(-1, 2)
        if kind not in NUM_POINTS:
            notes.add("shapes without an area (points, lines), left out", shape.where)
            continue
        if len(points) < NUM_POINTS[kind]:
            raise DataError(
                f"{shape.where} is a {kind} of {len(points)} points; it needs {NUM_POINTS[kind]}: "
                "correct or delete it"
            )
        if kind == "mask":
            masks.append(_mask(shape, size))
            continue
        if kind == "rectangle":
            (x1, y1), (x2, y2) = points.min(0), points.max(0)
            points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        elif kind == "circle":
            angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
            radius = np.hypot(*(points[1] - points[0]))
            points = points[0] + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        polygons.append(points)
    if not polygons and not masks:
        return None
    label, where = shapes[0].label, shapes[0].where
    if masks:
        flat = [polygon.ravel().tolist() for polygon in polygons]
        rles = mask_util.frPyObjects(flat, size[1], size[0]) if flat else []
        rle = mask_util.merge([*rles, *masks])
        x, y, width, height = mask_util.toBbox(rle)
        return LabeledObject(label, where, np.array([x, y, x + width, y + height]), rle=rle)
    corners = np.concatenate(polygons)
    box = np.concatenate([corners.min(0), corners.max(0)])
    boxes = all(shape.shape_type == "rectangle" for shape in shapes)
    return LabeledObject(label, where, box, polygons=[] if boxes else polygons)


def _mask(shape: Shape, size: tuple[int, int]) -> dict:
    """The RLE of a mask, which LabelMe keeps as a PNG of the object's box."""
    try:
        part = np.array(Image.open(io.BytesIO(base64.b64decode(shape.mask or "")))) > 0
        x, y = np.round(shape.points[0]).astype(int)
        mask = np.zeros(size[::-1], np.uint8, order="F")
        target = mask[y : y + part.shape[0], x : x + part.shape[1]]
        target[:] = part[: target.shape[0], : target.shape[1]]
    except Exception as error:  # Pillow raises what its decoders do
        raise DataError(f"{shape.where} has a damaged mask ({error}); delete it") from None
    return mask_util.encode(mask)
