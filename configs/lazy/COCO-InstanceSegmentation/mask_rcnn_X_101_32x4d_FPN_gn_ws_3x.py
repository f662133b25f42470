from ..common.schedule import lr_multiplier_3x as lr_multiplier
from .mask_rcnn_X_101_32x4d_FPN_gn_ws_2x import dataloader, model, optimizer, train

train.max_iter = lr_multiplier.scheduler.num_updates
