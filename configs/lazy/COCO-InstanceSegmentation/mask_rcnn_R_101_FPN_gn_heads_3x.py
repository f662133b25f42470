from .mask_rcnn_R_50_FPN_gn_heads_3x import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
model.backbone.bottom_up.stages.depth = 101
