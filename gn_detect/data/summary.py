"""What a COCO dataset holds, and how it meets a model: counts, sizes, shapes, anchors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .anchors import AnchorGrid
from .coco_data import CocoData
from .input_size import Resizing

SIZES = ("small", "medium", "large")  # as COCO's AP has them,
SMALL, LARGE = 32**2, 96**2  # by these bounds of the area in pixels
MANY = 20  # classes that are named
_POINTS = {"least": 0, "5 %": 5, "25 %": 25, "median": 50, "75 %": 75, "95 %": 95, "most": 100}


@dataclass
class DataSummary:
    """Objects are the annotations that are no crowd regions and have a part in their image. C:
    classes, I: images, N: objects.

    Attributes:
        json_file: where the data comes from.
        classes: names, (C,), with the most objects first.
        class_objects: of each class, (C,) int64.
        class_images: images with an object of it, (C,) int64.
        image_sizes: height and width in pixels, (I, 2) int64.
        image_objects: objects in each image, (I,) int64.
        num_crowds: crowd regions.
        aspect_ratios: height / width of the boxes, (N,) float64.
        areas: of the objects in pixels, (N,) float64, of the masks as in the file: "original", and
            by ``resizing``.
        resizing: "training", "evaluation" -> how images are resized for it, in words.
        best_iou: of each box with the anchor that covers it best in training, (N,) float64; None
            where there are no anchors.
        anchor_sizes: square roots of their areas, in pixels.
        mended: what the file says in other words than it should, and how it was taken.
        warnings: what else looks wrong.
    """

    json_file: str
    classes: list[str]
    class_objects: np.ndarray
    class_images: np.ndarray
    image_sizes: np.ndarray
    image_objects: np.ndarray
    num_crowds: int
    aspect_ratios: np.ndarray
    areas: dict[str, np.ndarray]
    resizing: dict[str, str] = field(default_factory=dict)
    best_iou: np.ndarray | None = None
    anchor_sizes: list[float] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A page of text, in columns."""
        parts = [f"{self.json_file}\n{self._counts()}", _table(self._class_rows())]
        if len(self.aspect_ratios):
            parts += [_table(self._size_rows()), *self._resizing_text()]
            parts.append(_table(self._quantile_rows()))
        if self.best_iou is not None:
            parts.append(self._anchor_text())
        for title, sentences in (("mended", self.mended), ("warnings", self.warnings)):
            if sentences:
                items = (textwrap.fill(s, 98, subsequent_indent="  ") for s in sentences)
                parts.append(f"{title}:\n" + "\n".join(f"- {item}" for item in items))
        return "\n\n".join(parts) + "\n"

    def brief(self) -> str:
        """Seven lines, for the log of a run."""
        named = zip(self.classes[:5], self.class_objects[:5], strict=True)
        classes = ", ".join(f"{short(name)} {count:,}" for name, count in named)
        others = len(self.classes) - 5
        lines = [self._counts(), f"objects by class: {classes}{_and_others(others)}"]
        if len(self.aspect_ratios):
            for text, values in (
                ("objects per image", self.image_objects),
                ("height / width of boxes", self.aspect_ratios),
            ):
                least, median, most = _quantiles(values, [0, 50, 100])
                lines.append(f"{text}: {least} to {most}, median {median}")
            for use, text in (
                ("original", "areas in original pixels"),
                ("training", "areas resized for training"),
            ):
                if use in self.areas:
                    small, medium, large = map(_percent, self.size_shares(use))
                    how = f"; {self.resizing[use]}" if use in self.resizing else ""
                    lines.append(
                        f"{text}: {small} small (< 32 x 32), {medium} medium, {large} large "
                        f"(> 96 x 96){how}"
                    )
        if self.best_iou is not None:
            lines.append(self._anchor_text())
        return "\n  ".join(lines)

    def size_shares(self, use: str) -> np.ndarray:
        """The shares of small, medium and large objects, (3,) float64; ``use``: of ``areas``."""
        return _buckets(self.areas[use]) / max(len(self.areas[use]), 1)

    def _counts(self) -> str:
        empty = int((self.image_objects == 0).sum())
        text = f"{len(self.image_objects):,} images"
        if empty:
            share = _percent(empty / len(self.image_objects))
            text += f", {empty:,} ({share}) of them without objects"
        classes = f"{len(self.classes):,} class{'es' * (len(self.classes) > 1)}"
        text += f"; {self.class_objects.sum():,} objects of {classes}"
        return text + (f"; {self.num_crowds:,} crowd regions" if self.num_crowds else "")

    def _class_rows(self) -> list[list[str]]:
        images, objects = len(self.image_objects), max(int(self.class_objects.sum()), 1)
        rows = [["class", "objects", "share", "images", "share"]]
        for name, count, found in zip(
            *(x[:MANY] for x in (self.classes, self.class_objects, self.class_images)), strict=True
        ):
            shares = _percent(count / objects), _percent(found / images)
            rows.append([short(name), f"{count:,}", shares[0], f"{found:,}", shares[1]])
        if rest := _and_others(len(self.classes) - MANY):
            count = self.class_objects[MANY:].sum()
            rows.append([rest.strip(), f"{count:,}", _percent(count / objects), "", ""])
        return rows

    def _size_rows(self) -> list[list[str]]:
        rows = [["area of objects, pixels", "small", "< 32²", "medium", "", "large", "> 96²"]]
        for use, areas in self.areas.items():
            row = [use if use == "original" else f"resized for {use}"]
            for count, share in zip(_buckets(areas), self.size_shares(use), strict=True):
                row += [f"{count:,}", _percent(share)]
            rows.append(row)
        return rows

    def _resizing_text(self) -> list[str]:
        lines = [f"resized for {use}: {how}" for use, how in self.resizing.items()]
        return ["\n".join(lines)] if lines else []

    def _quantile_rows(self) -> list[list[str]]:
        rows = [["", *_POINTS]]
        for name, values in (
            ("objects per image", self.image_objects),
            ("height / width of boxes", self.aspect_ratios),
            ("height of images, pixels", self.image_sizes[:, 0]),
            ("width of images, pixels", self.image_sizes[:, 1]),
        ):
            rows.append([name, *_quantiles(values, list(_POINTS.values()))])
        return rows

    def _anchor_text(self) -> str:
        poor = self.best_iou < 0.5
        bucket = np.digitize(self.areas["training"], [SMALL, LARGE])
        shares = (
            f"{size} {_percent(poor[bucket == i].mean())}"
            for i, size in enumerate(SIZES)
            if (bucket == i).any()
        )
        return (
            f"best IoU of a box with an anchor in training: mean {self.best_iou.mean():.2f}, below "
            f"0.5 for {_percent(poor.mean())} of the boxes ({', '.join(shares)})"
        )


