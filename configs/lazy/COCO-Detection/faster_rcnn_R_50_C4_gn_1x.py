from ..common.models.faster_rcnn_c4 import model
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, optimizer, train
