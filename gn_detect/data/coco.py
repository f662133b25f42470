"""COCO-format data of the user's own: registered, and looked through before a run starts.

What Detectron2 and pycocotools would report in the middle of a run, or never, is found here in one
pass over the annotations. Loading itself is Detectron2's (``load_coco_json``).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

logger = logging.getLogger(__name__)


# Datasets with instances in a COCO JSON, by the evaluator that Detectron2 declares for them.
COCO_EVALUATORS = ("coco", "coco_panoptic_seg")


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the item, and what to do."""


@dataclass
class CocoSummary:
    """What :func:`check_coco_json` found.

    Attributes:
        classes: category id -> name, ordered by id, as Detectron2 orders its classes.
        num_images, num_annotations: as listed in the file.
        num_crowds: annotations that are crowd regions: no objects to be trained on.
        has_rle: an object (not a crowd region) has its mask as RLE.
    """

    classes: dict[int, str]
    num_images: int
    num_annotations: int = 0
    num_crowds: int = 0
    has_rle: bool = False

    def __str__(self) -> str:
        text = f"{self.num_images} images, {self.num_annotations} annotations"
        if self.num_crowds:
            text += f" ({self.num_crowds} of them crowds, which are not trained on)"
        return text


def register_coco_json(name: str, json_file: str, image_root: str) -> None:
    """Register a COCO JSON under ``name``, in place of what had that name before."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, image_root)


def check_coco_dataset(name: str, **needs: bool) -> CocoSummary | None:
    """Check a registered dataset, generating it first if it is a generated one.

    Args:
        **needs: ``masks``, ``training`` and ``evaluation`` of :func:`check_coco_json`.

    Returns:
        the summary, or None for a dataset that is not a COCO JSON.

    Raises:
        DataError: see :func:`check_coco_json`; or no dataset has this name.
    """
    if name not in DatasetCatalog.list():
        raise DataError(
            f"DATASETS names {name!r}, which is not registered. For data of your own, use "
            "--train-json, --train-images, --val-json and --val-images (or register_coco_json in a "
            "lazy config)"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in COCO_EVALUATORS:
        return None
    if metadata.get("generate"):
        metadata.generate()
    if name.startswith("coco_") and not os.path.isfile(metadata.json_file):
        raise DataError(
            f"{name}: there is no {metadata.json_file}; set DETECTRON2_DATASETS to the directory "
            "of coco/"
        )
    return check_coco_json(metadata.json_file, metadata.image_root, **needs)


def check_coco_json(
    json_file: str, image_root: str, *, masks: bool, training: bool, evaluation: bool
) -> CocoSummary:
    """Look through a COCO JSON and the directory of its images, without opening an image.

    Degenerate annotations (a box of zero area; polygons of fewer than 3 points), which Detectron2
    drops from the training data, are counted in one warning.

    Args:
        masks: the model needs the masks of the objects.
        training: the file is trained on. If not, it may lack annotations altogether, as the test
            sets of COCO do: Detectron2 then writes predictions without scoring them.
        evaluation: pycocotools scores against the file: it needs ``area`` and ``iscrowd``.

    Raises:
        DataError: the file is missing, truncated or empty, an image is absent, or an annotation
            cannot be used; the message names the first such item.
    """
    content = _read_json(json_file, needs_annotations=training)
    classes = _check_categories(content["categories"], json_file)
    images = _check_images(content["images"], json_file, image_root)
    annotations = content.get("annotations")
    if annotations is None:
        return CocoSummary(classes, len(images))
    summary = CocoSummary(classes, len(images), len(annotations))
    checker = _AnnotationChecker(json_file, summary, images, masks, evaluation)
    for index, annotation in enumerate(annotations):
        checker.check(annotation, index)
    checker.warn()
    if not checker.num_valid:
        raise DataError(f"{json_file} holds no annotation of an object that could be used")
    return summary


def _read_json(json_file: str, needs_annotations: bool) -> dict:
    try:
        with open(json_file, encoding="utf-8") as f:
            content = json.load(f)
    except OSError as error:
        raise DataError(f"cannot read {json_file}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{json_file} is not valid JSON ({error}); is it truncated?") from None
    for key in ("images", "categories", "annotations"):
        if key == "annotations" and key not in content and not needs_annotations:
            continue
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{json_file} is not in COCO format: it has no list {key!r}")
    return content


def _check_categories(categories: list, json_file: str) -> dict[int, str]:
    classes = {}
    for category in categories:
        if not isinstance(category, dict) or not {"id", "name"} <= category.keys():
            raise DataError(f"{json_file}: category {category!r} needs an 'id' and a 'name'")
        if category["id"] in classes:
            raise DataError(f"{json_file} declares category id {category['id']} twice")
        classes[category["id"]] = category["name"]
    if not classes:
        raise DataError(f"{json_file} declares no categories")
    return dict(sorted(classes.items()))


def _check_images(images: list, json_file: str, image_root: str) -> dict[int, dict]:
    """Return image id -> entry of the image."""
    if not images:
        raise DataError(f"{json_file} lists no images")
    if not os.path.isdir(image_root):
        raise DataError(f"the image directory {image_root} (for {json_file}) does not exist")
    by_id, listings, absent = {}, {}, []
    for image in images:
        for key in ("id", "file_name", "height", "width"):
            if not isinstance(image, dict) or key not in image:
                raise DataError(f"{json_file}: image {image!r} has no {key!r}")
        if image["id"] in by_id:
            raise DataError(f"{json_file} lists image id {image['id']} twice")
        by_id[image["id"]] = image
        # One listing per directory: faster than a look at each of 118,000 files.
        directory, base = os.path.split(os.path.join(image_root, image["file_name"]))
        if directory not in listings:
            listings[directory] = set(os.listdir(directory)) if os.path.isdir(directory) else ()
        if base not in listings[directory]:
            absent.append(image["file_name"])
    if absent:
        raise DataError(
            f"{len(absent)} of the {len(images)} images listed in {json_file} are not in "
            f"{image_root}, the first: {absent[0]}"
        )
    return by_id


class _AnnotationChecker:
    def __init__(self, json_file, summary, images, masks, evaluation):
        self.json_file, self.summary, self.images = json_file, summary, images
        self.masks, self.evaluation = masks, evaluation
        # Two official files repeat ids; Detectron2's load_coco_json makes the same exception.
        self.unique_ids = "minival" not in json_file
        self.degenerate: dict[str, list[str]] = defaultdict(list)  # kind -> annotations
        self.seen: set = set()
        self.num_valid = 0

    def check(self, annotation: dict, index: int) -> None:
        if not isinstance(annotation, dict) or "id" not in annotation:
            raise DataError(f"{self.json_file}: annotation number {index} has no 'id'")
        if error := self._error(annotation):
            raise DataError(f"{self.json_file}: {self._where(annotation)} {error}")
        self.seen.add(annotation["id"])
        if annotation.get("iscrowd", 0):
            self.summary.num_crowds += 1
        elif annotation.get("image_id") not in self.images:
            pass  # Detectron2 counts them in a warning
        elif kind := self._degenerate(annotation):
            self.degenerate[kind].append(self._where(annotation))
        else:
            self.num_valid += 1
            self.summary.has_rle |= isinstance(annotation.get("segmentation"), dict)

    def _where(self, annotation: dict) -> str:
        image_id = annotation.get("image_id")
        image = self.images.get(image_id, {"file_name": image_id})["file_name"]
        return f"annotation {annotation['id']} (image {image})"

    def _error(self, annotation: dict) -> str | None:
        if annotation["id"] in self.seen and self.unique_ids:
            return "has an id that another annotation has too; ids must be unique"
        classes = self.summary.classes
        if annotation.get("category_id") not in classes:
            declared = ", ".join(map(str, list(classes)[:10]))
            return (
                f"has category_id {annotation.get('category_id')}, which 'categories' does not "
                f"declare (it declares {declared}{', ...' if len(classes) > 10 else ''})"
            )
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
            return f"has the bbox {box}; four finite numbers x, y, width, height are needed"
        if annotation.get("ignore", 0):
            return "has 'ignore', which Detectron2 does not support; use 'iscrowd', or delete it"
        if self.evaluation:
            for key in ("area", "iscrowd"):
                if key not in annotation:
                    return f"has no {key!r}, which the COCO evaluation needs; add it"
        if self.masks and (self.evaluation or not annotation.get("iscrowd", 0)):
            return self._segmentation_error(annotation)
        return None

    def _segmentation_error(self, annotation: dict) -> str | None:
        segmentation = annotation.get("segmentation")
        if not segmentation:
            return (
                "has no segmentation; add it, or train boxes alone with MODEL.MASK_ON False (in "
                "lazy configs use_instance_mask=False of the mapper)"
            )
        image = self.images.get(annotation.get("image_id"))
        if isinstance(segmentation, dict) and {"counts", "size"} <= segmentation.keys():
            if image and list(segmentation["size"]) != [image["height"], image["width"]]:
                return (
                    f"has an RLE of {segmentation['size']} pixels, but its image is declared as "
                    f"{[image['height'], image['width']]} (height, width)"
                )
            return None
        try:
            is_polygons = math.isfinite(sum(map(sum, segmentation)))
        except TypeError:
            is_polygons = False
        if not is_polygons:
            return "has a segmentation that is neither a list of polygons nor RLE"
        if self.evaluation and len(segmentation[0]) < 6:
            return "has a first polygon of fewer than 3 points, which pycocotools cannot score"
        return None

    def _degenerate(self, annotation: dict) -> str | None:
        if min(annotation["bbox"][2:]) <= 0:
            return "a box of zero area"
        polygons = annotation.get("segmentation")
        if self.masks and isinstance(polygons, list):
            if not any(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
                return "polygons of fewer than 3 points, or of an odd number of coordinates"
        return None

    def warn(self) -> None:
        if count := sum(map(len, self.degenerate.values())):
            kinds = "; ".join(
                f"{len(items)} with {kind}, the first: {items[0]}"
                for kind, items in self.degenerate.items()
            )
            logger.warning(
                f"{self.json_file}: {count} degenerate annotations; as training data they are "
                f"dropped, as ground truth pycocotools takes them as they are ({kinds})"
            )


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
