from .mask_rcnn_R_50_FPN_gn_2x import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-101-GN"
model.backbone.bottom_up.stages.depth = 101
