"""Pascal VOC: an XML for each image, a box for each object, and masks as PNG, where the pixels of
the i-th object have the value i (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc)."""

import functools
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import ElementTree
from PIL import Image
from supervision.dataset.formats.pascal_voc import detections_from_xml_obj, parse_polygon_points

from gn_detect.data import DataError

from .to_coco import LabeledObject, Notes, Size, check_image, read_text, to_coco


def read_voc(
    source: Path, images: Path | None, split: str | None, classes: list[str] | None
) -> tuple[dict, Notes]:
    """``source`` has ``Annotations`` or the XML files; ``split`` is a list in ``ImageSets``."""
    root, stems = images or max(source / "JPEGImages", source, key=Path.is_dir), None
    if split:
        lines = read_text(source / "ImageSets" / f"{split}.txt").split("\n")
        stems = {line.split()[0] for line in lines if line.strip()}
    folders = [source / "Annotations", source]
    return to_coco(root, folders, ".xml", functools.partial(_parse, source), classes, stems)


def _parse(source: Path, label_file: Path, size: Size, notes: Notes) -> list[LabeledObject]:
    try:
        root = ElementTree.parse(label_file).getroot()
    except (ParseError, ValueError, LookupError, OSError) as error:
        raise DataError(f"{label_file} cannot be read as XML ({error!r}); mend it") from None
    sides = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    stated = tuple(int(side) if side.isdecimal() else 0 for side in sides)
    check_image(label_file, root.findtext("filename", ""), stated, size)
    objects = []
    for number, element in enumerate(root.findall("object"), 1):
        where, annotation = f"{label_file}, object {number}", Element("annotation")
        annotation.append(element)
        try:
            polygons = []
            for polygon in element.findall("polygon"):
                polygons.append(parse_polygon_points(polygon).reshape(-1, 2) - 1)
                element.remove(polygon)  # supervision would draw it on the grid of pixels
            found, (name,) = detections_from_xml_obj(annotation, [], size)
        except (ValueError, IndexError) as error:
            raise DataError(
                f"{where} cannot be read: {error}; it needs a <name>, and <xmin>, <ymin>, <xmax>, "
                "<ymax> in a <bndbox>"
            ) from None
        objects.append(LabeledObject(name.strip(), where, found.xyxy[0], polygons))
        if element.findtext("difficult", "").strip() not in ("", "0"):
            notes.add("objects marked as difficult, taken as any other", where)
    mask_file = source / "SegmentationObject" / f"{label_file.stem}.png"
    if mask_file.is_file():
        _add_masks(objects, mask_file, size)
    elif (source / "SegmentationClass" / mask_file.name).is_file():
        notes.add("masks of classes alone, which tell no objects apart, left out", mask_file.name)
    return objects


def _add_masks(objects: list[LabeledObject], mask_file: Path, size: Size) -> None:
    try:
        with Image.open(mask_file) as image:
            numbers = np.array(image)  # 255 is the border of an object, of no class
        if image.mode not in ("P", "L") or image.size != size:
            raise ValueError(f"mode {image.mode}, {image.width} x {image.height} pixels")
        if (last := numbers[numbers < 255].max(initial=0)) > len(objects):
            raise ValueError(f"it has an object {last}, the XML has {len(objects)}")
        for number, item in enumerate(objects, 1):
            mask = numbers == number
            x1, y1, x2, y2 = item.box.clip(0, max(size)).astype(int)
            if mask[y1 : y2 + 1, x1 : x2 + 1].any():
                item.polygons, item.mask = [], mask
            elif mask.any():
                raise ValueError(f"object {number} has no pixel of its mask in its box")
    except Exception as error:  # Pillow raises what its decoders do
        raise DataError(
            f"{mask_file} cannot be used ({error}); it must have a palette and {size[0]} x "
            f"{size[1]} pixels, those of the i-th object of the XML with the value i"
        ) from None
