"""A COCO dataset as YOLO or Pascal VOC. Not by supervision, which draws polygons on the grid of
pixels, writes each part of an object as one of its own, and rounds boxes."""

from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import yaml
from pycocotools import mask as mask_util
from supervision import mask_to_polygons
from supervision.dataset.formats.pascal_voc import object_to_pascal_voc

from gn_detect.data import DataError
from gn_detect.data.coco_data import CocoData

from .to_coco import Notes

# Of an image: class, box (x1, y1, x2, y2 within it), and outline, (N, 2), of those with masks.
Objects = list[tuple[int, np.ndarray, np.ndarray | None]]


def from_coco(data: CocoData, folder: Path, kind: str) -> Notes:
    """Write the label files of ``kind``, "yolo" or "voc", into ``folder``; masks as polygons, as
    supervision and Roboflow have them in Pascal VOC, too. Returns what is lost."""
    notes = Notes()
    names = [category.name for category in data.categories]
    write, suffix = (_yolo, ".txt") if kind == "yolo" else (_voc, ".xml")
    targets = _targets(data, folder / ("labels" if kind == "yolo" else "Annotations"), suffix)
    columns = (targets, data.file_names, data.widths.tolist(), data.heights.tolist())
    for objects, target, name, *size in zip(_objects(data, notes), *columns, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(write(objects, name, size, names))
    if kind == "yolo":
        config = {"train": "images", "val": "images", "names": dict(enumerate(names))}
        text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False, encoding="utf-8")
        (folder / "data.yaml").write_bytes(text)
    return notes


def _yolo(objects: Objects, name: str, size: list[int], names: list[str]) -> bytes:
    text = ""
    for category, box, outline in objects:
        if outline is None:
            outline = np.array([(box[:2] + box[2:]) / 2, box[2:] - box[:2]])
        values = (outline / size).clip(0, 1).ravel()
        text += " ".join([str(category), *(f"{value:.9g}" for value in values)]) + "\n"
    return text.encode()


def _voc(objects: Objects, name: str, size: list[int], names: list[str]) -> bytes:
    root = Element("annotation")
    SubElement(root, "filename").text = PurePosixPath(name).name
    sides = SubElement(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*size, 3), strict=True):
        SubElement(sides, tag).text = str(value)
    for category, box, outline in objects:
        element = object_to_pascal_voc(box, names[category], outline)
        # Counted from 1; the last pixel of an object is its far edge counted from 0.
        for corner, value in zip(element.find("bndbox"), box + [1, 1, 0, 0], strict=True):
            corner.text = f"{value:.9g}"
        root.append(element)
    indent(root)
    return tostring(root, encoding="utf-8")


def _objects(data: CocoData, notes: Notes) -> list[Objects]:
    data.refuse(list(data.mask_errors), data.mask_errors.get)
    if data.unknown_images[0]:
        count, first = data.unknown_images
        notes["annotations of unknown images, left out"] = [first] * count
    if data.keypoints.size:
        notes.add("keypoints, left out", data.json_file)
    objects = [[] for _ in data.file_names]
    for index, image in enumerate(data.image.tolist()):
        corner, sides = data.bbox[index].reshape(2, 2)
        size = [data.widths[image], data.heights[image]]
        box = np.clip([corner, corner + sides], 0, size).ravel()
        if data.crowd[index]:
            notes.add("crowd regions, which are no objects, left out", data.where(index))
        elif (box[2:] <= box[:2]).any():
            notes.add("objects whose box has no area in its image, left out", data.where(index))
        else:
            objects[image].append((int(data.category[index]), box, _outline(data, index)))
    return objects


def _targets(data: CocoData, folder: Path, suffix: str) -> list[Path]:
    """The file to write for each image, each another one, and never outside of ``folder``."""
    targets: dict[Path, None] = {}
    for file_name in data.file_names:
        name = PurePosixPath(file_name)
        bad = not name.name or name.is_absolute() or ".." in name.parts or "\0" in file_name
        target = folder if bad else (folder / name).with_suffix(suffix)
        if bad or target in targets:
            raise DataError(
                f"{data.json_file}: the file_name {file_name!r} must be a path below the folder of "
                "the images, which no other image has with another suffix"
            )
        targets[target] = None
    return list(targets)


def _outline(data: CocoData, index: int) -> np.ndarray | None:
    """A mask as one polygon, as YOLO has it: its parts with a way from each to the next, gone both
    ways, which holds no area. (Filled by even and odd, outlines of holes remain holes.)"""
    mask = data.segmentation(index)
    if isinstance(mask, dict):
        mask = outlines(mask)
    parts = [np.reshape(polygon, (-1, 2)) for polygon in mask or []]
    if len(parts) > 1:
        parts = [np.concatenate([p, p[:1]]) for p in parts]
        parts += [p[:1] for p in parts[-2::-1]]
    return np.concatenate(parts) if parts else None


def outlines(rle: dict) -> list[np.ndarray]:
    """The borders of a mask that is a compressed RLE, of its parts and of holes in them, each
    (N, 2): x and y of corners of pixels."""
    x, y, width, height = mask_util.toBbox(rle).astype(int)
    part = mask_util.decode(rle)[y : y + height, x : x + width].astype(bool)
    # supervision traces through the centres of the border pixels: of pixels cut into 3 x 3, the
    # nearest corners of whole pixels are the border itself.
    fine = part.repeat(3, axis=0).repeat(3, axis=1)
    return [np.round((polygon + 0.5) / 3) + [x, y] for polygon in mask_to_polygons(fine)]
