from ..common.schedule import lr_multiplier_1x as lr_multiplier
from .panoptic_fpn_R_50_gn_3x import dataloader, model, optimizer, train

train.max_iter = lr_multiplier.scheduler.num_updates
