"""What an analysis of a detector's results tells."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
from tabulate import tabulate

_TABLE = {"tablefmt": "simple", "floatfmt": ".1f"}


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Of a class; percent, as the evaluation logs them, NaN where it has no such object.

    Attributes:
        objects: of the class, without crowds.
        ap: mean over IoU .5, .55, ..., .95; ap50 and ap75: at one; ap_small, ...: of objects below
            32 x 32 pixels, below 96 x 96, and larger.
        ar: recall by at most 100 results of an image, mean over the same IoU, and by size.
    """

    name: str
    objects: int
    ap: float
    ap50: float
    ap75: float
    ar: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_small: float
    ar_medium: float
    ar_large: float


@dataclasses.dataclass(frozen=True)
class ErrorKind:
    """Of Bolya et al., "TIDE", ECCV 2020.

    Attributes:
        kind: "classification", "localization", "both", "duplicate", "background", or "missed".
        count: of results at or above the threshold that are wrong so; "missed": of objects.
        share: of all errors, 0 to 1; NaN where there are none.
        delta_ap: what AP50 would gain if these were mended, over all results, in percent points.
    """

    kind: str
    count: int
    share: float
    delta_ap: float


@dataclasses.dataclass(frozen=True)
class WorstImage:
    """An image with errors.

    Attributes:
        missed: objects that no result at or above the threshold is a true positive of.
        false: results at or above the threshold that are none.
        reason: both in words, by kind and class.
    """

    image_id: int | str
    file_name: str
    missed: int
    false: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Bin:
    """Results with a score in [low, high); the last bin has 1, too.

    Attributes:
        confidence, precision: means of the scores and of being right, 0 to 1; NaN without results.
        count: of results.
    """

    low: float
    high: float
    confidence: float
    precision: float
    count: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What :func:`.errors.analyze` finds. C: classes. Crowd regions are no objects, and results
    that fall on one of their class count neither as right nor as wrong.

    Attributes:
        iou_type: "bbox" or "segm", by which results and objects overlap.
        num_objects: of the dataset, without crowds.
        num_results: of all scores, that the evaluation counts: of an image and class the 100 best.
        score_threshold: of ``confusion``, of the counts of ``errors`` and of ``worst``; their IoU
            threshold is .5.
        true_positives, false_positives, ignored: of the results at or above the threshold, which
            they add up to.
        classes: names, in the order of the model.
        scores: COCO's 12 as the evaluation has them, in percent: AP, AP50, AP75, APs, APm, APl,
            AR1, AR10, AR100, ARs, ARm, ARl.
        by_iou, recall_by_iou: IoU threshold -> AP, recall of at most 100 results; in percent.
        curve: mean of ``curves`` over the classes that have objects, (2, 101).
        curves: class name -> precision (0 to 1) at IoU .5 and .75, over recall 0, .01, ..., 1,
            (2, 101); NaN for a class without objects.
        confusion: rows are the truth, columns the prediction, the last of both is the background,
            (C + 1, C + 1) int64.
        errors: in the order of TIDE; false positives have exactly one kind each.
        worst: images with the most errors (missed + false) first, at most 20.
        calibration: 10 bins over all results; precision at IoU .5.
        calibration_error: the expected one of Guo et al., ICML 2017, 0 to 1.
    """

    iou_type: str
    num_images: int
    num_objects: int
    num_results: int
    score_threshold: float
    true_positives: int
    false_positives: int
    ignored: int
    classes: list[str]
    scores: dict[str, float]
    per_class: list[ClassScores]
    by_iou: dict[float, float]
    recall_by_iou: dict[float, float]
    curve: np.ndarray
    curves: dict[str, np.ndarray]
    confusion: np.ndarray
    errors: list[ErrorKind]
    worst: list[WorstImage]
    calibration: list[Bin]
    calibration_error: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists in place of arrays, None in place of NaN."""
        return msgspec.json.decode(msgspec.json.encode(self, enc_hook=lambda v: v.tolist()))

    def text(self, most: int = 10) -> str:
        """Tables for a terminal, of at most so many classes and images."""
        classes = sorted(self.per_class, key=lambda c: (math.isnan(c.ap), c.ap))[:most]
        columns = ("name", "objects", "ap", "ap50", "ap75", "ar")
        rows = [[getattr(c, column) for column in columns] for c in classes]
        lowest = f", the {most} lowest" if len(self.classes) > most else ""
        share = self.true_positives + self.false_positives
        worst = [f"  {image.file_name}: {image.reason}" for image in self.worst[:most]]
        if worst:
            worst.insert(0, f"images with the most errors ({len(worst)} of {len(self.worst)}):")
        return "\n".join(
            [
                f"{self.num_results} results ({self.iou_type}) on {self.num_images} images with "
                f"{self.num_objects} objects: AP {self.scores['AP']:.2f}, "
                f"AP50 {self.scores['AP50']:.2f}, AP75 {self.scores['AP75']:.2f}",
                tabulate(rows, [f"class{lowest}", "objects", "AP", "AP50", "AP75", "AR"], **_TABLE),
                "",
                f"at scores >= {self.score_threshold:g} and IoU 0.5, {self.true_positives} of "
                f"{share} results are right; the errors, and what mending each kind adds to AP50:",
                tabulate(
                    [(e.kind, e.count, 100 * e.share, e.delta_ap) for e in self.errors],
                    ["error", "count", "percent", "AP50 +"],
                    **_TABLE,
                ),
                "",
                f"expected calibration error of the scores: {self.calibration_error:.3f}",
                *worst,
            ]
        )
