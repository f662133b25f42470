"""Region Proposal Network with any norm, and without proposals in what is padding of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.structures import Boxes, Instances

from .blocks import Block, in_memory_mode
from .norm import GroupNormFactory, add_norms, finish_from_config, finish_norms, norm_from_config
from .padding import check_masked


@RPN_HEAD_REGISTRY.register()
class GNRPNHead(Block, StandardRPNHead):
    """Detectron2's head with a norm after its hidden 3x3 convolutions. The head is shared by all
    levels; GN, LN and IN normalize each level by its own statistics.

    Args:
        in_channels: of every level.
        num_anchors: anchors at a position.
        conv_norm: as ``get_norm`` takes it; by default none, as published.
        finish: ``weight_standardization``, ``memory`` and ``channels_last`` of ``finish_norms``.
        **kwargs: of ``StandardRPNHead`` (``box_dim``, ``conv_dims``).

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_anchors: int,
        conv_norm: GroupNormFactory | str = "",
        finish: dict[str, str | bool] | None = None,
        **kwargs,
    ):
        super().__init__(in_channels=in_channels, num_anchors=num_anchors, **kwargs)
        add_norms(self.conv, conv_norm)
        finish_norms(self, "proposal_generator.rpn_head", **finish or {})

    forward = in_memory_mode(StandardRPNHead.forward)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": norm_from_config(cfg, "MODEL.RPN.NORM"),
            "finish": finish_from_config(cfg),
        }


@PROPOSAL_GENERATOR_REGISTRY.register()
class GNRPN(RPN):
    """Detectron2's, which can leave out the anchors whose centre is in the padding of an image:
    they are neither positive nor negative, and propose nothing.

    Args:
        mask_padding: do so.
        **kwargs: of ``RPN``.

    Raises:
        ConfigError: with ``MODEL.GN.MASK_PADDING``, the head does not mask padding.
    """

    masks_padding = True  # where it is asked to

    @configurable
    def __init__(self, *, mask_padding: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.mask_padding = mask_padding

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        args = super().from_config(cfg, input_shape)
        if cfg.MODEL.GN.MASK_PADDING:
            check_masked(cfg, "MODEL.RPN.HEAD_NAME", args["head"])
        return {**args, "mask_padding": cfg.MODEL.GN.MASK_PADDING}

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        label = super().label_and_sample_anchors
        if self.mask_padding:
            return label_inside(label, anchors, gt_instances)
        return label(anchors, gt_instances)

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[torch.Tensor],
        pred_anchor_deltas: list[torch.Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        if not self.mask_padding:
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        lowest = torch.finfo(pred_objectness_logits[0].dtype).min  # infinite ones end a training
        kept = inside(anchors, image_sizes)
        logits = [
            x.masked_fill(~k, lowest) for x, k in zip(pred_objectness_logits, kept, strict=True)
        ]
        proposals = super().predict_proposals(anchors, logits, pred_anchor_deltas, image_sizes)
        return [p[p.objectness_logits > lowest] for p in proposals]


def inside(anchors: list[Boxes], image_sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Which anchors of each level have their centre in each of N images, (N, R) bool."""
    kept = []
    for level in anchors:
        x, y = level.get_centers().unbind(1)
        # Centres are halves, but for rounding.
        images = [(x < width - 0.25) & (y < height - 0.25) for height, width in image_sizes]
        kept.append(torch.stack(images))
    return kept


def label_inside(
    label: Callable, anchors: list[Boxes], gt_instances: list[Instances]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """``label(anchors, gt_instances)``, of each image labels (R,) and boxes (R, 4), of the anchors
    inside of the image; others have the label -1."""
    labels, boxes, all_anchors = [], [], Boxes.cat(anchors)
    sizes = [instances.image_size for instances in gt_instances]
    for instances, kept in zip(gt_instances, torch.cat(inside(anchors, sizes), 1), strict=True):
        (found,), (matched,) = label([all_anchors[kept]], [instances])
        labels.append(found.new_full(kept.shape, -1).masked_scatter_(kept, found))
        boxes.append(matched.new_zeros(len(kept), 4).masked_scatter_(kept[:, None], matched))
    return labels, boxes
