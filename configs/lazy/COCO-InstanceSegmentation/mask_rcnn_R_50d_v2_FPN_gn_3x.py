"""On a pre-activation ResNet-50-D with GN, of which timm has ImageNet weights."""

from detectron2.config import LazyCall as L

from gn_detect.modeling.resnetv2 import DeepStem, PreActBottleneckBlock

from ..common.coco import use_rgb
from ..common.gn import GN
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "timm://resnetv2_50d_gn.ah_in1k"
use_rgb(model, dataloader, mean=[127.5] * 3, std=[127.5] * 3)
model.backbone.bottom_up.stem = L(DeepStem)(norm=GN)
model.backbone.bottom_up.stages.update(block_class=PreActBottleneckBlock, avg_down=True)
del model.backbone.bottom_up.stages.stride_in_1x1
