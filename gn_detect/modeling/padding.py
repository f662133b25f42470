"""Components that keep what is padding of a batch out of what they compute: which layers of a
detector do what (``layers.padding`` says how)."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from torch import nn

from gn_detect.config import ConfigError, locate
from gn_detect.layers.padding import extend_images, mask_padding, per_image

from .blocks import before_group_norm, like


def check_components(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: ``cfg`` names components that do not know of padding.
    """
    arch = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    parts = {"META_ARCHITECTURE": arch}
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if issubclass(arch, GeneralizedRCNN) and name != "PrecomputedProposals":  # which are of nobody
        parts["PROPOSAL_GENERATOR.NAME"] = PROPOSAL_GENERATOR_REGISTRY.get(name)
    for key, part in parts.items():
        if not hasattr(part, "masks_padding"):
            raise ConfigError(
                f"MODEL.GN.MASK_PADDING is True, but MODEL.{key} is {part.__name__!r}, which does "
                f"not know of it; set it to 'GN{part.__name__}', if there is one, or MASK_PADDING "
                "to False"
            )


def check_masked(cfg: CfgNode, key: str, module: nn.Module) -> None:
    """
    Raises:
        ConfigError: the component that ``key`` names was not built with :func:`mask_paddings`.
    """
    if not hasattr(module, "masks_padding"):
        node, name = locate(cfg, key)
        raise ConfigError(
            f"MODEL.GN.MASK_PADDING is True, but {key} is {node[name]!r}, which does not keep "
            "padding at 0; take one of gn_detect, have it call "
            "gn_detect.modeling.finish_norms(..., mask_padding=True), or set MASK_PADDING to False"
        )


class UpsampleImages(nn.Upsample):
    """Of each image of a batch alone, at whose border nothing of the padding is mixed in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return per_image(super().forward, x, lambda size: int(self.scale_factor) * size)


def mask_paddings(module: nn.Module, but: nn.Module | None = None) -> None:
    """Have every layer in ``module``, but not in ``but``, keep what is padding of its maps at 0:
    each GroupNorm by its own pass, a convolution without one, and the pooling of a stem, which
    widens the image, by a product. Where a norm comes before each convolution
    (``modeling.resnetv2``), 0 stays 0."""
    skipped = set(before_group_norm(module)) | set(but.modules() if but else ())
    for name, child in list(module.named_modules()):
        if child in skipped:
            continue
        if hasattr(child, "mask_padding"):
            child.mask_padding = True
        if getattr(child, "pre_activation", False):
            skipped.update(m for m in child.modules() if isinstance(m, nn.Conv2d))
        elif isinstance(child, (nn.Conv2d, BasicStem)):
            child.register_forward_hook(_mask_output)
        elif type(child) is nn.Upsample:
            module.set_submodule(name, like(child, UpsampleImages))
    module.masks_padding = True


def extend_pooled(roi_heads: nn.Module) -> None:
    """Have RoIs at the border of an image see it as if it was alone, where its map ends there."""
    for child in roi_heads.modules():
        if isinstance(child, ROIPooler):
            child.register_forward_pre_hook(_extend_maps)


def _extend_maps(module: nn.Module, args: tuple) -> tuple:
    maps, *boxes = args
    return ([extend_images(x) for x in maps], *boxes)


def _mask_output(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return mask_padding(output)
