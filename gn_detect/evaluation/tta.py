"""Test-time augmentation, by Detectron2's ``GeneralizedRCNNWithTTA``: what it takes, and how."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.modeling.meta_arch.panoptic_fpn import PanopticFPN
from torch import nn

from gn_detect.config import ConfigError


def check_tta(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: ``TEST.AUG`` is enabled for a model that Detectron2 cannot augment, or names no
            sizes.
    """
    test, model = cfg.TEST.AUG, cfg.MODEL
    if not test.ENABLED:
        return
    architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    if not issubclass(architecture, GeneralizedRCNN) or issubclass(architecture, PanopticFPN):
        reason = f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE}"
    else:
        keys = [key for key in ("KEYPOINT_ON", "LOAD_PROPOSALS") if model[key]]
        reason = f"MODEL.{keys[0]} is True" if keys else ""
    if reason:
        raise ConfigError(
            f"TEST.AUG.ENABLED is True and {reason}: Detectron2 augments at test time Faster, Mask "
            "and Cascade R-CNN alone; set it to False"
        )
    if not test.MIN_SIZES or min(test.MIN_SIZES) < 1 or test.MAX_SIZE < 1:
        raise ConfigError(
            f"TEST.AUG.MIN_SIZES is {test.MIN_SIZES} and MAX_SIZE {test.MAX_SIZE}; they must be "
            "the shorter sides to resize an image to, in pixels, and the largest of the longer"
        )


def with_tta(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """``model``, or the model in a DistributedDataParallel, run on the images of ``TEST.AUG``: each
    is resized from what the model is given (``INPUT.MIN_SIZE_TEST``), and flipped.

    Raises:
        ConfigError: see :func:`check_tta`.
    """
    check_tta(cfg)
    # An evaluation puts what it is given, with all in it, back into the mode in which it was.
    return GeneralizedRCNNWithTTA(cfg, model).train(model.training)


def describe_tta(cfg: CfgNode) -> str:
    """Such as "2 passes per image: shorter side 400, 500"."""
    sizes, flip = cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP
    passes = len(sizes) * (2 if flip else 1)
    flipped = ", each also flipped" if flip else ""
    return f"{passes} passes per image: shorter side {', '.join(map(str, sizes))}{flipped}"
