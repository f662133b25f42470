"""LabelMe: a JSON for each image, with the shapes drawn on it (https://github.com/wkentaro/labelme).
supervision turns polygons into masks of whole pixels, and leaves out circles and masks."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from gn_detect.data import DataError

from .to_coco import LabeledObject, Notes, Size, check_image, to_coco


class Shape(msgspec.Struct):
    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = "polygon"
    group_id: int | str | None = None
    mask: str | None = None


class LabelMe(msgspec.Struct):
    shapes: list[Shape]
    imagePath: str = ""
    imageHeight: float | None = None
    imageWidth: float | None = None


def read_labelme(
    source: Path, images: Path | None, split: str | None, classes: list[str] | None
) -> tuple[dict, Notes]:
    if split:
        raise DataError("--split: LabelMe has no splits; give the folder of one as the input")
    return to_coco(images or source, [source], ".json", _parse, classes)


def _parse(label_file: Path, size: Size, notes: Notes) -> Iterable[LabeledObject]:
    try:
        content = msgspec.json.decode(label_file.read_bytes(), type=LabelMe)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{label_file} is no file of LabelMe: {error}") from None
    stated = content.imageWidth or 0, content.imageHeight or 0
    check_image(label_file, content.imagePath, stated, size)
    objects: dict[tuple, LabeledObject] = {}  # shapes of one label and group are parts of one
    for index, shape in enumerate(content.shapes):
        where = f"{label_file}, shapes[{index}] ({shape.label})"
        if shape.shape_type not in (None, "polygon", "rectangle", "circle", "mask"):
            notes.add("shapes that are no polygon, rectangle, circle or mask, left out", where)
            continue
        key = (index,) if shape.group_id is None else (shape.label, shape.group_id)
        item = objects.setdefault(key, LabeledObject(shape.label, where))
        try:
            _add(item, shape, size)
        except Exception as error:  # Pillow raises what its decoders do
            raise DataError(f"{where} cannot be read ({error}); correct or delete it") from None
        if shape.shape_type == "rectangle":
            notes.add("rectangles, taken as masks, too", where)
    return objects.values()


def _add(item: LabeledObject, shape: Shape, size: Size) -> None:
    """A rectangle has two corners; a circle its centre and a point; a mask a PNG of its box."""
    points = np.array(shape.points)
    if shape.shape_type == "mask":
        part = np.array(Image.open(io.BytesIO(base64.b64decode(shape.mask or "")))) > 0
        x, y = map(round, shape.points[0])
        if min(x, y) < 0:
            raise ValueError("the mask begins outside of its image")
        item.mask = np.zeros(size[::-1], bool) if item.mask is None else item.mask
        item.mask[y : y + part.shape[0], x : x + part.shape[1]] |= part
        return
    if shape.shape_type == "rectangle":
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        points = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    elif shape.shape_type == "circle":
        angle, radius = np.linspace(0, 2 * np.pi, 65)[:-1], np.hypot(*(points[1] - points[0]))
        points = points[0] + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    item.polygons.append(points)
