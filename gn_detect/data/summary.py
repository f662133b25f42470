"""What a COCO dataset holds, and how it meets a model: counts, sizes, shapes, anchors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from .coco_data import CocoData
from .model_input import ModelInput

SMALL, LARGE = 32**2, 96**2  # bounds of the areas in pixels, as COCO's AP has them
_POINTS = {"least": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "most": 100}


@dataclass
class DataSummary:
    """Objects are the annotations that are no crowd regions and have a part in their image. C:
    classes, I: images, N: objects; counts are int64, other numbers float64."""

    json_file: str
    classes: list[str]  # names, (C,), the one with the most objects first
    class_objects: np.ndarray  # (C,)
    class_images: np.ndarray  # images with an object of the class, (C,)
    image_sizes: np.ndarray  # height and width in pixels, (I, 2) int64
    image_objects: np.ndarray  # (I,)
    num_crowds: int
    object_image: np.ndarray  # index of its image, (N,) int64
    boxes: np.ndarray  # height and width in pixels, (N, 2)
    areas: dict[str, np.ndarray]  # in pixels, (N,): "original", and resized for "training", ...
    resizing: dict[str, str]  # "training", "evaluation" -> how, in words; where it is known
    best_iou: np.ndarray | None  # of each box with an anchor in training, (N,); None without these
    warnings: Sequence[str]  # what was mended, left out, or looks wrong

    def text(self, num_classes: int = 20) -> str:
        """Counts and tables, of which one names the first ``num_classes`` classes."""
        parts = [self.heading(), self._class_table(num_classes)]
        if len(self.boxes):
            parts += [self._size_table(), self._quantile_table()]
        if self.best_iou is not None:
            parts.append(self.anchor_fit())
        if self.warnings:
            parts.append("\n- ".join(["mended, left out, or to look at:", *self.warnings]))
        return "\n\n".join(parts)

    @property
    def aspect_ratios(self) -> np.ndarray:
        """Height / width of the boxes, (N,)."""
        return self.boxes[:, 0] / self.boxes[:, 1]

    def heading(self) -> str:
        """How many there are of everything, on a line."""
        return (
            f"{self.json_file}: {len(self.image_objects):,} images, "
            f"{_share(self.image_objects == 0)} of them without objects; "
            f"{self.class_objects.sum():,} objects of {len(self.classes):,} classes; "
            f"{self.num_crowds:,} crowd regions"
        )

    def anchor_fit(self) -> str:
        """How well the anchors cover the boxes, on a line."""
        return (
            f"best IoU of a box with an anchor in training: mean {self.best_iou.mean():.2f}, below "
            f"0.5 for {_share(self.best_iou < 0.5)}"
        )

    def top_classes(self, num_classes: int) -> tuple[list[str], list[int]]:
        """Names of the first classes, each on one line, and their objects; the others as one."""
        names = [" ".join(name.split()) for name in self.classes[:num_classes]]
        names = [f"{name[:27]}..." if len(name) > 30 else name for name in names]
        counts = self.class_objects[:num_classes].tolist()
        if others := len(self.classes) - len(names):
            names.append(f"others: {others:,}")
            counts.append(self.class_objects[num_classes:].sum())
        return names, counts

    def _class_table(self, num_classes: int) -> str:
        names, counts = self.top_classes(num_classes)
        objects = [_part(count, sum(counts)) for count in counts]
        images = [_part(n, len(self.image_objects)) for n in self.class_images[:num_classes]]
        rows = itertools.zip_longest(names, objects, images, fillvalue="")
        return _table(["class", "objects", "images"], rows)

    def _size_table(self) -> str:
        rows = []
        for use, areas in self.areas.items():
            bucket = np.digitize(areas, [SMALL, LARGE])
            rows.append([use, *(_share(bucket == i) for i in range(3))])
            if use == "training" and self.best_iou is not None:
                poor = [_share(self.best_iou[bucket == i] < 0.5) for i in range(3)]
                rows.append(["- best IoU below 0.5", *poor])
        table = _table(["area in pixels", "small (< 32²)", "medium", "large (> 96²)"], rows)
        return "\n".join(
            [table, *(f"images in {use}, uncropped: {how}" for use, how in self.resizing.items())]
        )

    def _quantile_table(self) -> str:
        points, rows = list(_POINTS.values()), []
        for name, values in (
            ("objects per image", self.image_objects),
            ("height / width of boxes", self.aspect_ratios),
            ("height of images, pixels", self.image_sizes[:, 0]),
            ("width of images, pixels", self.image_sizes[:, 1]),
        ):
            found = np.percentile(values, points, method="inverted_cdf")
            rows.append([name, *(f"{q:,.0f}" if q >= 100 else f"{q:.3g}" for q in found)])
        return _table(["", *_POINTS], rows)


def summarize(data: CocoData, given: ModelInput, warnings: Sequence[str] = ()) -> DataSummary:
    """
    Args:
        given: what the model sees of it.
        warnings: of the check of the data.
    """
    sizes = np.stack([data.heights, data.widths], axis=1).astype(np.int64)
    boxes = np.concatenate([data.bbox[:, :2], data.bbox[:, :2] + data.bbox[:, 2:]], axis=1)
    clipped = _clip(boxes, sizes[data.image])
    objects = np.flatnonzero(~data.crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    image, category = data.image[objects], data.category[objects]
    areas, best_iou = {"original": data.areas()[objects]}, None
    for use, resizing in given.resizing.items():
        resized = resizing(sizes)
        scale = resized / sizes
        areas[use] = areas["original"] * scale.prod(axis=1)[image]
        if use == "training" and given.anchors and len(objects):
            scaled = boxes[objects] * np.tile(scale[:, ::-1], 2)[image]
            inputs = np.maximum(resized, resizing.full)[image]
            best_iou = given.best_iou(_clip(scaled, inputs), inputs)
    num_classes = len(data.categories)
    counts = np.bincount(category, minlength=num_classes)
    order = np.argsort(-counts, kind="stable")
    found = np.unique(image * num_classes + category) % num_classes  # once for each image
    return DataSummary(
        json_file=data.json_file,
        classes=[data.categories[i].name for i in order],
        class_objects=counts[order],
        class_images=np.bincount(found, minlength=num_classes)[order],
        image_sizes=sizes,
        image_objects=np.bincount(image, minlength=len(sizes)),
        num_crowds=int(data.crowd.sum()),
        object_image=image,
        boxes=(clipped[objects, 2:] - clipped[objects, :2])[:, ::-1],
        areas=areas,
        resizing={use: resizing.text for use, resizing in given.resizing.items()},
        best_iou=best_iou,
        warnings=warnings,
    )


def _clip(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes, cut at the edges of their images, as Detectron2's mapper cuts them."""
    return np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2))


def _table(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(rows, header, disable_numparse=True, stralign="right", colalign=("left",))


def _part(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(total, 1):.0f} %)"


def _share(which: np.ndarray) -> str:
    return _part(which.sum(), len(which))
