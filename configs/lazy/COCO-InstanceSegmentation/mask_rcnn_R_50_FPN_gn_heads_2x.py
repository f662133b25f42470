"""GN in FPN and heads alone, on a backbone of frozen BN (GN paper, table 5)."""

from ..common.base import load
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
bottom_up = model.backbone.bottom_up
bottom_up.stem.norm = bottom_up.stages.norm = "FrozenBN"
bottom_up.stages.stride_in_1x1 = True  # as these weights were trained
lr_multiplier = load("coco_schedule.py", "lr_multiplier_2x")
train.max_iter = 180000
