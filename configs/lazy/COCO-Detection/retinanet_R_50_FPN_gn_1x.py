from ..common.base import load
from ..common.gn import with_gn
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, optimizer, train

model = with_gn(load("models/retinanet.py", "model"))
optimizer.lr = 0.01  # of the RetinaNet paper, section 4.1
