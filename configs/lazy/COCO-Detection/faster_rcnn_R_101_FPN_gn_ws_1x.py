from ..common.ws import start_from
from .faster_rcnn_R_50_FPN_gn_ws_1x import dataloader, lr_multiplier, model, optimizer, train

start_from(train, "R-101")
model.backbone.bottom_up.stages.depth = 101
