"""A COCO dataset in canonical form, packed into arrays: what checks, training and evaluation see.

COCO's 860,001 training annotations take 0.5 GB so, and any question about all of them is one
operation.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import msgspec
import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from safetensors import safe_open
from safetensors.numpy import save_file

from . import DataError
from .coco_file import Category, others, paused_gc

_FORM = "1"  # of packed files
Mask = list[np.ndarray] | dict[str, Any] | None


@dataclass
class CocoData:
    """Images are sorted by id, as Detectron2 sorts them; annotations as in the file. A: those of
    its images; K: keypoints.

    Attributes:
        json_file: where it comes from.
        categories: sorted by id; the position is the class of the model.
        image_ids, file_names, heights, widths: of the images; sizes in pixels.
        has_annotations: False for a test set, whose file has no list of them.
        annotation_ids: as in the file, for messages alone.
        image, category: of each annotation, as positions, (A,) int64.
        bbox: x, y, width, height in pixels, (A, 4) float64.
        area: as in the file, in pixels, (A,) float64; NaN where it has none.
        crowd: crowd regions, which are no objects, (A,) bool.
        keypoints: x, y, visibility, (A, 3 K) float64; (A, 0) where the file has none.
        coordinates, polygon_ends, mask_ends: those of annotation i are the polygons from
            ``mask_ends[i - 1]`` to ``mask_ends[i]``, which end in ``coordinates`` so.
        rles: annotation -> counts of its compressed RLE.
        mask_errors, keypoint_errors: annotation -> why they cannot be used.
        no_mask: annotations that have none, (A,) bool.
        unknown_images: how many annotations were left out, as no image has their ``image_id``, and
            the first of them in words.
        mended: what the file says in other words than it should, and how it was taken.
    """

    json_file: str
    categories: list[Category]
    image_ids: list[int | str]
    file_names: list[str]
    heights: np.ndarray
    widths: np.ndarray
    has_annotations: bool
    annotation_ids: list[Any]
    image: np.ndarray
    category: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    no_mask: np.ndarray
    keypoints: np.ndarray
    coordinates: np.ndarray
    polygon_ends: np.ndarray
    mask_ends: np.ndarray
    rles: dict[int, str] = field(default_factory=dict)
    mask_errors: dict[int, str] = field(default_factory=dict)
    keypoint_errors: dict[int, str] = field(default_factory=dict)
    unknown_images: tuple[int, str] = (0, "")
    mended: list[str] = field(default_factory=list)

    @functools.cached_property
    def classes(self) -> dict[int | str, str]:
        """Category id -> name, in the order of the classes."""
        return {c.id: c.name for c in self.categories}

    def where(self, index: int) -> str:
        """Annotation ``index``, in the words of a message."""
        image = self.file_names[self.image[index]]
        return f"annotation {self.annotation_ids[index]!r} (image {image})"

    def refuse(self, bad: Sequence[int], why: Callable[[int], str]) -> None:
        """
        Raises:
            DataError: there are ``bad`` annotations; says ``why`` of the first, counts the others.
        """
        if len(bad):
            more = others(len(bad) - 1, "annotations")
            raise DataError(f"{self.json_file}: {self.where(bad[0])} {why(bad[0])}{more}")

    def num_trained(self, filter_empty: bool = True, min_keypoints: int = 0) -> int:
        """How many images Detectron2's ``get_detection_dataset_dicts`` keeps for training."""
        count, trained = len(self.image_ids), self.has_annotations
        kept = np.ones(count, bool)
        if trained and filter_empty:
            kept &= np.bincount(self.image[~self.crowd], minlength=count) > 0
        if trained and min_keypoints > 0:
            visible = (self.keypoints[:, 2::3] > 0).sum(axis=1)
            kept &= np.bincount(self.image, visible, minlength=count) >= min_keypoints
        return int(kept.sum())

    @functools.cached_property
    def _polygons(self) -> list[np.ndarray]:
        ends = [0, *self.polygon_ends.tolist()]
        return [self.coordinates[start:end] for start, end in itertools.pairwise(ends)]

    @functools.cached_property
    def _mask_ends(self) -> list[int]:
        return [0, *self.mask_ends.tolist()]

    def segmentation(self, index: int) -> Mask:
        """Of annotation ``index``: polygons (each x1, y1, x2, y2, ... in pixels, float64), RLE, or
        None, as Detectron2 and pycocotools take them."""
        if index in self.rles:
            image = self.image[index]
            size = [int(self.heights[image]), int(self.widths[image])]
            return {"size": size, "counts": self.rles[index]}
        return self._polygons[self._mask_ends[index] : self._mask_ends[index + 1]] or None

    def areas(self) -> np.ndarray:
        """Of the annotations in pixels, (A,) float64: where the file has none, of the mask, else of
        the box."""
        areas = self.area.copy()
        for index in np.flatnonzero(np.isnan(areas)):
            mask, image = self.segmentation(index), self.image[index]
            if isinstance(mask, list):
                size = self.heights[image], self.widths[image]
                mask = mask_util.merge(mask_util.frPyObjects(mask, *size))
            areas[index] = mask_util.area(mask) if mask else self.bbox[index, 2:].prod()
        return areas

    def dicts(self, image_root: str, file_names: list[str] | None = None) -> list[dict]:
        """Detectron2's standard dataset dicts, as its ``load_coco_json`` returns them; an object
        whose polygons are all of fewer than 3 points keeps its box, with no polygon.

        Args:
            image_root: directory of the images.
            file_names: of the images, in place of their own.
        """
        with paused_gc():
            names = file_names or self.file_names
            return self._dicts([os.path.join(image_root, name) for name in names])

    def _dicts(self, files: list[str]) -> list[dict]:
        images = [
            {
                "file_name": file,
                "height": height,
                "width": width,
                "image_id": id_,
                "annotations": [],
            }
            for file, height, width, id_ in zip(
                *(files, self.heights.tolist(), self.widths.tolist(), self.image_ids),
                strict=True,
            )
        ]
        # Indices of pixels in the file, positions of their centres here.
        keypoints = self.keypoints + np.resize([0.5, 0.5, 0], self.keypoints.shape[1])
        columns = [self.image, self.category, self.bbox, self.crowd.astype(int), self.no_mask]
        rows = zip(*(column.tolist() for column in (*columns, keypoints)), strict=True)
        polygons, ends, rles = self._polygons, self._mask_ends, self.rles
        for index, (image, category, bbox, crowd, no_mask, points) in enumerate(rows):
            item = {"iscrowd": crowd, "bbox": bbox, "category_id": category}
            if index in rles:
                item["segmentation"] = self.segmentation(index)
            elif not no_mask:
                item["segmentation"] = polygons[ends[index] : ends[index + 1]]
            if points:
                item["keypoints"] = points
            item["bbox_mode"] = BoxMode.XYWH_ABS
            images[image]["annotations"].append(item)
        return images

    def ground_truth(self) -> dict:
        """The content of a COCO dataset for pycocotools: annotation ids from 1, of which 0 would
        count as no match; ids of images and categories as in the file."""
        images = [
            {"id": id_, "file_name": name, "height": int(height), "width": int(width)}
            for id_, name, height, width in zip(
                *(self.image_ids, self.file_names, self.heights, self.widths), strict=True
            )
        ]
        content = {"info": {}, "images": images}
        content["categories"] = [
            {k: v for k, v in msgspec.structs.asdict(c).items() if v is not None}
            for c in self.categories
        ]
        if not self.has_annotations:
            return content
        visible = (self.keypoints[:, 2::3] > 0).sum(axis=1)
        content["annotations"] = annotations = []
        rows = zip(self.bbox.tolist(), self.areas().tolist(), strict=True)
        for index, (bbox, area) in enumerate(rows):
            image, mask = self.image[index], self.segmentation(index)
            if isinstance(mask, list):
                mask = [polygon.tolist() for polygon in mask]
            item = {
                "id": index + 1,
                "image_id": self.image_ids[image],
                "category_id": self.categories[self.category[index]].id,
                "bbox": bbox,
                "area": area,
                "iscrowd": int(self.crowd[index]),
            }
            if mask:
                item["segmentation"] = mask
            if self.keypoints.size:
                item["keypoints"] = self.keypoints[index].tolist()
                item["num_keypoints"] = int(visible[index])
            annotations.append(item)
        return content

    def save(self, path: str, stamp: str) -> None:
        """Pack it into a file, which :meth:`load` reads in a fraction of the time of its JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
        rest = msgspec.json.encode({k: v for k, v in values.items() if k not in arrays})
        arrays["rest"] = np.frombuffer(rest, np.uint8)
        save_file(arrays, path, {"stamp": stamp, "form": _FORM})

    @classmethod
    def load(cls, path: str, stamp: str) -> CocoData | None:
        """What :meth:`save` wrote; None if it was with another stamp."""
        with safe_open(path, "numpy") as f:
            if f.metadata() != {"stamp": stamp, "form": _FORM}:
                return None
            arrays = {key: f.get_tensor(key) for key in f.keys()}
        rest = msgspec.json.decode(arrays.pop("rest").tobytes())
        rest["categories"] = msgspec.convert(rest["categories"], list[Category])
        for key in ("rles", "mask_errors", "keypoint_errors"):
            rest[key] = {int(k): v for k, v in rest[key].items()}
        rest["unknown_images"] = tuple(rest["unknown_images"])
        return cls(**rest, **arrays)
