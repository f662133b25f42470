"""Head of the Region Proposal Network with any norm."""

from __future__ import annotations

import torch
from detectron2.config import configurable
from detectron2.layers import Conv2d
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead

from .blocks import Block, in_memory_mode
from .norm import (
    GroupNormFactory,
    add_norm,
    finish_from_config,
    finish_norms,
    norm_from_config,
)


@RPN_HEAD_REGISTRY.register()
class GNRPNHead(Block, StandardRPNHead):
    """Detectron2's head with a norm after its hidden 3x3 convolutions. The head is shared by all
    levels; GN, LN and IN normalize each level by its own statistics.

    Args:
        in_channels: of every level.
        num_anchors: anchors at a position.
        conv_norm: as ``get_norm`` takes it; by default none, as published.
        weight_standardization: of the convolutions before a GN (``layers.standardize_weight``).
        memory: what the backward pass keeps (``layers.recompute.MODES``).
        channels_last: lay the weights, and with them the maps, out so.
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
        weight_standardization: str = "",
        memory: str = "fast",
        channels_last: bool = False,
        **kwargs,
    ):
        super().__init__(in_channels=in_channels, num_anchors=num_anchors, **kwargs)
        for layer in self.conv.modules():
            if isinstance(layer, Conv2d):
                add_norm(layer, conv_norm)
        finish_norms(
            self, "proposal_generator.rpn_head", weight_standardization, memory, channels_last
        )

    @in_memory_mode
    def forward(self, features: list[torch.Tensor]):
        return super().forward(features)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": norm_from_config(cfg, "MODEL.RPN.NORM"),
            **finish_from_config(cfg),
        }