def summarize(
    data: CocoData,
    resizing: Mapping[str, Resizing] | None = None,
    anchors: AnchorGrid | None = None,
    warnings: Sequence[str] = (),
) -> DataSummary:
    """
    Args:
        resizing: "training", "evaluation" -> how images are resized for it.
        anchors: of the model; asked where ``resizing`` has "training".
        warnings: of the check of the data; those that ``data`` has itself are told apart.
    """
    resizing = resizing or {}
    sizes = np.stack([data.heights, data.widths], axis=1).astype(np.int64)
    boxes = np.concatenate([data.bbox[:, :2], data.bbox[:, :2] + data.bbox[:, 2:]], axis=1)
    clipped = _clip(boxes, sizes[data.image])
    objects = np.flatnonzero(~data.crowd & (clipped[:, 2:] > clipped[:, :2]).all(axis=1))
    image, category = data.image[objects], data.category[objects]
    areas = {"original": data.areas()[objects]}
    best_iou = None
    for use, resize in resizing.items():
        resized = resize(sizes)
        scale = resized / sizes
        areas[use] = areas["original"] * scale.prod(axis=1)[image]
        if use == "training" and anchors and len(objects):
            inputs = resize.padded(resized)[image]
            scaled = boxes[objects] * np.tile(scale[:, ::-1], 2)[image]
            best_iou = anchors.best_iou(_clip(scaled, inputs), inputs)
    num_classes = len(data.categories)
    counts = np.bincount(category, minlength=num_classes)
    pairs = np.sort(image * num_classes + category)  # of an image and a class in it
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    order = np.argsort(-counts, kind="stable")
    width, height = (clipped[objects, 2:] - clipped[objects, :2]).T
    return DataSummary(
        json_file=data.json_file,
        classes=[data.categories[i].name for i in order],
        class_objects=counts[order],
        class_images=np.bincount(pairs % num_classes, minlength=num_classes)[order],
        image_sizes=sizes,
        image_objects=np.bincount(image, minlength=len(sizes)),
        num_crowds=int(data.crowd.sum()),
        aspect_ratios=height / width,
        areas=areas,
        resizing={use: str(resize) for use, resize in resizing.items()},
        best_iou=best_iou,
        anchor_sizes=anchors.sizes if best_iou is not None else [],
        mended=data.mended,
        warnings=[w for w in warnings if w not in data.mended],
    )


def _clip(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes, cut at the edges of their images, as Detectron2's mapper cuts them."""
    return np.clip(boxes, 0, np.tile(sizes[:, ::-1], 2))


def _buckets(areas: np.ndarray) -> np.ndarray:
    return np.bincount(np.digitize(areas, [SMALL, LARGE]), minlength=3)


def _table(rows: list[list[str]]) -> str:
    """Columns, the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )


def _percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _quantiles(values: np.ndarray, points: list[int]) -> list[str]:
    return [_number(q) for q in np.percentile(values, points, method="inverted_cdf")]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def short(name: str, width: int = 30) -> str:
    """The name of a class on one line, of at most ``width`` characters."""
    name = " ".join(name.split()) or repr(name)
    return name if len(name) <= width else name[: width - 3] + "..."


def _and_others(count: int) -> str:
    return f" and {count:,} other{'s' * (count > 1)}" if count > 0 else ""
