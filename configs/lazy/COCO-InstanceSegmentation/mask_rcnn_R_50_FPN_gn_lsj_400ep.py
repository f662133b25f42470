from ..common.schedule import multi_step
from .mask_rcnn_R_50_FPN_gn_lsj_100ep import dataloader, model, optimizer, train

train.max_iter = 737500  # 4 x 100 epochs
lr_multiplier = multi_step(train.max_iter, [655556, 710184], warmup_iters=500, warmup_factor=0.067)
