from ..common.frozen_bn import freeze_batch_norm
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

freeze_batch_norm(model, train)
