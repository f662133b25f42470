from ..common.coco_boxes import dataloader
from ..common.models.faster_rcnn_fpn import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import train

train.init_checkpoint = "catalog://ImageNetPretrained/FAIR/R-50-GN"
train.max_iter = lr_multiplier.scheduler.num_updates
