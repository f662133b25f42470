"""GN in the backbone and in res5, which is the head of the RoIs (GN paper, table 4)."""

from ..common.base import load
from ..common.gn import with_gn
from .faster_rcnn_R_50_FPN_gn_1x import dataloader, lr_multiplier, optimizer, train

model = with_gn(load("models/mask_rcnn_c4.py", "model"))
del model.roi_heads.mask_head
