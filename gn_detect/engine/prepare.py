"""Before a run: settle what follows from the machine and the data, refuse what cannot work."""

from __future__ import annotations

import importlib.util
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from gn_detect.config import ConfigError
from gn_detect.data.coco import CocoSummary, DataError, check_coco_dataset
from gn_detect.solver import resolve_schedule

from .guards import check_recipe, is_retinanet
from .train_loop import AMP_DTYPES

logger = logging.getLogger(__name__)

# What is the user's to mend: shown as a sentence, without a traceback.
EXPECTED_ERRORS = (ConfigError, DataError, FloatingPointError)


def sentence(error: Exception) -> str | None:
    """The message for a user of one of ``EXPECTED_ERRORS``; None for any other error.

    One that comes from a data loading worker or from another process carries its traceback as
    text, and the sentence is the last line of it.
    """
    lines = str(error).strip().splitlines()
    last = lines[-1] if lines else ""
    for kind in EXPECTED_ERRORS:
        module, found, message = last.partition(f"{kind.__name__}: ")
        if found and " " not in module:
            return message
    return last if isinstance(error, EXPECTED_ERRORS) else None


def prepare_run(
    cfg: CfgNode,
    *,
    num_gpus: int = 1,
    num_machines: int = 1,
    eval_only: bool = False,
    resume: bool = False,
) -> None:
    """Complete ``cfg`` in place for this machine and its datasets, and check it.

    Sets ``MODEL.DEVICE`` (and AMP) where there is no CUDA, the classes and
    ``INPUT.MASK_FORMAT`` from the data, and the schedule from ``SOLVER.IMS_PER_GPU``
    (``solver/schedule.py``), and logs each with the reason. Looks through the annotations of the
    COCO-format datasets.

    Args:
        cfg: of :func:`gn_detect.config.load_config`.
        num_gpus: GPUs of this machine, or processes where there is no CUDA.
        num_machines: machines.
        eval_only: evaluate, do not train.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``.

    Raises:
        ConfigError, DataError: the run could not work.
    """
    _resolve_device(cfg, num_gpus)
    _check_weights(cfg, eval_only, resume)
    summaries = _check_datasets(cfg, eval_only)
    _resolve_classes(cfg, summaries)
    if eval_only:
        return
    processes = max(num_gpus * num_machines, 1)
    resolve_schedule(cfg, processes)
    images = [summaries[name].num_images for name in cfg.DATASETS.TRAIN if name in summaries]
    check_recipe(cfg, processes=processes, num_images=sum(images) if images else None)


def _resolve_device(cfg: CfgNode, num_gpus: int) -> None:
    if torch.cuda.is_available():
        if num_gpus > torch.cuda.device_count():
            raise ConfigError(
                f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()}"
            )
        if num_gpus > 1 and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                f"MODEL.DEVICE is cpu, but Detectron2 connects {num_gpus} processes through CUDA "
                "where it is available; hide it with CUDA_VISIBLE_DEVICES=''"
            )
    elif cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("no CUDA device is available: MODEL.DEVICE = cpu")
    amp = cfg.SOLVER.AMP
    if amp.DTYPE not in AMP_DTYPES:
        raise ConfigError(f"SOLVER.AMP.DTYPE is {amp.DTYPE!r}; known: {', '.join(AMP_DTYPES)}")
    if cfg.MODEL.DEVICE == "cpu" and amp.ENABLED and amp.DTYPE == "float16":
        amp.ENABLED = False
        logger.warning(
            "mixed precision in float16 needs CUDA: SOLVER.AMP.ENABLED = False "
            "(SOLVER.AMP.DTYPE bfloat16 does not need it)"
        )


def _check_weights(cfg: CfgNode, eval_only: bool, resume: bool) -> None:
    if resume:
        pointer = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
        if os.path.isfile(pointer):
            with open(pointer) as f:
                checkpoint = os.path.join(cfg.OUTPUT_DIR, f.read().strip())
            if not os.path.isfile(checkpoint):
                raise ConfigError(
                    f"--resume: {pointer} names {checkpoint}, which does not exist; write the name "
                    "of another checkpoint into it, or delete it to start at iteration 0"
                )
            return
        logger.warning(f"--resume: no checkpoint in {cfg.OUTPUT_DIR}, starting at iteration 0")
    weights = cfg.MODEL.WEIGHTS
    if not weights and eval_only:
        raise ConfigError("MODEL.WEIGHTS is empty: with --eval-only, name the weights to evaluate")
    path = weights.split("?")[0]  # Detectron2 takes ?matching_heuristics=True
    if weights and "://" not in weights and not os.path.isfile(path):
        raise ConfigError(f"MODEL.WEIGHTS: there is no file {path}")


def _check_datasets(cfg: CfgNode, eval_only: bool) -> dict[str, CocoSummary]:
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: with --eval-only, name the data to evaluate on")
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("DATASETS.TRAIN is empty: name the data to train on (--train-json ...)")
    if not cfg.DATASETS.TEST:
        logger.warning("DATASETS.TEST is empty (no --val-json): nothing will be evaluated")
    train = () if eval_only else cfg.DATASETS.TRAIN
    summaries = {}
    for name in dict.fromkeys([*train, *cfg.DATASETS.TEST]):
        summary = check_coco_dataset(
            name,
            masks=cfg.MODEL.MASK_ON,
            training=name in train,
            evaluation=name in cfg.DATASETS.TEST,
        )
        if summary is None:
            if name in cfg.DATASETS.TEST:
                raise ConfigError(
                    f"DATASETS.TEST: {name} is not in COCO format, and only the COCO evaluation is "
                    "supported; register it with register_coco_instances"
                )
            continue
        if (
            name in cfg.DATASETS.TEST
            and MetadataCatalog.get(name).evaluator_type == "coco_panoptic_seg"
            and importlib.util.find_spec("panopticapi") is None
        ):
            raise ConfigError(
                f"DATASETS.TEST: the evaluation of {name} needs panopticapi: "
                "pip install git+https://github.com/cocodataset/panopticapi.git"
            )
        summaries[name] = summary
        logger.info(f"{name}: {summary.num_images} images, {summary.num_annotations} annotations")
        if name in train and summary.has_rle and cfg.INPUT.MASK_FORMAT == "polygon":
            cfg.INPUT.MASK_FORMAT = "bitmask"
            logger.info(f"INPUT.MASK_FORMAT = bitmask: {name} has masks as RLE")
    return summaries


def _resolve_classes(cfg: CfgNode, summaries: dict[str, CocoSummary]) -> None:
    section = "RETINANET" if is_retinanet(cfg) else "ROI_HEADS"
    key, stated = f"MODEL.{section}.NUM_CLASSES", cfg.MODEL[section].NUM_CLASSES
    if not summaries:
        if stated is None:
            raise ConfigError(f"{key}: no dataset in COCO format declares it; set it")
        return
    (first, summary), *others = summaries.items()
    for name, other in others:
        if other.classes != summary.classes:
            differ = sorted(dict(other.classes.items() ^ summary.classes.items()), key=str)
            raise DataError(
                f"the datasets {first} and {name} declare different categories (ids "
                f"{', '.join(map(str, differ[:10]))}); ids and names must be the same in both"
            )
    count = len(summary.classes)
    if stated is not None and stated != count:
        raise ConfigError(
            f"{key} is {stated}, but the dataset {first} declares {count} categories; leave the "
            "key out, and it follows the data"
        )
    cfg.MODEL[section].NUM_CLASSES = count
    names = ", ".join(map(str, summary.classes.values()))
    logger.info(f"{key} = {count}, from the dataset {first}: {names}")
