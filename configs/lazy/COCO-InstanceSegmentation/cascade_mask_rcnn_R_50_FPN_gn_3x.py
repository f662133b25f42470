from ..common.models.cascade_mask_rcnn_fpn import model
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, optimizer, train
