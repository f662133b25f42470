from ..common.models.resnetv2 import preactivate
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

preactivate(
    model,
    dataloader,
    train,
    weights="resnetv2_50x1_bit.goog_in21k_ft_in1k",
    depth=50,
    weight_standardization="timm",
)
