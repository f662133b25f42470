from ..common.models.resnext import resnext_stages
from ..common.ws import standardize_weights
from .keypoint_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

standardize_weights(model, dataloader, train, backbone="X-101")
model.backbone.bottom_up.stages = resnext_stages([3, 4, 23, 3])
