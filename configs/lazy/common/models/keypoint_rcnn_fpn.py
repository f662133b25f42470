"""Keypoint R-CNN (Mask R-CNN paper, section 5) with FPN and GN; the keypoint head has
no norm, as published."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from gn_detect.modeling import GNKRCNNConvDeconvUpsampleHead

from .mask_rcnn_fpn import model

model.roi_heads.num_classes = 1  # person
model.roi_heads.keypoint_in_features = model.roi_heads.pop("mask_in_features")
model.roi_heads.keypoint_pooler = model.roi_heads.pop("mask_pooler")
del model.roi_heads.mask_head
model.roi_heads.keypoint_head = L(GNKRCNNConvDeconvUpsampleHead)(
    input_shape=L(ShapeSpec)(channels="${....backbone.out_channels}", height=14, width=14),
    num_keypoints=17,
    conv_dims=[512] * 8,
    loss_normalizer="visible",
)

# As in Detectron2's Base-Keypoint-RCNN-FPN.yaml, which gives the reasons.
model.proposal_generator.post_nms_topk = (1500, 1000)
model.roi_heads.box_predictor.smooth_l1_beta = 0.5
