from .mask_rcnn_R_50_FPN_gn_ws_2x import dataloader, lr_multiplier, model, optimizer, train

# Needs the backbone of R-101-GN-WS.pth.tar (see common/ws.py)
model.backbone.bottom_up.stages.depth = 101
