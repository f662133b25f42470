from ..common.coco import dataloader
from ..common.models.mask_rcnn_c4 import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_2x as lr_multiplier
from ..common.train import train

train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-50-GN"
train.max_iter = lr_multiplier.scheduler.num_updates
