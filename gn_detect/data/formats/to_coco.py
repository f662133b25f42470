"""Images and their label files, of any format, as the content of a COCO JSON.

supervision parses the boxes of YOLO and Pascal VOC. The rest of its way to COCO loses too much: it
traces masks through the centres of their pixels (mean IoU 0.95 on photos of COCO), marks objects of
several parts as crowds, and numbers the classes of Pascal VOC as they occur.
"""

import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import numpy as np
from pycocotools import mask as mask_util

from gn_detect.data import DataError
from gn_detect.data.headers import image_size

Size = tuple[int, int]  # width, height
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Notes(dict[str, list[str]]):
    """What is lost or changed on the way: kind -> the items."""

    def add(self, kind: str, item: object) -> None:
        self.setdefault(kind, []).append(str(item))

    def __str__(self) -> str:
        return "; ".join(f"{k}: {len(items)} (the first: {items[0]})" for k, items in self.items())


@dataclass
class LabeledObject:
    label: str | int  # name of its class; for YOLO its number
    where: str  # file and item, for messages
    box: np.ndarray | None = None  # x1, y1, x2, y2 in pixels, (4,) float; None: that of its mask
    polygons: list[np.ndarray] = field(default_factory=list)  # (N, 2) float, x and y in pixels
    mask: np.ndarray | None = None  # a part of its mask, (height, width) bool


def to_coco(
    root: Path,
    folders: list[Path],
    suffix: str,
    parse: Callable[[Path, Size, Notes], Iterable[LabeledObject]],
    names: dict[int, str] | list[str] | None,
    stems: set[str] | None = None,
) -> tuple[dict, Notes]:
    """The content of a COCO JSON, and what was lost or changed: of the images below ``root`` (sizes
    are those after the EXIF rotation, as Detectron2 reads photos) with label files in the first of
    ``folders`` that has some; of those of a split, where ``stems`` has their names without suffix.
    Classes are ``names``, by number or in order; else all labels, sorted.

    Raises:
        DataError: a file cannot be used as it is, or there is no object at all.
    """
    notes, (labels, files) = Notes(), _pair(root, folders, suffix)
    if stems is not None:
        labels = {image: label for image, label in labels.items() if label.stem in stems}
        files = {label for label in files if label.stem in stems}
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(image_size, map(str, labels)))
    images, annotations, found = [], [], []
    for id_, ((path, label_file), size) in enumerate(zip(labels.items(), sizes, strict=True), 1):
        name = path.relative_to(root).as_posix()
        images.append({"id": id_, "file_name": name, "height": size[1], "width": size[0]})
        if label_file not in files:
            notes.add("images without a label file, kept as images without objects", name)
            continue
        for item in parse(label_file, size, notes):
            if annotation := _annotation(item, size, notes):
                annotations.append({"id": len(annotations) + 1, "image_id": id_, **annotation})
                found.append((item.label, item.where))
    for label_file in sorted(files.difference(labels.values())):
        notes.add("label files without an image, left out", label_file)
    if not annotations:
        raise DataError(f"{root}: no label file of its {len(images)} images has an object; {notes}")
    if not isinstance(names, dict):
        names = {name: name for name in names or sorted({label for label, _ in found})}
    ids = {label: id_ for id_, label in enumerate(names, 1)}
    masks = any("segmentation" in annotation for annotation in annotations)
    for annotation, (label, where) in zip(annotations, found, strict=True):
        if label not in ids:
            raise DataError(
                f"{where} has the class {label!r}, which is none of {str(list(ids))[1:-1]:.200}; "
                "correct it, or add its name to --classes or data.yaml"
            )
        annotation["category_id"] = ids[label]
        if masks and "segmentation" not in annotation:
            notes.add("objects without a mask among others with one, boxes alone", where)
    categories = [{"id": ids[label], "name": name} for label, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}, notes


def _pair(root: Path, folders: list[Path], suffix: str) -> tuple[dict[Path, Path], set[Path]]:
    """Images below ``root`` -> label files of the same path and name in the first of ``folders``
    that has one of them; and all label files there."""
    images = [p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES]
    # A Mac leaves ._photo.jpg, which is no image.
    images = [p for p in images if "/." not in f"/{p.relative_to(root).as_posix()}"]
    images.sort(key=lambda p: p.with_suffix(""))
    splits = {p.relative_to(root).parts[0] for p in images} & {"train", "val", "valid", "test"}
    if not images or len(splits) > 1:
        found = f"the splits {', '.join(sorted(splits))}" if splits else "no image"
        raise DataError(f"{root} has {found}; name the folder of the images with --images")
    for image, other in itertools.pairwise(images):
        if image.with_suffix("") == other.with_suffix(""):
            raise DataError(f"{image} and {other.name} share one label file; take one away")
    for folder in folders:
        labels = {p: folder / p.relative_to(root).with_suffix(suffix) for p in images}
        files = set(folder.rglob(f"*{suffix}"))
        if files.intersection(labels.values()):
            return labels, files
    raise DataError(
        f"no image in {root} has a label file ({suffix}) in {' or '.join(map(str, folders))}; give "
        "the folder of the label files as the input, and that of the images with --images"
    )


def _annotation(item: LabeledObject, size: Size, notes: Notes) -> dict | None:
    if any(len(polygon) < 3 for polygon in item.polygons):
        raise DataError(f"{item.where} has a polygon of fewer than 3 points; correct or delete it")
    polygons = [p.clip(0, size).round(3).ravel().tolist() for p in item.polygons]
    rles = mask_util.frPyObjects(polygons, *size[::-1]) if polygons else []
    points = [*item.polygons]
    if item.mask is not None:
        rles.append(mask_util.encode(np.asfortranarray(item.mask, np.uint8)))
        corner, sides = mask_util.toBbox(rles[-1]).reshape(2, 2)
        points.append(np.stack([corner, corner + sides]))
    box = np.concatenate(points) if item.box is None else item.box.astype(float).reshape(2, 2)
    points = np.concatenate([*points, box])
    low, high = (corner.clip(0, size).round(3) for corner in (box.min(0), box.max(0)))
    sides = (high - low).round(3)
    annotation = {"bbox": [*low.tolist(), *sides.tolist()], "iscrowd": 0}
    area = round(float(sides.prod()), 3)
    if rles:
        rle = mask_util.merge(rles)
        area = float(mask_util.area(rle)) if area else 0
        rle["counts"] = rle["counts"].decode("ascii")
        annotation["segmentation"] = polygons if item.mask is None else rle
    if area == 0 or sides.max() < 1:
        notes.add("objects without a pixel of their image, left out", item.where)
        return None
    if np.abs(points - points.clip(0, size)).max() > 1:
        notes.add("objects that reach beyond their image, clipped", item.where)
    return annotation | {"area": area}


def check_image(label_file: Path, name: str, stated: tuple[float, float], size: Size) -> None:
    """Refuse a label file that is of an image of another name, or size; "" and 0 tell nothing."""
    stem = PureWindowsPath(name.strip()).stem  # takes / and \
    if stem and label_file.stem not in (stem, name.strip()) or all(stated) and stated != size:
        raise DataError(
            f"{label_file} is of {name!r}, {stated[0]:g} x {stated[1]:g} pixels, but its image has "
            f"the same name and {size[0]} x {size[1]} (as shown: EXIF turns it); which is right?"
        )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8 ({error}); save it so") from None
