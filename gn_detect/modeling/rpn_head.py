"""Head of the Region Proposal Network with any norm."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead

from .blocks import Block, in_memory_mode
from .norm import GroupNormFactory, add_norms, finish_from_config, finish_norms, norm_from_config


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
