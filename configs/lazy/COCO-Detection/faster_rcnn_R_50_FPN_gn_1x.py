from ..common.base import load
from ..common.coco import coco
from ..common.gn import with_gn
from ..common.train import R_50_GN, train

model = with_gn(load("models/mask_rcnn_fpn.py", "model"))
for _key in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[_key]
dataloader = coco(masks=False)
optimizer = load("optim.py", "SGD")
lr_multiplier = load("coco_schedule.py", "lr_multiplier_1x")
train.init_checkpoint = R_50_GN
train.max_iter = 90000
