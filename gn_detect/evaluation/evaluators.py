"""Which evaluation a dataset gets: by its ``evaluator_type``, as in Detectron2's own
``tools/train_net.py``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.images import read_labels

from .scoring import CocoEvaluator, choose_coco_eval


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of evaluation.

    Attributes:
        build: from the name of the dataset, the directory for results, and the options of COCO's.
        packages: that it needs beside those of gn_detect: module -> what pip installs it from.
    """

    build: Sequence[Callable[[str, str, dict], DatasetEvaluator]]
    packages: dict[str, str] = dataclasses.field(default_factory=dict)


def _coco(name: str, output_dir: str, options: dict) -> DatasetEvaluator:
    return CocoEvaluator(name, output_dir, **options)


def _semantic(name: str, output_dir: str, options: dict) -> DatasetEvaluator:
    metadata = MetadataCatalog.get(name)
    load = functools.partial(
        read_labels, count=len(metadata.stuff_classes), ignored=metadata.ignore_label
    )
    return SemSegEvaluator(name, output_dir=output_dir, sem_seg_loading_fn=load)


_PANOPTICAPI = {"panopticapi": "git+https://github.com/cocodataset/panopticapi.git"}
_CITYSCAPES = {"cityscapesscripts": "cityscapesscripts"}

# By the evaluator_type in the metadata of a dataset.
EVALUATORS = {
    "coco": _Kind([_coco]),
    "coco_panoptic_seg": _Kind(
        [_coco, _semantic, lambda name, output_dir, _: COCOPanopticEvaluator(name, output_dir)],
        _PANOPTICAPI,
    ),
    "sem_seg": _Kind([_semantic]),
    "lvis": _Kind(
        [lambda name, output_dir, _: LVISEvaluator(name, output_dir=output_dir)],
        {"lvis": "git+https://github.com/lvis-dataset/lvis-api.git"},
    ),
    "cityscapes_instance": _Kind(
        [lambda name, *_: CityscapesInstanceEvaluator(name)], {**_CITYSCAPES, "shapely": "shapely"}
    ),
    "cityscapes_sem_seg": _Kind([lambda name, *_: CityscapesSemSegEvaluator(name)], _CITYSCAPES),
    "pascal_voc": _Kind([lambda name, *_: PascalVOCDetectionEvaluator(name)]),
}


# What an evaluation reads, by its key in the metadata.
_PATHS = ("json_file", "panoptic_json", "panoptic_root", "sem_seg_root", "gt_dir", "dirname")


def check_evaluator(
    dataset_name: str, coco_eval: str = "auto", key: str = "TEST.COCO_EVAL"
) -> None:
    """
    Args:
        dataset_name: a registered dataset.
        coco_eval, key: of :func:`.scoring.choose_coco_eval`.

    Raises:
        ConfigError: the evaluation of the dataset is of no kind in ``EVALUATORS``, needs what is
            not installed, or does not work on several machines.
        DataError: it needs a file or a directory that does not exist.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    if kind not in EVALUATORS:
        raise ConfigError(
            f"the dataset {dataset_name} has the evaluator_type {kind!r}, which no evaluation is "
            f"for; known: {', '.join(EVALUATORS)}. Set it in MetadataCatalog.get('{dataset_name}')"
            ", or register the data with register_coco_json"
        )
    if kind.startswith("cityscapes") and comm.get_local_size() < comm.get_world_size():
        raise ConfigError(
            f"the evaluation of {dataset_name} ({kind}) works on one machine alone; leave the "
            "dataset out, and evaluate with --eval-only on one"
        )
    for module, source in EVALUATORS[kind].packages.items():
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"the evaluation of {dataset_name} ({kind}) needs {module}, which is not "
                f"installed: pip install {source}"
            )
    for path in map(metadata.get, _PATHS):
        if path and not PathManager.exists(path):
            raise DataError(
                f"the evaluation of {dataset_name} ({kind}) needs {path}, which does not exist; "
                "Detectron2's own datasets are below the directory DETECTRON2_DATASETS"
            )
    choose_coco_eval(coco_eval, key)


def build_evaluator(
    dataset_name: str,
    output_dir: str,
    kpt_oks_sigmas: Sequence[float] = (),
    coco_eval: str = "auto",
) -> DatasetEvaluator:
    """
    Args:
        dataset_name: a registered dataset.
        output_dir: directory for the results.
        kpt_oks_sigmas: tolerance of each keypoint, relative to the size of the object; COCO's where
            it is empty.
        coco_eval: ``TEST.COCO_EVAL``.

    Raises:
        ConfigError, DataError: see :func:`check_evaluator`.
    """
    check_evaluator(dataset_name, coco_eval)
    options = {"kpt_oks_sigmas": kpt_oks_sigmas, "coco_eval": coco_eval}
    kind = EVALUATORS[MetadataCatalog.get(dataset_name).evaluator_type]
    evaluators = [build(dataset_name, output_dir, options) for build in kind.build]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
