from ..common.schedule import lr_multiplier_9x as lr_multiplier
from .scratch_mask_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

train.max_iter = lr_multiplier.scheduler.num_updates
model.pixel_std = [57.375, 57.120, 58.395]  # as Detectron2 at 9x
