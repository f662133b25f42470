"""RoI heads of the C4 models: res5 on each RoI (Faster R-CNN, Mask R-CNN), with any norm."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

from .norm import with_norms
from .resnet import finish_resnet


@ROI_HEADS_REGISTRY.register()
class GNRes5ROIHeads(Res5ROIHeads):
    """Detectron2's ``Res5ROIHeads`` with our norms in res5 (GN paper, table 4).

    Raises:
        ConfigError: ``MODEL.RESNETS.NORM`` is unknown, or the groups do not divide a layer's
            channels.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, out_channels = super()._build_res5_block(with_norms(cfg, "MODEL.RESNETS.NORM"))
        finish_resnet(res5, "roi_heads.res5", cfg, of_rois=True)
        return res5, out_channels
