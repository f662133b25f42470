from ..common.schedule import lr_multiplier_2x as lr_multiplier
from .keypoint_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

train.max_iter = lr_multiplier.scheduler.num_updates
