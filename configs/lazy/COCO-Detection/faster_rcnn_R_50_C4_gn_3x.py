from ..common.schedule import lr_multiplier_3x as lr_multiplier
from .faster_rcnn_R_50_C4_gn_1x import dataloader, model, optimizer, train

train.max_iter = lr_multiplier.scheduler.num_updates
