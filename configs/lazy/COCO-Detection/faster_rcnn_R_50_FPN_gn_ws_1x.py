from ..common.ws import standardize_weights
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, model, optimizer, train

# Needs the backbone of R-50-GN-WS.pth.tar (see common/ws.py)
standardize_weights(model, dataloader, train)
