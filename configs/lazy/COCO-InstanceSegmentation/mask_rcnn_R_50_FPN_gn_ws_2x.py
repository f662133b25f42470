from ..common.schedule import multi_step
from ..common.ws import standardize_weights
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

standardize_weights(model, dataloader, train)

# The authors' 360000 iterations of 8 images with drops at 300000 and 340000, for 16 images
lr_multiplier = multi_step(180000, [150000, 170000])
train.max_iter = lr_multiplier.scheduler.num_updates
