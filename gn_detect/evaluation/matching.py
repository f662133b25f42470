"""Results and objects that overlap, and which results an evaluation counts as right."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_util

from gn_detect.data.coco_data import CocoData

FOUND, TOUCHED = 0.5, 0.1  # IoU, of TIDE's foreground and background
MAX_RESULTS = 100  # of an image and class, as COCO counts


@dataclass(frozen=True)
class Matches:
    """D results by image, then from the highest score; A annotations of the dataset; P pairs.

    Attributes:
        image, category: of the results, as positions, (D,) int64.
        score: (D,) float64.
        objects: annotations that are no crowds, (A,) bool.
        object_image, object_category: of the annotations, (A,) int64.
        result, object, iou: pairs of an image that overlap by ``TOUCHED`` or more, whatever their
            classes; of a result those of the highest IoU first, (P,). Objects are annotations.
        match: the annotation that a result is a true positive of at IoU .5, else -1, (D,) int64.
        ignored: results that are on a crowd of their class, and right about nothing else, (D,)
            bool.
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    objects: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    result: np.ndarray
    object: np.ndarray
    iou: np.ndarray
    match: np.ndarray
    ignored: np.ndarray

    @functools.cached_property
    def same_class(self) -> np.ndarray:
        """Of the pairs, (P,) bool."""
        return self.category[self.result] == self.object_category[self.object]

    @property
    def false(self) -> np.ndarray:
        """(D,) bool."""
        return (self.match < 0) & ~self.ignored

    def best(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The annotation that each result overlaps most, and by which IoU: (D,) int64, -1 without
        any, and (D,) float64, 0 without any.

        Args:
            pairs: that are looked at, (P,) bool.
        """
        best, iou = np.full(len(self.image), -1), np.zeros(len(self.image))
        results, first = np.unique(self.result[pairs], return_index=True)
        best[results], iou[results] = self.object[pairs][first], self.iou[pairs][first]
        return best, iou

    def right(self, confident: np.ndarray) -> np.ndarray:
        """Objects with a true positive among the ``confident`` results, (A,) bool."""
        right = np.zeros(len(self.objects), bool)
        right[self.match[confident & (self.match >= 0)]] = True
        return right


def match_results(
    data: CocoData,
    image: np.ndarray,
    category: np.ndarray,
    score: np.ndarray,
    shapes: Sequence,
    truth: Sequence,
) -> Matches:
    """Match results to objects as COCO's evaluation does at IoU .5, for objects of all sizes.

    Args:
        image, category, score: of the results in the order of their file; positions and scores.
        shapes: of the results: boxes x, y, width, height, (D, 4) float64, or compressed RLEs.
        truth: those of the annotations.
    """
    order = np.lexsort((-score, image))  # stable
    order = order[_rank(image[order] * len(data.categories) + category[order]) < MAX_RESULTS]
    image, category, score = image[order], category[order], score[order]
    boxes = isinstance(shapes, np.ndarray)
    by_object = np.argsort(data.image, kind="stable")
    limits = np.arange(len(data.image_ids) + 1)
    ends = np.searchsorted(image, limits)
    object_ends = np.searchsorted(data.image[by_object], limits)
    pairs = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for i in np.intersect1d(image, data.image):
        found = slice(ends[i], ends[i + 1])
        wanted = by_object[object_ends[i] : object_ends[i + 1]]
        one = [shapes[order[found]], truth[wanted]] if boxes else None
        one = one or [[shapes[d] for d in order[found]], [truth[o] for o in wanted]]
        iou = mask_util.iou(*one, data.crowd[wanted].astype(np.uint8).tolist())
        rows, columns = np.nonzero(iou >= TOUCHED)
        pairs.append((rows + ends[i], wanted[columns], iou[rows, columns]))
    result, object_, iou = (np.concatenate(column) for column in zip(*pairs, strict=True))
    # Of equal overlaps, pycocotools takes the later object.
    by_iou = np.lexsort((-object_, -iou, result))
    result, object_, iou = result[by_iou], object_[by_iou], iou[by_iou]

    match, ignored = np.full(len(image), -1), np.zeros(len(image), bool)
    candidates = (iou >= FOUND) & (category[result] == data.category[object_])
    on_crowd = data.crowd[object_]
    taken = set()
    chosen = candidates & ~on_crowd
    for d, o in zip(result[chosen].tolist(), object_[chosen].tolist(), strict=True):
        if match[d] < 0 and o not in taken:
            match[d] = o
            taken.add(o)
    ignored[result[candidates & on_crowd]] = True
    return Matches(
        *(image, category, score, ~data.crowd, data.image, data.category),
        *(result[~on_crowd], object_[~on_crowd], iou[~on_crowd]),
        *(match, ignored & (match < 0)),
    )


def _rank(group: np.ndarray) -> np.ndarray:
    """Of each item among those of its group, from 0."""
    order = np.argsort(group, kind="stable")
    rank = np.empty(len(group), np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group[order], group[order])
    return rank
