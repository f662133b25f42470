"""How the predictions on a dataset are scored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

from gn_detect.data.coco import COCO_EVALUATORS


def build_evaluator(
    dataset_name: str, output_dir: str, kpt_oks_sigmas: Sequence[float] = ()
) -> DatasetEvaluator:
    """The COCO evaluation (pycocotools) of a dataset, and for panoptic data those of semantic
    segmentation and of panoptic quality, as in Detectron2's ``tools/train_net.py``.

    Args:
        dataset_name: a registered dataset.
        output_dir: directory for the results as JSON.
        kpt_oks_sigmas: tolerance of each keypoint, relative to the size of the object; COCO's where
            it is empty.

    Raises:
        ValueError: the dataset is of another kind than ``COCO_EVALUATORS``.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in COCO_EVALUATORS:
        raise ValueError(
            f"the dataset {dataset_name} has the evaluator type {kind!r}; supported: "
            f"{', '.join(COCO_EVALUATORS)}: register it in COCO format"
        )
    instances = COCOEvaluator(
        dataset_name,
        output_dir=output_dir,
        use_fast_impl=False,
        kpt_oks_sigmas=kpt_oks_sigmas,
    )
    if kind == "coco":
        return instances
    semantic = SemSegEvaluator(
        dataset_name, output_dir=output_dir, sem_seg_loading_fn=_load_semantic_labels
    )
    return DatasetEvaluators([instances, semantic, COCOPanopticEvaluator(dataset_name, output_dir)])


def _load_semantic_labels(file_name: str, dtype: type) -> np.ndarray:
    """The labels of an image, (height, width). Detectron2's own function asks for them without a
    copy, which NumPy 2 refuses where it has to make one."""
    with PathManager.open(file_name, "rb") as f:
        return np.array(Image.open(f), dtype=dtype)
