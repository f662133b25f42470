from ..common.base import load
from ..common.coco import coco
from ..common.gn import with_gn
from ..common.train import R_50_GN, train

model = with_gn(load("models/keypoint_rcnn_fpn.py", "model"))
dataloader = coco("coco_keypoint")
optimizer = load("optim.py", "SGD")
lr_multiplier = load("coco_schedule.py", "lr_multiplier_3x")
train.init_checkpoint = R_50_GN
train.max_iter = 270000
