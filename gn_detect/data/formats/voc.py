"""Pascal VOC: an XML for each image, a box for each object, and masks as PNG, where the pixels of
the i-th object have the value i (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc)."""

from __future__ import annotations

import functools
from pathlib import Path, PureWindowsPath
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import ElementTree
from PIL import Image
from pycocotools import mask as mask_util
from supervision.dataset.formats.pascal_voc import detections_from_xml_obj, parse_polygon_points

from gn_detect.data import DataError

from .to_coco import LabeledImages, LabeledObject, Notes, check_size, find_labels, read_text

Color = tuple[int, int, int]
VOID = 255  # a pixel at the border of an object, of no class


def read_voc(source: Path, images: Path | None, split: str | None) -> LabeledImages:
    """
    Args:
        source: folder with ``Annotations``, or of the XML files themselves.
        images: folder of the images; else ``JPEGImages`` or ``images`` in ``source``, or that of
            the XML files.
        split: a list of images, ``ImageSets/Main/<split>.txt`` or in another folder there.
    """
    if source.name.lower() == "annotations":
        source = source.parent
    usual = (p for p in (source / "JPEGImages", source / "images") if p.is_dir())
    root = images or next(usual, source)
    folders, suffix = [source / "Annotations", source / "annotations", source], ".xml"
    parse = functools.partial(_parse, mask_root=source)
    label_map = source / "labelmap.txt"
    if label_map.is_file() and not next(source.rglob("*.xml"), None):
        folders, suffix = [source / "SegmentationObject"], ".png"
        parse = functools.partial(_parse_masks, names=_read_label_map(label_map))
    folder, labels = find_labels(root, folders, suffix)
    files = set(folder.rglob(f"*{suffix}"))
    if split:
        stems = _read_split(source, split)
        labels = {p: f for p, f in labels.items() if _stem(f, folder) in stems}
        files = {f for f in files if _stem(f, folder) in stems}
    return LabeledImages(
        image_root=root,
        labels=labels,
        files=files,
        parse=parse,
        box_is_mask=False,  # most images of Pascal VOC have no masks
    )


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _read_split(source: Path, split: str) -> set[str]:
    sets = source / "ImageSets"
    folders = [sets / "Main", sets / "Segmentation", sets]
    path = next((f / f"{split}.txt" for f in folders if (f / f"{split}.txt").is_file()), None)
    if path is None:
        found = sorted(_stem(p, sets) for p in sets.rglob("*.txt"))
        raise DataError(
            f"there is no list of the images of --split {split} in {sets} (there are: "
            f"{', '.join(found[:10]) or 'none'})"
        )
    return {line.split()[0] for line in read_text(path).split("\n") if line.strip()}


def _parse(
    label_file: Path, size: tuple[int, int], notes: Notes, *, mask_root: Path
) -> list[LabeledObject]:
    try:
        root = ElementTree.parse(label_file).getroot()
    except (ParseError, ValueError, LookupError, OSError) as error:
        what = str(error) or type(error).__name__
        raise DataError(f"{label_file} cannot be read as XML ({what}); export it again") from None
    stated = PureWindowsPath((root.findtext("filename") or "").strip()).name
    if stated and label_file.stem not in (stated, PureWindowsPath(stated).stem):
        raise DataError(
            f"{label_file} names the image {stated!r} in <filename>; an XML file and its image "
            "must have the same name"
        )
    sides = [root.findtext(f"size/{side}") or "" for side in ("width", "height")]
    if all(side.strip().isdigit() for side in sides):
        check_size(label_file, (int(sides[0]), int(sides[1])), size)
    objects = []
    for number, element in enumerate(root.findall("object"), 1):
        where = f"{label_file}, object {number}"
        try:
            # supervision would draw polygons on the grid of pixels.
            polygons = [parse_polygon_points(p) - 1 for p in element.findall("polygon")]
            for polygon in element.findall("polygon"):
                element.remove(polygon)
            annotation = Element("annotation")
            annotation.append(element)
            found, (name,) = detections_from_xml_obj(annotation, [], size)
            if any(len(polygon) < 3 for polygon in polygons):
                raise ValueError("a polygon of fewer than 3 points")
        except (ValueError, IndexError) as error:
            raise DataError(
                f"{where} cannot be read: {error}; it needs a <name>, and <xmin>, <ymin>, <xmax>, "
                "<ymax> in a <bndbox>"
            ) from None
        box = found.xyxy[0].astype(np.float64)
        objects.append(LabeledObject(name.strip(), where, box, polygons))
        if (element.findtext("difficult") or "0").strip() not in ("", "0"):
            notes.add("objects marked as difficult, taken as any other", where)
    mask_file = mask_root / "SegmentationObject" / f"{label_file.stem}.png"
    if mask_file.is_file():
        _add_masks(objects, mask_file, size, notes)
    elif (mask_root / "SegmentationClass" / mask_file.name).is_file():
        notes.add("masks of classes alone, which tell no objects apart, left out", mask_file.name)
    return objects


