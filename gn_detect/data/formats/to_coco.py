"""Annotations in other formats, YOLO, Pascal VOC and LabelMe, as the content of a COCO JSON.

supervision parses the boxes of YOLO and Pascal VOC. The rest of its way to COCO loses too much. It
draws each polygon on the grid of pixels and traces it through their centres (measured on
photos of COCO: mean IoU 0.95, a third of the masks above 0.98); it marks objects of several parts
as crowds, which are not trained on; it numbers the classes of Pascal VOC as they occur, so that
train and val differ, and closes gaps in those of YOLO; it looks into one folder, not into those
below, and it knows neither the masks of Pascal VOC nor circles and masks of LabelMe. So files are
found, and polygons and masks kept as they are, here and in the file of each format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from gn_detect.data import DataError

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "val", "valid", "test")  # their usual folders


class Notes(dict[str, list[str]]):
    """What is lost or changed on the way: kind -> the items."""

    def add(self, kind: str, item: object) -> None:
        self.setdefault(kind, []).append(str(item))

    def __str__(self) -> str:
        return "; ".join(f"{k}: {len(items)} (the first: {items[0]})" for k, items in self.items())


@dataclass
class LabeledObject:
    """An object of a label file.

    Attributes:
        label: name of its class; for YOLO its number.
        where: file and item, for messages.
        xyxy: its box in pixels, (4,) float.
        polygons: of its mask, each (N, 2) float, x and y in pixels; empty for a box alone.
        rle: its mask, compressed, in place of polygons.
    """

    label: str | int
    where: str
    xyxy: np.ndarray
    polygons: list[np.ndarray] = field(default_factory=list)
    rle: dict | None = None


@dataclass
class LabeledImages:
    """Images with their label files, as a format arranges them.

    Attributes:
        image_root: folder of the images.
        labels: image -> its label file, which need not exist.
        files: the label files that exist.
        parse: (label file, (width, height) of its image, notes) -> its objects.
        names: number of a class -> its name, where the labels are numbers.
        box_is_mask: among objects with masks, one with a box alone has that as its mask.
    """

    image_root: Path
    labels: dict[Path, Path]
    files: set[Path]
    parse: Callable[[Path, tuple[int, int], Notes], list[LabeledObject]]
    names: dict[int, str] | None = None
    box_is_mask: bool = True


def to_coco(source: LabeledImages, classes: list[str] | None = None) -> tuple[dict, Notes]:
    """The content of a COCO JSON: ids from 1, images by path, file names relative to
    ``image_root``, sizes after the EXIF rotation, as Detectron2 reads photos.

    Args:
        classes: names in the order of their ids; else those of ``source``, or sorted.

    Returns:
        the content, and what was lost or changed.

    Raises:
        DataError: a file cannot be used as it is, or there is no object at all.
    """
    notes = Notes()
    paths = sorted(source.labels)
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(image_size, paths))
    images, annotations, labels = [], [], []
    for image_id, (path, size) in enumerate(zip(paths, sizes, strict=True), 1):
        name = path.relative_to(source.image_root).as_posix()
        width, height = size
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        label_file = source.labels[path]
        if label_file not in source.files:
            notes.add("images without a label file, kept as images without objects", name)
            continue
        for labeled in source.parse(label_file, size, notes):
            if annotation := _annotation(labeled, size, notes):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
                labels.append((labeled.label, labeled.where))
    for label_file in sorted(source.files.difference(source.labels.values())):
        notes.add("label files without an image, left out", label_file)
    if not annotations:
        raise DataError(
            f"there is no object in the label files of the {len(images)} images in "
            f"{source.image_root}{f'; {notes}' if notes else ''}"
        )
    categories = _categories(source, classes, labels)
    for annotation, (label, where) in zip(annotations, labels, strict=True):
        if label not in categories:
            declared = ", ".join(map(str, list(categories)[:10])) + ", ..." * (len(categories) > 10)
            place = "--classes" if classes else "data.yaml"
            raise DataError(
                f"{where} has the class {label!r}, which is none of {declared}; correct it, or add "
                f"its name to {place}"
            )
        annotation["category_id"] = categories[label][0]
    boxes = [a for a in annotations if "segmentation" not in a]
    if source.box_is_mask and 0 < len(boxes) < len(annotations):
        for a in boxes:
            (x, y, w, h), name = a["bbox"], images[a["image_id"] - 1]["file_name"]
            a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            notes.add("boxes alone among masks, whose rectangle is taken as the mask", name)
    content = [{"id": id_, "name": name} for id_, name in categories.values()]
    return {"images": images, "annotations": annotations, "categories": content}, notes


def _categories(
    source: LabeledImages, classes: list[str] | None, labels: list[tuple[str | int, str]]
) -> dict[str | int, tuple[int, str]]:
    """Label -> id and name of its class."""
    if source.names is not None:
        return {index: (index + 1, name) for index, name in sorted(source.names.items())}
    names = classes or sorted({label for label, _ in labels})
    return {name: (id_, name) for id_, name in enumerate(names, 1)}


def _annotation(labeled: LabeledObject, size: tuple[int, int], notes: Notes) -> dict | None:
    """The COCO annotation, without its ids; None for an object that has no pixel."""
    width, height = size
    (x1, y1, x2, y2), limit = labeled.xyxy, np.array([width, height])
    if x2 < 0 or y2 < 0 or x1 > width or y1 > height:
        raise DataError(
            f"{labeled.where} reaches from x {x1:g} to {x2:g} and y {y1:g} to {y2:g}, outside of "
            f"its image of {width} x {height} pixels; correct or delete it"
        )
    corners = labeled.xyxy.reshape(2, 2)
    low, high = np.clip(corners, 0, limit).round(3)
    if np.abs(corners - [low, high]).max() > 1:
        notes.add("objects that reach beyond their image, clipped", labeled.where)
    area = round(float(np.prod(high - low)), 3)
    annotation = {"bbox": [*low.tolist(), *(high - low).round(3).tolist()], "iscrowd": 0}
    if labeled.polygons:
        clipped = [np.clip(p, 0, limit).round(3).ravel().tolist() for p in labeled.polygons]
        annotation["segmentation"] = clipped
        rle = mask_util.merge(mask_util.frPyObjects(clipped, height, width))
        area = float(mask_util.area(rle))
    elif labeled.rle:
        area = float(mask_util.area(labeled.rle))
        counts = labeled.rle["counts"].decode("ascii")
        annotation["segmentation"] = {"size": [height, width], "counts": counts}
    if area == 0 or (high - low).max() < 1:
        notes.add("objects without a pixel, left out", labeled.where)
        return None
    return annotation | {"area": area}


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image after its EXIF rotation, from its header.

    Raises:
        DataError: it is no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientation
            return image.size[::-1] if turned else image.size
    except Exception as error:  # Pillow raises what its decoders do
        raise DataError(
            f"{path} cannot be read as an image ({error}); replace it or take it away"
        ) from None


def check_size(label_file: Path, stated: tuple[float, float], size: tuple[int, int]) -> None:
    """Compare what a label file says of its image (0: nothing), (width, height), with its size.

    Raises:
        DataError: they differ, so that the coordinates are of another image.
    """
    if all(stated) and tuple(stated) != tuple(size):
        turned = tuple(stated) == tuple(size[::-1])
        cause = "it is turned by its EXIF orientation" if turned else "was it resized?"
        raise DataError(
            f"{label_file} is for an image of {stated[0]:g} x {stated[1]:g} pixels, but its image "
            f"has {size[0]} x {size[1]} ({cause}); the coordinates must be of the image as shown"
        )


def list_images(folder: Path) -> list[Path]:
    """The images in ``folder`` and below it, sorted.

    Raises:
        DataError: there are none; or two differ in their suffix alone, and so share a label file.
    """
    if not folder.is_dir():
        raise DataError(f"the image folder {folder} does not exist; name it with --images")
    images = sorted(
        p  # a Mac leaves ._photo.jpg, which is no image
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not images:
        raise DataError(f"there is no image in {folder}; name the folder of the images: --images")
    stems: dict[Path, Path] = {}
    for image in images:
        other = stems.setdefault(image.with_suffix(""), image)
        if other is not image:
            raise DataError(f"{other} and {image.name} share one label file; take one away")
    return images


def find_labels(
    image_root: Path, folders: Sequence[Path], suffix: str
) -> tuple[Path, dict[Path, Path]]:
    """The first of ``folders`` in which an image has a label file: of the same path and name, but
    for ``suffix``; and image -> label file.

    Raises:
        DataError: there is none.
    """
    images, folders = list_images(image_root), list(dict.fromkeys(folders))
    for folder in folders:
        labels = {p: folder / p.relative_to(image_root).with_suffix(suffix) for p in images}
        if any(label.is_file() for label in labels.values()):
            return folder, labels
    raise DataError(
        f"no image in {image_root} has a label file ({suffix}) of its name in "
        f"{' or '.join(map(str, folders))}; give the folder of the label files as the input, and "
        "that of the images with --images"
    )


def read_text(path: Path) -> str:
    """
    Raises:
        DataError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from None
