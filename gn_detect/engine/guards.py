"""Configurations that would waste a run, refused before it starts; each has a switch to pass it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode

from gn_detect.checkpoint import Origin, WeightGuards
from gn_detect.config import ConfigError, locate
from gn_detect.layers import GroupNorm
from gn_detect.modeling.norm import norm_from_config

logger = logging.getLogger(__name__)


def check_recipe(
    cfg: CfgNode, *, processes: int, num_images: int | None, resumes: bool = False
) -> None:
    """Check a training run whose schedule is resolved (``solver.resolve_schedule``).

    Args:
        cfg: of the run.
        processes: on all machines.
        num_images: to train on; None where the datasets do not tell.
        resumes: from a checkpoint, so that ``MODEL.WEIGHTS`` is not read.

    Raises:
        ConfigError: names the keys, their values, the evidence, the fix, and the switch.
    """
    if resumes:
        pass
    elif not cfg.MODEL.WEIGHTS:
        _check_scratch(cfg, num_images)
    elif origin := Origin.of_name(cfg.MODEL.WEIGHTS):
        WeightGuards.from_config(cfg).check_origin(origin, cfg.MODEL.WEIGHTS)
    _check_single_value_groups(cfg)
    _check_learning_rate(cfg)
    _check_batch_norm(cfg, processes)


def _check_scratch(cfg: CfgNode, num_images: int | None) -> None:
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if cfg.GUARDS.SCRATCH_FREEZE_AT and freeze_at > 0:
        raise ConfigError(
            f"MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT is {freeze_at}: random weights "
            "would be frozen, which costs 3.3 box AP (Detectron projects/GN, R50: 36.2 against "
            "39.5). Set MODEL.WEIGHTS, or MODEL.BACKBONE.FREEZE_AT 0; to train so all the same, "
            "set GUARDS.SCRATCH_FREEZE_AT False"
        )
    frozen = [key for key in norm_keys(cfg) if _value(cfg, key) == "FrozenBN"]
    if cfg.GUARDS.SCRATCH_FROZEN_BN and frozen:
        raise ConfigError(
            f"MODEL.WEIGHTS is empty and {frozen[0]} is FrozenBN: a mean of 0 and a variance of 1 "
            "that belong to no data normalize nothing (an R50's loss_cls then starts at 500, with "
            "GN at 4.6: docs/small_batches.md). Set MODEL.WEIGHTS, or the norm to GN; to train so "
            "all the same, set GUARDS.SCRATCH_FROZEN_BN False"
        )
    if cfg.GUARDS.FEW_IMAGES and num_images is not None and num_images < 10_000:
        logger.warning(
            f"MODEL.WEIGHTS is empty and there are {num_images} images to train on: below 10000, "
            "pre-trained weights give a higher AP (He et al. 2018, section 5: with 3.5k images of "
            "COCO 16.0 against 9.3). GUARDS.FEW_IMAGES False silences this"
        )


def _check_single_value_groups(cfg: CfgNode) -> None:
    if not cfg.GUARDS.SINGLE_VALUE_GROUPS:
        return
    for key, what, channels, positions in _normalized_maps(cfg):
        factory = norm_from_config(cfg, key)
        layer = None if isinstance(factory, str) else factory(channels)
        if isinstance(layer, GroupNorm) and channels * positions == layer.num_groups:
            raise ConfigError(
                f"{key} is {_value(cfg, key)}, in {layer.num_groups} groups, over {what} of "
                f"{channels} channels and a single position: each group is one value, and its "
                "output is beta whatever the image. Use fewer groups (MODEL.GN.NUM_GROUPS, LN) or "
                "larger images; to train so all the same, set GUARDS.SINGLE_VALUE_GROUPS False"
            )


def _normalized_maps(cfg: CfgNode) -> Iterator[tuple[str, str, int, int]]:
    """(norm key, description, channels, positions) of the smallest map of each kind."""
    model = cfg.MODEL
    sizes = (cfg.INPUT.LSJ.IMAGE_SIZE,) if cfg.INPUT.LSJ.ENABLED else cfg.INPUT.MIN_SIZE_TRAIN
    size = min(sizes, default=0) or 1024  # 0 is the size of the file, which is not known here
    maps = f"the smallest maps of images of {size} pixels"

    def positions(stride: int) -> int:
        return max(-(-size // stride), 1) ** 2

    fpn = bool(model.FPN.IN_FEATURES)
    last = 32 if fpn else 16  # the stride of res5, or of res4 in C4 models
    yield "MODEL.RESNETS.NORM", maps, model.RESNETS.RES2_OUT_CHANNELS * last // 4, positions(last)
    if fpn:
        yield "MODEL.FPN.NORM", maps, model.FPN.OUT_CHANNELS, positions(32)
    if is_retinanet(cfg):
        yield "MODEL.RETINANET.NORM", maps, model.FPN.OUT_CHANNELS, positions(128)
        return
    if fpn:
        yield "MODEL.RPN.NORM", maps, model.FPN.OUT_CHANNELS, positions(64)
    head = model.ROI_BOX_HEAD
    if head.NUM_CONV:
        yield "MODEL.ROI_BOX_HEAD.NORM", "RoIs", head.CONV_DIM, head.POOLER_RESOLUTION**2
    if head.NUM_FC:
        yield "MODEL.ROI_BOX_HEAD.FC_NORM", "the output of a layer", head.FC_DIM, 1


def _check_learning_rate(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if not cfg.GUARDS.LEARNING_RATE:
        return
    rule = 0.02 * solver.IMS_PER_BATCH / 16
    if solver.BASE_LR > 3 * rule:
        logger.warning(
            f"SOLVER.BASE_LR is {solver.BASE_LR:g} for {solver.IMS_PER_BATCH} images per "
            f"iteration, {solver.BASE_LR / rule:.3g} times the {rule:g} of the linear rule (0.02 "
            "for 16 images). SOLVER.IMS_PER_GPU derives it, with the number of iterations; "
            "GUARDS.LEARNING_RATE False silences this"
        )
    steps = solver.STEPS if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" else ()
    first_drop = min([*steps, solver.MAX_ITER])
    if solver.WARMUP_ITERS >= first_drop:
        logger.warning(
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}, but the rate drops, or training ends, "
            f"at iteration {first_drop}: SOLVER.BASE_LR is never reached. Lower "
            "SOLVER.WARMUP_ITERS; GUARDS.LEARNING_RATE False silences this"
        )


def _check_batch_norm(cfg: CfgNode, processes: int) -> None:
    norms = {_value(cfg, key): key for key in norm_keys(cfg)}
    images = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS  # of one forward pass
    for norm, key in norms.items():
        if norm in ("SyncBN", "nnSyncBN") and cfg.MODEL.DEVICE == "cpu" and processes > 1:
            raise ConfigError(
                f"{key} is {norm}, which PyTorch synchronizes on CUDA only; on CPUs use GN"
            )
        seen = images if "SyncBN" in norm else images // processes
        if cfg.GUARDS.SMALL_BATCH_BN and norm != "FrozenBN" and "BN" in norm and seen < 8:
            logger.warning(
                f"{key} is {norm}, and its statistics are of {seen} images: below 8 the error of "
                "BN grows, on ImageNet from 23.6 % to 34.7 % at 2 (GN paper, table 2; GN: 24.1 %). "
                "Use GN, or SyncBN on more GPUs; GUARDS.SMALL_BATCH_BN False silences this"
            )


def norm_keys(cfg: CfgNode) -> list[str]:
    """The keys of the norms that the model of ``cfg`` has."""
    model = cfg.MODEL
    retinanet = is_retinanet(cfg)
    present = {
        "MODEL.RESNETS.NORM": True,
        "MODEL.FPN.NORM": bool(model.FPN.IN_FEATURES),
        "MODEL.RETINANET.NORM": retinanet,
        "MODEL.RPN.NORM": not retinanet,
        "MODEL.ROI_BOX_HEAD.NORM": not retinanet and model.ROI_BOX_HEAD.NUM_CONV > 0,
        "MODEL.ROI_MASK_HEAD.NORM": model.MASK_ON and model.ROI_MASK_HEAD.NUM_CONV > 0,
        "MODEL.ROI_MASK_HEAD.DECONV_NORM": model.MASK_ON,
        "MODEL.ROI_KEYPOINT_HEAD.NORM": model.KEYPOINT_ON,
        "MODEL.SEM_SEG_HEAD.NORM": model.META_ARCHITECTURE == "PanopticFPN",
    }
    return [key for key, there in present.items() if there]


def is_retinanet(cfg: CfgNode) -> bool:
    """Whether ``cfg`` is a RetinaNet, which has no RPN and no RoI heads."""
    return cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "GNRetinaNet")


def _value(cfg: CfgNode, key: str) -> str:
    node, name = locate(cfg, key)
    return node[name]
