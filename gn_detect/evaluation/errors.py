"""Where a detector errs: what an evaluation's numbers are made of, from its dataset and results."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.coco import check_coco_json, load_coco
from gn_detect.data.coco_check import check_masks, check_objects
from gn_detect.data.coco_data import CocoData, Mask
from gn_detect.data.coco_file import paused_gc
from gn_detect.data.coco_results import Result, read_results

from .analysis import Analysis, Bin, ClassScores, ErrorKind
from .error_kinds import KINDS, error_kinds, mended_ap, missed_objects
from .matching import FOUND, Matches, match_results
from .scoring import CocoEvaluator
from .worst import worst_images

logger = logging.getLogger(__name__)

IOU_TYPES = ("bbox", "segm")
_SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_BINS = 10

__all__ = ["IOU_TYPES", "Analysis", "analyze"]


def analyze(
    dataset_json: str | os.PathLike,
    results_json: str | os.PathLike,
    *,
    image_root: str | os.PathLike | None = None,
    iou_type: str | None = None,
    score_threshold: float = 0.5,
) -> Analysis:
    """Analyze the results of a detector on a dataset in COCO format.

    Args:
        dataset_json: annotations.
        results_json: COCO results, such as ``coco_instances_results.json`` of an evaluation; those
            of a model with keypoints are analyzed by their boxes.
        image_root: folder of the images, which are looked for where it is given.
        iou_type: one of ``IOU_TYPES``; None is "segm" where all results and annotations have masks.
        score_threshold: see :class:`Analysis`.

    Raises:
        ConfigError: an option that does not exist, or does not fit.
        DataError: a file cannot be read, has no annotations or no results, or the results are of
            another dataset.
    """
    if iou_type not in (None, *IOU_TYPES):
        raise ConfigError(f"iou_type is {iou_type!r}; known: {', '.join(IOU_TYPES)}")
    if not 0 <= score_threshold <= 1:
        raise ConfigError(f"the score threshold is {score_threshold}; it must be from 0 to 1")
    dataset_json, results_json = os.fspath(dataset_json), os.fspath(results_json)
    data = load_coco(dataset_json)
    if not data.has_annotations:
        raise DataError(
            f"{dataset_json} has no annotations, which results would be held against; give the "
            "dataset with them"
        )
    if image_root is not None:
        needs = dict.fromkeys(("masks", "training", "evaluation", "box_format"), False)
        check_coco_json(dataset_json, os.fspath(image_root), **needs, exact_names=False)
    else:
        for warning in check_objects(data, masks=False):
            logger.warning(f"{dataset_json}: {warning}")
    with paused_gc():
        by_image = read_results(results_json, data, -math.inf)
        results = [r for i in data.image_ids for r in by_image.get(i, ())]
        if not results:
            raise DataError(
                f"{results_json} holds no results: the model found nothing on {dataset_json}"
            )
        iou_type = _choose_iou_type(iou_type, data, results, results_json)
        return _analyze(data, results, iou_type, score_threshold)


def _choose_iou_type(
    wanted: str | None, data: CocoData, results: list[Result], results_json: str
) -> str:
    without = sum(not r.segmentation for r in results)
    if wanted == "segm" and without:
        raise DataError(
            f"{results_json}: {without} of {len(results)} results have no mask; analyze boxes "
            "(bbox), or give results of a model with masks"
        )
    every = np.ones(len(data.image), bool)
    if wanted == "segm" or (wanted is None and not without and not data.no_mask.all()):
        try:
            check_masks(data, every, scored=True, key="MODEL.MASK_ON")
            return "segm"
        except DataError as error:
            if wanted == "segm":
                raise
            logger.warning(f"boxes are analyzed in place of masks: {error}")
    return "bbox"


def _analyze(
    data: CocoData, results: list[Result], iou_type: str, score_threshold: float
) -> Analysis:
    images = {id_: i for i, id_ in enumerate(data.image_ids)}
    classes = {id_: i for i, id_ in enumerate(data.classes)}
    image = np.array([images[r.image_id] for r in results])
    category = np.array([classes[r.category_id] for r in results])
    score = np.array([r.score for r in results])
    shapes: Any = np.array([r.bbox for r in results])
    truth: Any = data.bbox
    if iou_type == "segm":
        sizes = list(zip(data.heights.tolist(), data.widths.tolist(), strict=True))
        shapes = [_rle(r.segmentation, sizes[i]) for r, i in zip(results, image, strict=True)]
        truth = [_rle(data.segmentation(a), sizes[i]) for a, i in enumerate(data.image)]
    matches = match_results(data, image, category, score, shapes, truth)

    rows = [
        {
            "image_id": r.image_id,
            "category_id": classes[r.category_id],
            "score": r.score,
            "bbox": list(r.bbox),  # faster-coco-eval takes no tuples
            "segmentation": shapes[i] if iou_type == "segm" else [],
        }
        for i, r in enumerate(results)
    ]
    precision, recall, stats = _evaluate(data.json_file, rows, iou_type)
    names = _unique(data)
    objects = np.bincount(data.category[~data.crowd], minlength=len(names))
    ious = np.linspace(0.5, 0.95, 10).round(2).tolist()
    curves = precision[[0, 5], :, :, 0, -1].transpose(2, 0, 1)

    confident = matches.score >= score_threshold
    kinds, about = error_kinds(matches)
    missed = missed_objects(matches, about, confident)
    counts = [int((confident & (kinds == k)).sum()) for k in range(len(KINDS))]
    counts[-1] = int(missed.sum())
    ap = 100 * mended_ap(matches, kinds, about)
    calibration = _calibration(matches)
    counted = sum(b.count for b in calibration)
    return Analysis(
        iou_type=iou_type,
        num_images=len(data.image_ids),
        num_objects=int(objects.sum()),
        num_results=len(matches.image),
        score_threshold=score_threshold,
        true_positives=int((confident & (matches.match >= 0)).sum()),
        false_positives=int((confident & matches.false).sum()),
        ignored=int((confident & matches.ignored).sum()),
        classes=names,
        scores=dict(zip(_SCORES, (100 * stats).tolist(), strict=True)),
        per_class=[
            ClassScores(
                *(name, int(objects[c])),
                _mean(precision[:, :, c, 0, -1]),
                *(_mean(precision[t, :, c, 0, -1]) for t in (0, 5)),
                _mean(recall[:, c, 0, -1]),
                *(_mean(precision[:, :, c, size, -1]) for size in (1, 2, 3)),
                *(_mean(recall[:, c, size, -1]) for size in (1, 2, 3)),
            )
            for c, name in enumerate(names)
        ],
        by_iou={iou: _mean(precision[t, :, :, 0, -1]) for t, iou in enumerate(ious)},
        recall_by_iou={iou: _mean(recall[t, :, 0, -1]) for t, iou in enumerate(ious)},
        curve=curves[objects > 0].mean(axis=0),
        curves=dict(zip(names, np.where(curves < 0, np.nan, curves), strict=True)),
        confusion=_confusion(matches, confident, len(names)),
        errors=[
            ErrorKind(kind, count, count / total if (total := sum(counts)) else math.nan, gain)
            for kind, count, gain in zip(
                KINDS, counts, np.maximum(ap[1:] - ap[0], 0).tolist(), strict=True
            )
        ],
        worst=worst_images(data, matches, kinds, about, confident, names),
        calibration=calibration,
        calibration_error=sum(
            b.count / counted * abs(b.precision - b.confidence) for b in calibration if b.count
        ),
    )


def _rle(mask: Mask, size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(mask, dict):
        return mask
    return mask_util.merge(mask_util.frPyObjects(mask, *size))


def _unique(data: CocoData) -> list[str]:
    """The names of the classes, with the id where several have one."""
    names = list(data.classes.values())
    return [
        f"{name} ({id_})" if names.count(name) > 1 else name for id_, name in data.classes.items()
    ]


def _mean(values: np.ndarray) -> float:
    """In percent, as Detectron2 derives it; COCO has -1 where there is no object."""
    values = values[values > -1]
    return float(values.mean() * 100) if values.size else math.nan


def _evaluate(json_file: str, results: list[dict], iou_type: str) -> tuple[np.ndarray, ...]:
    """The arrays of COCO's evaluation, as :class:`CocoEvaluator` has it: precision (10 IoU, 101
    recalls, C, 4 sizes, 3 limits), recall (10, C, 4, 3), the 12 scores; -1 for no objects."""
    name = f"{json_file} (analyzed)"
    MetadataCatalog.get(name).set(json_file=json_file, evaluator_type="coco")
    try:
        evaluator = CocoEvaluator(name, distributed=False)
        with contextlib.redirect_stdout(io.StringIO()):  # the table of 12
            scored = evaluator.score(results, iou_type)
    finally:
        MetadataCatalog.remove(name)
    stats = np.array(scored.stats)
    return scored.eval["precision"], scored.eval["recall"], np.where(stats < 0, np.nan, stats)


def _confusion(matches: Matches, confident: np.ndarray, num_classes: int) -> np.ndarray:
    """(C + 1, C + 1). True positives first; then a result and an object of another class that
    overlap by ``FOUND``, those that overlap most first, each once."""
    partner = np.where(confident, matches.match, -1)
    taken = matches.right(confident)
    left = (confident & matches.false)[matches.result] & ~matches.same_class
    left = np.flatnonzero(left & (matches.iou >= FOUND))
    left = left[np.argsort(-matches.iou[left], kind="stable")]
    for d, o in zip(matches.result[left], matches.object[left], strict=True):
        if partner[d] < 0 and not taken[o]:
            partner[d], taken[o] = o, True
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    results = confident & ~matches.ignored
    truth = np.where(partner < 0, num_classes, matches.object_category[partner])[results]
    np.add.at(matrix, (truth, matches.category[results]), 1)
    missed = matches.object_category[matches.objects & ~taken]
    np.add.at(matrix, (missed, num_classes), 1)
    return matrix


def _calibration(matches: Matches) -> list[Bin]:
    counted = ~matches.ignored
    score, right = matches.score[counted], (matches.match >= 0)[counted]
    number = np.clip((score * _BINS).astype(int), 0, _BINS - 1)
    return [
        Bin(
            *(i / _BINS, (i + 1) / _BINS),
            *(float(v[number == i].mean()) if count else math.nan for v in (score, right)),
            int(count),
        )
        for i, count in enumerate(np.bincount(number, minlength=_BINS))
    ]
