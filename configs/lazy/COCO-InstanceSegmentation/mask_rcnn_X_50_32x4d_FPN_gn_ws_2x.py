from ..common.models.resnext import resnext_stages
from .mask_rcnn_R_50_FPN_gn_ws_2x import dataloader, lr_multiplier, model, optimizer, train

# Needs the backbone of X-50-GN-WS.pth.tar (see common/ws.py)
model.backbone.bottom_up.stages = resnext_stages([3, 4, 6, 3])
