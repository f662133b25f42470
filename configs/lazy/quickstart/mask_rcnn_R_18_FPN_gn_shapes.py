"""The demo: a small Mask R-CNN on the generated dataset of gn_detect/data/shapes.py, from scratch.
1800 iterations x 2 images / 600 = 6 epochs."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from gn_detect.modeling import GroupNormFactory

from ..common.base import load
from ..common.coco import coco
from ..common.gn import with_gn
from ..common.train import train

train.max_iter = 1800
train.eval_period = 600
train.checkpointer.period = 500
train.seed = 0
train.reference_batch_size = 2
# The demo is 600 generated images, from scratch, and its rate is measured on such models.
train.guards = dict(few_images=False, learning_rate=False)
optimizer = load("optim.py", "SGD")
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=100 / train.max_iter,
)

dataloader = coco()
dataloader.train.update(total_batch_size=2, num_workers=1)
dataloader.train.dataset.names = "shapes_train"
dataloader.train.mapper.instance_mask_format = "bitmask"  # its masks are RLE
dataloader.test.num_workers = 1
dataloader.test.dataset.names = "shapes_val"
dataloader.train.mapper.augmentations[0].short_edge_length = [128]
dataloader.test.mapper.augmentations[0].short_edge_length = 128

_gn = L(GroupNormFactory)(num_groups=16)  # most layers have 64 channels
model = with_gn(load("models/mask_rcnn_fpn.py", "model"))
model.pixel_std = [57.375, 57.120, 58.395]
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = _gn
model.backbone.bottom_up.stages = L(ResNet.make_default_stages)(depth=18, norm=_gn)
model.backbone.update(out_channels=64, norm=_gn)
model.proposal_generator.update(
    pre_nms_topk=(500, 300), post_nms_topk=(250, 200), batch_size_per_image=128
)
model.proposal_generator.head.in_channels = 64
model.proposal_generator.anchor_generator.sizes = [[16], [32], [64], [128], [256]]
model.roi_heads.update(num_classes=3, batch_size_per_image=64)
model.roi_heads.box_head.update(conv_dims=[64] * 4, fc_dims=[256], conv_norm=_gn)
model.roi_heads.mask_head.update(conv_dims=[64] * 5, conv_norm=_gn, masks_per_image=64 // 4)
for _head in (model.roi_heads.box_head, model.roi_heads.mask_head):
    _head.input_shape.channels = 64
model.roi_heads.box_predictor.input_shape.channels = 256
