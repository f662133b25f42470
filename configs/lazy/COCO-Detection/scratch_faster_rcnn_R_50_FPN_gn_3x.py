from .faster_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

# No weights, so nothing may be frozen
train.init_checkpoint = ""
model.backbone.bottom_up.freeze_at = 0
