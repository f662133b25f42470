from ..common.base import load
from ..common.gn import with_gn
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, optimizer, train

model = with_gn(load("models/cascade_rcnn.py", "model"))
model.proposal_generator.post_nms_topk = (2000, 1000)
