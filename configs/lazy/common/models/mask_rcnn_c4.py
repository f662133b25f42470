"""Mask R-CNN on res4, with GN in the backbone and in the res5 of the RoI heads (GN paper, table 4).
The RPN, the proposals of all sizes and the predictors have no norm."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BottleneckBlock
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import Res5ROIHeads

from gn_detect.modeling import GNMaskRCNNConvUpsampleHead, GroupNormFactory

from .mask_rcnn_fpn import model

model.backbone = model.backbone.bottom_up
model.backbone.out_features = ["res4"]

model.proposal_generator.update(
    in_features=["res4"], pre_nms_topk=(12000, 6000), post_nms_topk=(2000, 1000)
)
model.proposal_generator.head.update(in_channels=1024, num_anchors=15)
model.proposal_generator.anchor_generator.update(sizes=[[32, 64, 128, 256, 512]], strides=[16])

model.roi_heads = L(Res5ROIHeads)(
    num_classes=80,
    batch_size_per_image=512,
    positive_fraction=0.25,
    proposal_matcher=model.roi_heads.proposal_matcher,
    in_features=["res4"],
    pooler=L(ROIPooler)(
        output_size=14, scales=[1 / 16], sampling_ratio=0, pooler_type="ROIAlignV2"
    ),
    res5=L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=3,
        stride_per_block=[2, 1, 1],
        in_channels=1024,
        bottleneck_channels=512,
        out_channels=2048,
        stride_in_1x1=False,
        norm=L(GroupNormFactory)(num_groups=32),
    ),
    box_predictor=model.roi_heads.box_predictor,
    mask_head=L(GNMaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels=2048, height=14, width=14),
        num_classes="${..num_classes}",
        conv_dims=[256],  # the deconvolution alone
    ),
)
model.roi_heads.box_predictor.input_shape = L(ShapeSpec)(channels=2048, height=1, width=1)
