from ..common.frozen_bn import freeze_batch_norm
from ..common.schedule import lr_multiplier_2x as lr_multiplier
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, model, optimizer, train

freeze_batch_norm(model, train)
train.max_iter = lr_multiplier.scheduler.num_updates
