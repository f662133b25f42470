from ..common.frozen_bn import freeze_batch_norm
from ..common.models.cascade_mask_rcnn_fpn import model
from .mask_rcnn_R_50_FPN_gn_heads_2x import dataloader, lr_multiplier, optimizer, train

freeze_batch_norm(model, train)
