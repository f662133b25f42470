"""Panoptic FPN (Kirillov et al., CVPR 2019) with GN, also in the semantic head (section 4.1)."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import PanopticFPN

from gn_detect.modeling import GNSemSegFPNHead, GroupNormFactory

from .mask_rcnn_fpn import model

model.meta_arch = PanopticFPN
model.sem_seg_head = L(GNSemSegFPNHead)(
    input_shape={
        f"p{level}": L(ShapeSpec)(channels="${....backbone.out_channels}", stride=2**level)
        for level in (2, 3, 4, 5)
    },
    num_classes=54,  # 53 kinds of stuff, and all things as one
    conv_dims=128,
    common_stride=4,
    norm=L(GroupNormFactory)(num_groups=32),
    loss_weight=0.5,
    ignore_value=255,
)
