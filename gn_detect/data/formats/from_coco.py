"""A COCO dataset as YOLO or Pascal VOC.

Not by supervision, which draws each polygon on the grid of pixels, writes each part of an object as
an object of its own, and rounds boxes: to 5 digits for YOLO, to whole pixels for Pascal VOC.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import yaml
from pycocotools import mask as mask_util
from supervision import mask_to_polygons

from gn_detect.data import DataError
from gn_detect.data.coco_data import CocoData

from .to_coco import Notes


def write_yolo(data: CocoData, folder: Path) -> Notes:
    """Write ``data.yaml`` and ``labels/`` into ``folder``, a line for each object: its mask where
    it has one, else its box. Returns what is lost."""
    notes = Notes()
    names = dict(enumerate(c.name for c in data.categories))
    targets = _targets(data, folder / "labels", ".txt")
    lines: list[list[str]] = [[] for _ in targets]
    for image, index, box in _objects(data, notes):
        size = np.array([data.widths[image], data.heights[image]])
        polygons = _polygons(data, index)
        if polygons:
            points = _joined(polygons)
        else:
            points = np.array([box.reshape(2, 2).mean(0), box[2:] - box[:2]])
        values = " ".join(f"{value:.9g}" for value in (points / size).clip(0, 1).ravel())
        lines[image].append(f"{data.category[index]} {values}\n")
    for target, text in zip(targets, lines, strict=True):
        target.write_text("".join(text))
    config = {"train": "images", "val": "images", "names": names}
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    return notes


def write_voc(data: CocoData, folder: Path) -> Notes:
    """Write ``Annotations/`` into ``folder``; masks as polygons, as supervision and Roboflow have
    them in Pascal VOC: its PNG files hold one object for each pixel. Returns what is lost."""
    notes = Notes()
    roots = [Element("annotation") for _ in data.file_names]
    for root, name, height, width in zip(
        roots, data.file_names, data.heights, data.widths, strict=True
    ):
        SubElement(root, "filename").text = PurePosixPath(name).name
        size = SubElement(root, "size")
        for tag, value in (("width", width), ("height", height), ("depth", 3)):
            SubElement(size, tag).text = str(value)
    for image, index, box in _objects(data, notes):
        element = SubElement(roots[image], "object")
        SubElement(element, "name").text = data.categories[data.category[index]].name
        bndbox = SubElement(element, "bndbox")
        # Counted from 1; the last pixel that belongs to the object is the far edge counted from 0.
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box + [1, 1, 0, 0], strict=True):
            SubElement(bndbox, tag).text = f"{value:.9g}"
        if polygons := _polygons(data, index):
            polygon = SubElement(element, "polygon")
            for number, (x, y) in enumerate(_joined(polygons) + 1, 1):
                SubElement(polygon, f"x{number}").text = f"{x:.9g}"
                SubElement(polygon, f"y{number}").text = f"{y:.9g}"
    for root, target in zip(roots, _targets(data, folder / "Annotations", ".xml"), strict=True):
        indent(root)
        target.write_bytes(tostring(root, encoding="utf-8"))
    return notes


def _objects(data: CocoData, notes: Notes) -> Iterator[tuple[int, int, np.ndarray]]:
    """Image, index and box (x1, y1, x2, y2 within its image) of each object."""
    for index, error in data.mask_errors.items():
        raise DataError(f"{data.json_file}: {data.where(index)} {error}")
    count, first = data.unknown_images
    if count:
        notes.add(f"annotations of unknown images ({count}), left out", first)
    if data.keypoints.size:
        notes.add("keypoints, left out", data.json_file)
    for index, (image, bbox) in enumerate(zip(data.image.tolist(), data.bbox, strict=True)):
        if data.crowd[index]:
            notes.add("crowd regions, which are no objects, left out", data.where(index))
            continue
        corners = np.array([bbox[:2], bbox[:2] + bbox[2:]])
        box = np.clip(corners, 0, [data.widths[image], data.heights[image]]).ravel()
        if (box[2:] <= box[:2]).any():
            notes.add("objects whose box has no area in its image, left out", data.where(index))
            continue
        yield image, index, box


def _targets(data: CocoData, folder: Path, suffix: str) -> list[Path]:
    """The file to write for each image; never outside of ``folder``."""
    targets: dict[Path, str] = {}
    for file_name in data.file_names:
        name = PurePosixPath(file_name)
        if name.is_absolute() or ".." in name.parts or not name.name or "\0" in file_name:
            raise DataError(
                f"{data.json_file}: an image has the file_name {file_name!r}; it must be a path "
                "below the folder of the images"
            )
        target = (folder / name).with_suffix(suffix)
        if target in targets:
            raise DataError(
                f"{data.json_file}: {targets[target]} and {file_name} would share {target}; rename "
                "one of the images"
            )
        targets[target] = file_name
        target.parent.mkdir(parents=True, exist_ok=True)
    return list(targets)


def _polygons(data: CocoData, index: int) -> list[np.ndarray]:
    """The outlines of a mask, (N, 2) each; those of holes, too."""
    mask = data.segmentation(index)
    if not isinstance(mask, dict):
        return [polygon.reshape(-1, 2) for polygon in mask or []]
    x, y, width, height = mask_util.toBbox(mask).astype(int)
    part = mask_util.decode(mask)[y : y + height, x : x + width].astype(bool)
    # supervision traces through the centres of the border pixels: of pixels cut into 3 x 3, the
    # nearest corners of whole pixels are the border itself.
    fine = part.repeat(3, axis=0).repeat(3, axis=1)
    return [np.round((polygon + 0.5) / 3) + [x, y] for polygon in mask_to_polygons(fine)]


def _joined(polygons: list[np.ndarray]) -> np.ndarray:
    """One polygon, as YOLO has it: the parts with a way from each to the next, which is gone both
    ways and so holds no area. (With the rule of even and odd, which pycocotools and OpenCV fill
    by, outlines of holes remain holes.)"""
    first, *others = [np.concatenate([p, p[:1]]) for p in polygons]
    if not others:
        return polygons[0]
    back = [p[:1] for p in [first, *others[:-1]]][::-1]
    return np.concatenate([first, *others, *back])
