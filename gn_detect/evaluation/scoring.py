"""Detectron2's COCO evaluation against the canonical ground truth, by pycocotools or, equal and
several times faster, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import logging
import os
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from pycocotools.coco import COCO

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.coco import load_coco
from gn_detect.data.coco_file import paused_gc

logger = logging.getLogger(__name__)

COCO_EVALS = ("auto", "fast", "pycocotools")
_FIELDS = {"segm": "segmentation", "keypoints": "keypoints"}  # of a task, beside the box


def choose_coco_eval(choice: str, key: str = "TEST.COCO_EVAL") -> tuple[type, type]:
    """The classes of a dataset and of its evaluation.

    Args:
        choice: one of ``COCO_EVALS``; "auto" is "fast" where faster-coco-eval is installed.
        key: of the config, for messages.

    Raises:
        ConfigError: there is no such choice, or it is not installed.
    """
    if choice not in COCO_EVALS:
        raise ConfigError(f"{key} is {choice!r}; known: {', '.join(COCO_EVALS)}")
    if choice == "pycocotools":
        return COCO, COCOevalMaxDets
    try:
        import faster_coco_eval
    except ImportError as error:
        if choice == "auto":
            return COCO, COCOevalMaxDets
        raise ConfigError(
            f"{key} is 'fast', but faster-coco-eval cannot be imported ({error}): pip "
            "install faster-coco-eval, or set it to auto"
        ) from None

    class FastEval(faster_coco_eval.COCOeval_faster):
        summarize = COCOevalMaxDets.summarize  # pycocotools' table, for any limit of detections

    return faster_coco_eval.COCO, FastEval


class CocoEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator``, which reads no file: its ground truth is that of
    :func:`gn_detect.data.coco.load_coco`, or Detectron2's conversion of a dataset without a JSON.

    Images and classes are scored by their positions, so that their ids may be of any type; the
    results are written with the ids. They are not also written as a pickle
    (``instances_predictions.pth``), which has nothing that the JSON lacks.

    Args:
        dataset_name, output_dir, tasks, distributed, kpt_oks_sigmas: of ``COCOEvaluator``.
        max_dets_per_image: how many detections of an image count, those of the highest scores.
        coco_eval: of :func:`choose_coco_eval`.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        max_dets_per_image: int = 100,
        kpt_oks_sigmas: Sequence[float] = (),
        coco_eval: str = "auto",
    ):
        # In place of Detectron2's __init__, which parses the file.
        self._logger = logger
        self._name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        self._tasks = tasks
        self._distributed = distributed
        self._max_dets_per_image = [1, 10, max_dets_per_image]
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._cpu_device = torch.device("cpu")
        self._dataset_class, self._eval_class = choose_coco_eval(coco_eval)
        package = "pycocotools" if self._dataset_class is COCO else "faster-coco-eval"
        message = f"COCO evaluation by {package} (TEST.COCO_EVAL is {coco_eval})"
        log_first_n(logging.INFO, message, name=__name__, key="message")

    @functools.cached_property
    def _content(self) -> dict:
        """Of a COCO JSON, with images sorted by id. The first process alone asks for it."""
        if file := self._metadata.get("json_file"):
            content = load_coco(file).ground_truth()
        else:
            content = _convert_once(self._name, DatasetCatalog[self._name])
        content["images"].sort(key=lambda image: (isinstance(image["id"], str), image["id"]))
        return content

    @property
    def _do_evaluation(self) -> bool:
        return "annotations" in self._content  # which test sets lack

    @functools.cached_property
    def _images(self) -> dict[int | str, int]:
        """Image id -> position, from 1."""
        return {image["id"]: i for i, image in enumerate(self._content["images"], 1)}

    @functools.cached_property
    def _classes(self) -> dict[int | str, int]:
        """Category id -> class of the model."""
        in_order = {c["id"]: i for i, c in enumerate(self._content["categories"])}
        return self._metadata.get("thing_dataset_id_to_contiguous_id", in_order)

    @functools.cached_property
    def _ground_truth(self) -> COCO:
        """By positions from 1, with every field that a task may ask for."""
        sizes = {i["id"]: (i["height"], i["width"]) for i in self._content["images"]}
        dataset = self._dataset_class()
        dataset.dataset = {
            "images": [{**i, "id": self._images[i["id"]]} for i in self._content["images"]],
            "categories": [{"id": c + 1} for c in self._classes.values()],
            "annotations": [
                {
                    "segmentation": _no_mask(*sizes[a["image_id"]]),
                    "keypoints": [0] * 3 * self._num_keypoints,
                    "num_keypoints": 0,
                    **a,
                    "image_id": self._images[a["image_id"]],
                    "category_id": self._classes[a["category_id"]] + 1,
                }
                for a in self._content["annotations"]
                if a["category_id"] in self._classes
            ],
        }
        dataset.createIndex()
        return dataset

    @functools.cached_property
    def _num_keypoints(self) -> int:
        """Of an object of the ground truth; 0 where there are none."""
        keypoints = (a.get("keypoints", ()) for a in self._content["annotations"])
        return max(map(len, keypoints), default=0) // 3

    @property
    def _coco_api(self) -> COCO:
        """For Detectron2's evaluation of proposals."""
        dataset = _ByImageId()
        dataset.dataset = self._content
        dataset.createIndex()
        return dataset

    def evaluate(self, img_ids: Sequence[int | str] | None = None) -> dict[str, dict[str, float]]:
        """
        Args:
            img_ids: the images to evaluate on; None for all.

        Returns:
            task -> metric -> value, 0 to 100, or NaN; empty in other processes than the first.

        Raises:
            ConfigError, DataError: the predictions are not of this dataset.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        if not predictions:
            logger.warning(f"there are no predictions on {self._name} to evaluate")
            return {}
        self._results = {}
        if self._output_dir:
            PathManager.mkdirs(self._output_dir)
        with _silence():
            if "proposals" in predictions[0]:
                self._eval_box_proposals(predictions)
        if "instances" in predictions[0]:
            with paused_gc():  # which would walk through millions of results, again and again
                self._eval_predictions(predictions, img_ids)
        return copy.deepcopy(self._results)

    def _eval_predictions(
        self, predictions: list[dict], img_ids: Sequence[int | str] | None = None
    ) -> None:
        results = list(itertools.chain(*(p["instances"] for p in predictions)))
        self._check(results)
        if self._output_dir:
            ids = {c: id_ for id_, c in self._classes.items()}
            written = [{**r, "category_id": ids[r["category_id"]]} for r in results]
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            logger.info(f"Saving results to {path}")
            with PathManager.open(path, "wb") as f:
                f.write(msgspec.json.encode(written))
        if not self._do_evaluation:
            logger.info("Annotations are not available for evaluation.")
            return
        names = self._metadata.get("thing_classes")
        for task in sorted(self._tasks or self._tasks_from_predictions(results)):
            # Neither package takes results that are empty.
            scored = self.score(results, task, img_ids) if results else None
            self._results[task] = self._derive_coco_results(scored, task, class_names=names)

    def _check(self, results: list[dict]) -> None:
        if unknown := {r["image_id"] for r in results} - self._images.keys():
            raise DataError(
                f"there are predictions on the image {min(unknown, key=str)!r}, which {self._name} "
                "does not have; load the images and the ground truth from one dataset"
            )
        if unknown := {r["category_id"] for r in results} - set(self._classes.values()):
            raise ConfigError(
                f"the model predicts the class {max(unknown)}, but {self._name} has "
                f"{len(self._classes)} classes, from 0 on; set the number of classes to that"
            )

    def score(
        self, results: list[dict], task: str, img_ids: Sequence[int | str] | None = None
    ) -> COCOevalMaxDets:
        """COCO's evaluation of results as Detectron2 makes them, with classes of the model."""
        detections = [
            {
                "image_id": self._images[r["image_id"]],
                "category_id": r["category_id"] + 1,
                "score": r["score"],
                # Where there is a box, its area is that of the object: for keypoints, too.
                "bbox": r["bbox"] if task != "segm" else [],
                **({field: r[field]} if (field := _FIELDS.get(task)) else {}),
            }
            for r in results
        ]
        with _silence():
            truth = self._ground_truth
            scorer = self._eval_class(truth, truth.loadRes(detections), task)
            scorer.params.catIds = [c + 1 for c in self._classes.values()]
            if img_ids is not None:
                scorer.params.imgIds = [self._images[i] for i in img_ids]
            if task == "keypoints":
                self._set_sigmas(scorer.params, detections[0])
            else:
                scorer.params.maxDets = self._max_dets_per_image
            scorer.evaluate()
            scorer.accumulate()
        scorer.summarize()
        return scorer

    def _set_sigmas(self, params, detection: dict) -> None:
        if len(self._kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(self._kpt_oks_sigmas)
        sigmas, predicted = len(params.kpt_oks_sigmas), len(detection["keypoints"]) // 3
        known = {self._num_keypoints} if self._content["annotations"] else set()
        if known | {sigmas, predicted} != {predicted}:
            raise ConfigError(
                f"{self._name} has {self._num_keypoints} keypoints per object, the predictions "
                f"{predicted}, and TEST.KEYPOINT_OKS_SIGMAS (COCO's where it is empty) {sigmas}; "
                "they must be as many"
            )


@functools.cache  # Detectron2 shifts the keypoints in the dicts that it converts
def _convert_once(name: str, registered: Callable[[], list[dict]]) -> dict:
    return convert_to_coco_dict(name)


class _ByImageId(COCO):
    def getAnnIds(self, imgIds: int | str) -> list[int]:  # noqa: N802, N803  # of pycocotools
        return [a["id"] for a in self.imgToAnns[imgIds]]


def _no_mask(height: int, width: int) -> dict:
    return {"size": [height, width], "counts": [height * width]}


def _silence() -> contextlib.redirect_stdout:
    """Of what pycocotools prints while it works."""
    return contextlib.redirect_stdout(io.StringIO())
