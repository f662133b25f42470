"""Box head of Faster R-CNN with any norm."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead

from gn_detect.config import ConfigError

from .blocks import Block, in_memory_mode, run_layers
from .norm import GroupNormFactory, finish_from_config, finish_norms, insert_after, norm_from_config


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(Block, FastRCNNConvFCHead):
    """Convolutions with norm and ReLU, then fully connected layers with ReLU, on each RoI.

    With four convolutions of 256 channels and one layer of 1024 it is the ``4conv1fc`` head of the
    GN paper (table 5; Detectron ``add_roi_Xconv1fc_gn_head``). The fully connected layers have no
    norm there; ``fc_norm`` gives them one, as ``make_fc(use_gn=True)`` of maskrcnn-benchmark does.
    Output: (R, fc_dims[-1]) from (R, C, H, W).

    Args:
        input_shape: channels, height and width of the pooled RoI features.
        conv_dims: output channels of the 3x3 convolutions.
        fc_dims: output sizes of the fully connected layers.
        conv_norm: as ``get_norm`` takes it; by default GN with 32 groups, eps 1e-5.
        fc_norm: ``channels -> nn.Module`` on (R, C), or "".
        finish: ``weight_standardization``, ``memory`` and ``channels_last`` of ``finish_norms``.

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: list[int],
        fc_dims: list[int],
        conv_norm: GroupNormFactory | str | None = None,
        fc_norm: GroupNormFactory | str = "",
        finish: dict[str, str | bool] | None = None,
    ):
        conv_norm = GroupNormFactory() if conv_norm is None else conv_norm
        super().__init__(input_shape, conv_dims=conv_dims, fc_dims=fc_dims, conv_norm=conv_norm)
        if fc_norm:
            for k, fc in enumerate(self.fcs, start=1):
                fc.bias = None
                insert_after(self, f"fc{k}", f"fc_norm{k}", fc_norm(fc.out_features))
        finish_norms(self, "roi_heads.box_head", **finish or {})

    forward = in_memory_mode(run_layers)

    @classmethod
    def from_config(cls, cfg, input_shape):
        fc_norm = norm_from_config(cfg, "MODEL.ROI_BOX_HEAD.FC_NORM")
        if fc_norm and not isinstance(fc_norm, GroupNormFactory):
            raise ConfigError(
                f"MODEL.ROI_BOX_HEAD.FC_NORM is {cfg.MODEL.ROI_BOX_HEAD.FC_NORM!r}, which "
                "normalizes maps; set it to 'GN', 'LN' or ''"
            )
        return {
            **super().from_config(cfg, input_shape),
            "conv_norm": norm_from_config(cfg, "MODEL.ROI_BOX_HEAD.NORM"),
            "fc_norm": fc_norm,
            "finish": finish_from_config(cfg, of_rois=True),
        }
