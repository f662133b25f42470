"""Whether an exported detector finds what the model finds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from detectron2.structures import Instances

from .runtime import Detections

_MAX_SCORE = 1e-3  # difference


@dataclass(frozen=True)
class Agreement:
    """How two detectors differ on an image.

    Attributes:
        count: objects that the model finds.
        others: those that only one of both finds, the model or the file, whichever has more; and
            those with other keypoints.
        boxes, keypoints: largest difference in pixels.
        scores: largest difference; also of those of keypoints, relative where they exceed 1.
        mask_iou: lowest.
    """

    count: int
    others: int
    boxes: float = 0.0
    scores: float = 0.0
    mask_iou: float = 1.0
    keypoints: float = 0.0

    @property
    def good(self) -> bool:
        """Whether rounding explains it: of objects whose score is near the threshold, or whose
        overlap is, one may be lost."""
        few = self.others <= 0.02 * self.count + 1
        return few and self.scores < _MAX_SCORE and self.mask_iou > 0.98

    def __str__(self) -> str:
        text = f"{self.count} objects, {self.others} not found by both"
        text += f", boxes within {self.boxes:.1e} px, scores within {self.scores:.1e}"
        return text + f", masks of IoU {self.mask_iou:.4f} and more" * (self.mask_iou < 1)


def compare(found: Detections, expected: Instances, tolerance: float = 0.1) -> Agreement:
    """Compare what the file found with what the model found.

    Args:
        tolerance: boxes of a class, in pixels, that are those of the same object.
    """
    boxes = expected.pred_boxes.tensor.numpy()
    distance = np.abs(boxes[:, None] - found.boxes[None]).max(axis=2, initial=0)
    distance[expected.pred_classes.numpy()[:, None] != found.classes] = np.inf
    ours, theirs = np.nonzero(distance <= tolerance)
    nearest = distance[ours, theirs] == distance.min(axis=1, initial=np.inf)[ours]
    ours, theirs = ours[nearest], theirs[nearest]
    lost = max(len(boxes) - len(set(ours)), len(found.boxes) - len(set(theirs)))
    if not len(ours):
        return Agreement(len(boxes), lost)
    scores = [np.abs(expected.scores.numpy()[ours] - found.scores[theirs]).max()]
    iou, points = 1.0, 0.0
    if found.masks is not None:
        for i, j in zip(ours, theirs, strict=True):
            a, b = expected.pred_masks[i].numpy(), found.masks[j]
            iou = min(iou, (a & b).sum() / max((a | b).sum(), 1)) if (a | b).any() else iou
    if found.keypoints is not None:
        of_model = expected.pred_keypoints.numpy()[ours]
        difference = np.abs(of_model - found.keypoints[theirs])
        # Exponentials of logits, which may be far above 1.
        relative = (difference[..., 2] / of_model[..., 2].clip(1)).max(axis=1, initial=0)
        # Detectron2 resizes the heat maps of a box to its sides, rounded up to whole pixels: where
        # 17 meets 17.00001, all of them change.
        same = relative < _MAX_SCORE
        lost += int((~same).sum())
        scores.append(relative[same].max(initial=0))
        points = difference[same, :, :2].max(initial=0)
    worst = distance[ours, theirs].max()
    return Agreement(len(boxes), lost, *map(float, (worst, max(scores), iou, points)))
