from ..common.models.retinanet_fpn import model
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, optimizer, train

optimizer.lr = 0.01  # of the RetinaNet paper, section 4.1