def _add_masks(
    objects: list[LabeledObject], mask_file: Path, size: tuple[int, int], notes: Notes
) -> None:
    numbers = _read_indices(mask_file, size)
    last = numbers[numbers != VOID].max(initial=0)
    if last > len(objects):
        raise DataError(
            f"{mask_file} has pixels of an object {last}, but the XML has {len(objects)} objects; "
            "the pixels of the first object are 1, those of the second 2, ..."
        )
    for number, labeled in enumerate(objects, 1):
        mask = numbers == number
        if not mask.any():
            notes.add("objects without a pixel in SegmentationObject, boxes alone", labeled.where)
            continue
        x1, y1, x2, y2 = np.clip(labeled.xyxy, 0, None).astype(int)
        if not mask[y1 : y2 + 1, x1 : x2 + 1].any():
            raise DataError(
                f"{labeled.where} has no pixel of its mask in its box: {mask_file} must number the "
                "objects in the order of the XML"
            )
        labeled.polygons, labeled.rle = [], mask_util.encode(np.asfortranarray(mask))


def _parse_masks(
    mask_file: Path, size: tuple[int, int], notes: Notes, *, names: dict[Color, str]
) -> list[LabeledObject]:
    """The objects of CVAT's segmentation masks, without XML: ``labelmap.txt`` names the colours in
    ``SegmentationClass``."""
    numbers = _read_indices(mask_file, size)
    class_file = mask_file.parents[1] / "SegmentationClass" / mask_file.name
    colors = _read_pixels(class_file, size).convert("RGB")
    objects = []
    for number in set(np.unique(numbers).tolist()) - {0, VOID}:
        mask, where = numbers == number, f"{mask_file}, object {number}"
        found, counts = np.unique(np.array(colors)[mask], axis=0, return_counts=True)
        color = tuple(found[counts.argmax()].tolist())
        if color not in names:
            raise DataError(
                f"{where} has the colour {color} in {class_file}, which labelmap.txt does not name"
            )
        rle = mask_util.encode(np.asfortranarray(mask))
        x, y, width, height = mask_util.toBbox(rle)
        box = np.array([x, y, x + width, y + height])
        objects.append(LabeledObject(names[color], where, box, rle=rle))
    return objects


def _read_label_map(path: Path) -> dict[Color, str]:
    """Colour -> class, of lines ``name:red,green,blue:parts:actions``."""
    names = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, color, *_ = line.split(":")
            red, green, blue = map(int, color.split(","))
        except ValueError:
            raise DataError(
                f"{path}, line {number} is {line[:80]!r}; it must be name:red,green,blue::"
            ) from None
        names[red, green, blue] = name
    return names


def _read_pixels(path: Path, size: tuple[int, int]) -> Image.Image:
    """
    Raises:
        DataError: it cannot be read, or is of another size than (width, height) ``size``.
    """
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow raises what its decoders do
        raise DataError(f"{path} cannot be read as an image ({error}); export it again") from None
    if image.size != size:
        raise DataError(
            f"{path} has {image.width} x {image.height} pixels, its image {size[0]} x {size[1]}; "
            "export it again"
        )
    return image


def _read_indices(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The numbers in a PNG of masks, (height, width) uint8; CVAT writes the colours of Pascal VOC's
    palette in place of its indices."""
    image = _read_pixels(path, size)
    if image.mode in ("P", "L"):
        return np.array(image)
    pixels = np.array(image.convert("RGB"), np.int64).reshape(-1, 3)
    colors, inverse = np.unique(pixels, axis=0, return_inverse=True)
    # VOCdevkit's VOClabelcolormap.m: the bits of an index, three at a time, are the highest of red,
    # green and blue.
    bits = [(colors >> (7 - k) & 1) << (3 * k + np.arange(3)) for k in range(8)]
    numbers = np.sum(bits, axis=(0, 2))
    if numbers.max() > VOID:
        color = tuple(colors[numbers.argmax()].tolist())
        raise DataError(f"{path} has the colour {color}, which is not of Pascal VOC's palette")
    return numbers.astype(np.uint8)[inverse].reshape(size[::-1])
