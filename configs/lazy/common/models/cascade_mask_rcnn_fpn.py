"""Cascade Mask R-CNN (Cai & Vasconcelos, CVPR 2018) with FPN and GN: three 4conv1fc box heads."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers

from .mask_rcnn_fpn import model

model.proposal_generator.post_nms_topk = (2000, 1000)

_box_head = model.roi_heads.pop("box_head")
_box_head.input_shape.channels = "${.....backbone.out_channels}"  # one level deeper, in a list
del model.roi_heads.box_predictor, model.roi_heads.proposal_matcher
model.roi_heads.update(
    _target_=CascadeROIHeads,
    box_heads=[_box_head] * 3,
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${....box_heads[0].fc_dims[0]}"),
            box2box_transform=L(Box2BoxTransform)(weights=(w, w, w / 2, w / 2)),
            num_classes="${...num_classes}",
            cls_agnostic_bbox_reg=True,
            test_score_thresh=0.05,
        )
        for w in (10.0, 20.0, 30.0)
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
        for iou in (0.5, 0.6, 0.7)
    ],
)
