"""The kinds of errors of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection
Errors", ECCV 2020 (arXiv 2008.08115), and the AP that mending each of them gives.

The rules are those of the authors' https://github.com/dbolya/tide, where it and the paper differ:
a false result that fits several kinds is of the first that it fits.
"""

from __future__ import annotations

import numpy as np

from .matching import FOUND, TOUCHED, Matches

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(len(KINDS))
_RECALLS = np.linspace(0, 1, 101)


def error_kinds(matches: Matches) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns:
        the position in ``KINDS`` of each false result, -1 for the others; and the annotation that
        it would be right about if its class, or its place, were mended, else -1. (D,) int64 each.
    """
    same, same_iou = matches.best(matches.same_class)
    other, other_iou = matches.best(~matches.same_class)
    kinds = np.select(
        [
            ~matches.false,
            (same_iou >= TOUCHED) & (same_iou < FOUND),
            other_iou >= FOUND,
            same_iou >= FOUND,  # of an object that a result of a higher score is right about
            other_iou > TOUCHED,
        ],
        [-1, LOCALIZATION, CLASSIFICATION, DUPLICATE, BOTH],
        BACKGROUND,
    )
    about = np.select([kinds == CLASSIFICATION, kinds == LOCALIZATION], [other, same], -1)
    return kinds, about


def missed_objects(matches: Matches, about: np.ndarray, confident: np.ndarray) -> np.ndarray:
    """Objects that no ``confident`` result is right about, or would be after mending, (A,) bool.

    Args:
        about: of :func:`error_kinds`.
    """
    missed = matches.objects & ~matches.right(confident)
    missed[about[confident & (about >= 0)]] = False
    return missed


def mended_ap(matches: Matches, kinds: np.ndarray, about: np.ndarray) -> np.ndarray:
    """AP50 over all classes with objects, as it is and after mending each of ``KINDS``, (7,), 0 to
    1.

    A result of the wrong class, or place, becomes right about its object, if no other is, and no
    other of the two kinds with a higher score would be; else it is removed, as results of the next
    three kinds are. Missed objects are removed.
    """
    everything = np.ones(len(kinds), bool)
    found = matches.right(everything)
    wrong = np.flatnonzero(about >= 0)
    wrong = wrong[~found[about[wrong]]]
    wrong = wrong[np.argsort(-matches.score[wrong], kind="stable")]
    mendable = np.zeros(len(kinds), bool)
    mendable[wrong[np.unique(about[wrong], return_index=True)[1]]] = True
    missed = missed_objects(matches, about, everything)

    def ap(kind: int) -> float:
        mended = (kinds == kind) & mendable
        category = matches.category.copy()
        category[mended] = matches.object_category[about[mended]]
        objects = matches.objects & ~(missed & (kind == MISSED))
        counts = np.bincount(matches.object_category[objects])
        keep = ~matches.ignored & ((kinds != kind) | mended)
        right = (matches.match >= 0) | mended
        return average_precision(category[keep], matches.score[keep], right[keep], counts)

    return np.array([ap(kind) for kind in (len(KINDS), *range(len(KINDS)))])


def average_precision(
    category: np.ndarray, score: np.ndarray, right: np.ndarray, counts: np.ndarray
) -> float:
    """COCO's: the mean over classes with objects, and 101 values of recall; NaN without any.

    Args:
        category, score, right: of results, whose order decides between equal scores.
        counts: objects of the classes.
    """
    order = np.lexsort((-score, category))
    ends = np.searchsorted(category[order], np.arange(len(counts) + 1))
    precisions = []
    for c in np.flatnonzero(counts):
        hits = np.cumsum(right[order[ends[c] : ends[c + 1]]])
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(hits / counts[c], _RECALLS)
        precisions.append(np.append(precision, 0)[reached].mean())
    return float(np.mean(precisions)) if precisions else np.nan
