from ..common.schedule import multi_step
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, model, optimizer, train

# Needs the backbone of R-50-GN-WS.pth.tar (github.com/joe-siyuan-qiao/WeightStandardization),
# converted to Detectron2's names: train.init_checkpoint=FILE. Without it, training is refused.
train.init_checkpoint = ""
model.weight_standardization = "authors"
# As these weights were trained: RGB, and torchvision's mean and deviation
model.input_format = dataloader.train.mapper.image_format = "RGB"
model.pixel_mean, model.pixel_std = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]

# The authors' 360000 iterations of 8 images with drops at 300000 and 340000, for 16 images
lr_multiplier = multi_step(180000, [150000, 170000])
train.max_iter = lr_multiplier.scheduler.num_updates
