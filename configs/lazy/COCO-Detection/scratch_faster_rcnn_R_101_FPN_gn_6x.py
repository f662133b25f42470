from .scratch_faster_rcnn_R_50_FPN_gn_6x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
