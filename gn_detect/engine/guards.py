"""Configurations that would waste a run, refused before it starts; each has a switch to pass it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from detectron2.config import CfgNode

from gn_detect.checkpoint import Origin, check_origin
from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.modeling.norm import norm_from_config

logger = logging.getLogger(__name__)


def check_recipe(cfg: CfgNode, *, processes: int, num_images: int | None) -> None:
    """Check a training run whose schedule is resolved (``solver.resolve_schedule``).

    Args:
        cfg: of the run.
        processes: on all machines.
        num_images: to train on; None where the datasets do not tell.

    Raises:
        ConfigError: names the keys, their values, the evidence, the fix, and the switch.
    """
    if not cfg.MODEL.WEIGHTS:
        _check_scratch(cfg, num_images)
    elif origin := Origin.of_name(cfg.MODEL.WEIGHTS):
        check_origin(origin, cfg, cfg.MODEL.WEIGHTS)
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
            f"MODEL.WEIGHTS is empty and {frozen[0]} is FrozenBN: its statistics would stay those "
            "of no data, and training diverges at once (facebookresearch/detectron2 issues 914, "
            "348). Set MODEL.WEIGHTS, or the norm to GN; to train so all the same, set "
            "GUARDS.SCRATCH_FROZEN_BN False"
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
    size = cfg.INPUT.LSJ.IMAGE_SIZE if cfg.INPUT.LSJ.ENABLED else min(cfg.INPUT.MIN_SIZE_TRAIN)
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
    rule = 0.02 * solver.IMS_PER_BATCH / 16
    if cfg.GUARDS.LEARNING_RATE and solver.BASE_LR > 3 * rule:
        logger.warning(
            f"SOLVER.BASE_LR is {solver.BASE_LR:g} for {solver.IMS_PER_BATCH} images per "
            f"iteration, {solver.BASE_LR / rule:.3g} times the {rule:g} of the linear rule (0.02 "
            "for 16 images). SOLVER.IMS_PER_GPU derives it, with the number of iterations; "
            "GUARDS.LEARNING_RATE False silences this"
        )


def _check_batch_norm(cfg: CfgNode, processes: int) -> None:
    norms = {_value(cfg, key): key for key in norm_keys(cfg)}
    if cfg.MODEL.DEVICE == "cpu" and processes > 1 and "SyncBN" in norms:
        raise ConfigError(
            f"{norms['SyncBN']} is SyncBN, which PyTorch synchronizes on CUDA only; on CPUs use GN"
        )
    images = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS  # of one forward pass
    for norm, seen in (("BN", images // processes), ("SyncBN", images)):
        if cfg.GUARDS.SMALL_BATCH_BN and norm in norms and seen < 8:
            logger.warning(
                f"{norms[norm]} is {norm}, and its statistics are of {seen} images: below 8 the "
                "error of BN grows, on ImageNet from 23.6 % to 34.7 % at 2 (GN paper, table 2; GN: "
                "24.1 %). Use GN, or SyncBN on more GPUs; GUARDS.SMALL_BATCH_BN False silences this"
            )


def norm_keys(cfg: CfgNode) -> list[str]:
    """The keys of the norms that the model of ``cfg`` has."""
    model = cfg.MODEL
    components = {
        "RESNETS": True,
        "FPN": bool(model.FPN.IN_FEATURES),
        "RETINANET": is_retinanet(cfg),
        "RPN": not is_retinanet(cfg),
        "ROI_BOX_HEAD": not is_retinanet(cfg) and model.ROI_BOX_HEAD.NUM_CONV > 0,
        "ROI_MASK_HEAD": model.MASK_ON,
        "ROI_KEYPOINT_HEAD": model.KEYPOINT_ON,
        "SEM_SEG_HEAD": model.META_ARCHITECTURE == "PanopticFPN",
    }
    return [f"MODEL.{name}.NORM" for name, present in components.items() if present]


def is_retinanet(cfg: CfgNode) -> bool:
    """Whether ``cfg`` is a RetinaNet, which has no RPN and no RoI heads."""
    return cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "GNRetinaNet")


def _value(cfg: CfgNode, key: str) -> str:
    _, section, name = key.split(".")
    return cfg.MODEL[section][name]
