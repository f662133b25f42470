from ..common.models.cascade_mask_rcnn_fpn import model
from .scratch_mask_rcnn_R_101_FPN_gn_9x import dataloader, lr_multiplier, optimizer, train

model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stages.depth = 101
model.pixel_std = [57.375, 57.120, 58.395]  # as Detectron2 at 9x
