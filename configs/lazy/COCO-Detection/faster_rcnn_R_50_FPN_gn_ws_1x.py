from ..common.ws import standardize_weights
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, model, optimizer, train

standardize_weights(model, dataloader, train)
