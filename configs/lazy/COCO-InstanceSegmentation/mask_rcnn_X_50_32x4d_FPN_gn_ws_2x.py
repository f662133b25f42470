from ..common.models.resnext import resnext_stages
from ..common.ws import start_from
from .mask_rcnn_R_50_FPN_gn_ws_2x import dataloader, lr_multiplier, model, optimizer, train

start_from(train, "X-50")
model.backbone.bottom_up.stages = resnext_stages([3, 4, 6, 3])
