"""Before a run: settle what follows from the machine and the data, refuse what cannot work."""

from __future__ import annotations

import importlib.util
import logging
import os
import re

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from gn_detect.checkpoint import CheckpointError, Weights, WeightsError
from gn_detect.checkpoint.sources import split_name
from gn_detect.config import ConfigError
from gn_detect.data.coco import CocoSummary, DataError, check_coco_dataset
from gn_detect.solver import resolve_schedule

from .guards import check_recipe, is_retinanet
from .train_loop import AMP_DTYPES

logger = logging.getLogger(__name__)

# What is the user's to mend: shown as a sentence, without a traceback.
EXPECTED_ERRORS = (CheckpointError, ConfigError, DataError, FloatingPointError, WeightsError)


def sentence(error: Exception) -> str | None:
    """The message for a user of one of ``EXPECTED_ERRORS``; None for any other error.

    One that comes from a data loading worker or from another process carries its traceback as
    text, and the sentence is the last line of it.
    """
    # A disk that is full for a checkpoint is full for the metrics that Detectron2 writes after it.
    if isinstance(error, OSError) and isinstance(error.__context__, CheckpointError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    last = lines[-1] if lines else ""
    for kind in EXPECTED_ERRORS:
        module, found, message = last.partition(f"{kind.__name__}: ")
        if found and " " not in module:
            return message
    return " ".join(line.strip() for line in lines) if isinstance(error, EXPECTED_ERRORS) else None


def shorten_expected_error(record: logging.LogRecord) -> bool:
    """Log what is the user's to mend as its sentence; Detectron2 logs a traceback of it."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, (CheckpointError, DataError, FloatingPointError)):
        record.msg, record.exc_info = f"{record.msg} {sentence(error)}", None
    return True


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
    check_weights("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, eval_only, resume)
    summaries = _check_datasets(cfg, eval_only)
    _resolve_classes(cfg, summaries)
    if eval_only:
        return
    check_keep("SOLVER.CHECKPOINT_KEEP", cfg.SOLVER.CHECKPOINT_KEEP)
    processes = max(num_gpus * num_machines, 1)
    resolve_schedule(cfg, processes)
    counts = [summaries[n].num_images if n in summaries else None for n in cfg.DATASETS.TRAIN]
    check_recipe(
        cfg,
        processes=processes,
        num_images=None if None in counts else sum(counts),
        resumes=resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")),
    )


def _resolve_device(cfg: CfgNode, num_gpus: int) -> None:
    check_num_gpus(num_gpus)
    cfg.MODEL.DEVICE = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE, num_gpus)
    amp = cfg.SOLVER.AMP
    amp.ENABLED = usable_amp(
        "SOLVER.AMP.ENABLED", amp.ENABLED, "SOLVER.AMP.DTYPE", amp.DTYPE, cfg.MODEL.DEVICE
    )


def check_num_gpus(num_gpus: int) -> None:
    """
    Raises:
        ConfigError: this machine has GPUs, but fewer than ``num_gpus``.
    """
    if torch.cuda.is_available() and num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()}"
        )


def usable_device(key: str, device: str, processes: int) -> str:
    """``device``, the value of the config key ``key``; or the CPU where there is no CUDA.

    Raises:
        ConfigError: several processes are to train on the CPU, but there is CUDA.
    """
    if torch.cuda.is_available():
        if processes > 1 and device == "cpu":
            raise ConfigError(
                f"{key} is cpu, but Detectron2 connects {processes} processes through CUDA "
                "where it is available; hide it with CUDA_VISIBLE_DEVICES=''"
            )
    elif device.startswith("cuda"):
        logger.warning(f"no CUDA device is available: {key} = cpu")
        return "cpu"
    return device


def usable_amp(enabled_key: str, enabled: bool, dtype_key: str, dtype: str, device: str) -> bool:
    """``enabled``, the value of the config key ``enabled_key``; or False for float16 on the CPU.

    Raises:
        ConfigError: ``dtype``, the value of ``dtype_key``, is unknown.
    """
    if dtype not in AMP_DTYPES:
        raise ConfigError(f"{dtype_key} is {dtype!r}; known: {', '.join(AMP_DTYPES)}")
    if device == "cpu" and enabled and dtype == "float16":
        logger.warning(
            f"mixed precision in float16 needs CUDA: {enabled_key} = False ({dtype_key} bfloat16 "
            "does not need it)"
        )
        return False
    return enabled


def check_weights(key: str, weights: str, output_dir: str, eval_only: bool, resume: bool) -> None:
    """Check that there is what a run starts from: a checkpoint in ``output_dir``, or ``weights``.

    Args:
        key: the config key of ``weights``.
        weights: a path, a URL, or "" to train from scratch.
        output_dir: of the run.
        eval_only: evaluate, do not train.
        resume: continue from the last checkpoint in ``output_dir``.

    Raises:
        ConfigError: there is not.
    """
    if resume:
        pointer = os.path.join(output_dir, "last_checkpoint")
        if os.path.isfile(pointer):
            with open(pointer) as f:
                checkpoint = os.path.join(output_dir, f.read().strip())
            if not os.path.isfile(checkpoint):
                raise ConfigError(
                    f"--resume: {pointer} names {checkpoint}, which does not exist; write the name "
                    "of another checkpoint into it, or delete it to start at iteration 0"
                )
            return
        logger.warning(f"--resume: no checkpoint in {output_dir}, starting at iteration 0")
    if not weights and eval_only:
        raise ConfigError(f"{key} is empty: with --eval-only, name the weights to evaluate")
    path, _, _ = split_name(weights)
    if weights and "://" not in weights and not os.path.isfile(path):
        raise ConfigError(f"{key}: there is no file {path}")


def check_keep(key: str, keep: int) -> None:
    """
    Raises:
        ConfigError: ``keep``, the value of ``key``, is no number of checkpoints.
    """
    if type(keep) is not int or keep < 0:
        raise ConfigError(
            f"{key} is {keep!r}; it must be how many periodic checkpoints to keep, or 0 for all"
        )


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
        if name in cfg.DATASETS.TEST:
            check_evaluation("DATASETS.TEST", name)
        summaries[name] = summary
        logger.info(f"{name}: {summary.num_images} images, {summary.num_annotations} annotations")
        if name in train and summary.has_rle and cfg.INPUT.MASK_FORMAT == "polygon":
            cfg.INPUT.MASK_FORMAT = "bitmask"
            logger.info(f"INPUT.MASK_FORMAT = bitmask: {name} has masks as RLE")
    return summaries


def check_evaluation(key: str, name: str) -> None:
    """
    Raises:
        ConfigError: the evaluation of the dataset ``name``, which the config key ``key`` names,
            needs a package that is not installed.
    """
    panoptic = MetadataCatalog.get(name).evaluator_type == "coco_panoptic_seg"
    if panoptic and importlib.util.find_spec("panopticapi") is None:
        raise ConfigError(
            f"{key}: the evaluation of {name} needs panopticapi: "
            "pip install git+https://github.com/cocodataset/panopticapi.git"
        )


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


def classes_from_weights(cfg: CfgNode, weights: Weights) -> None:
    """Set the number of classes from the predictor in ``weights`` where ``cfg`` leaves it open; to
    1 where they have none."""
    retinanet = is_retinanet(cfg)
    section = cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS
    if section.NUM_CLASSES is not None:
        return
    pattern = r"head\.cls_score\.weight" if retinanet else r".*box_predictor\..*cls_score\.weight"
    rows = next((len(t) for name, t in weights.state.items() if re.fullmatch(pattern, name)), None)
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    if rows is None:
        section.NUM_CLASSES = 1
    elif retinanet:
        section.NUM_CLASSES = rows // (len(anchors.SIZES[0]) * len(anchors.ASPECT_RATIOS[0]))
    else:
        section.NUM_CLASSES = rows - 1  # the last is the background
