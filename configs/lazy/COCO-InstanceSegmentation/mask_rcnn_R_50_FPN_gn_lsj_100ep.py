"""From scratch with large-scale jitter (Ghiasi et al., CVPR 2021): Detectron2's
new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ, with GN in place of SyncBN. 184375 iterations of 64
images are 100 epochs of 118000."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from .scratch_mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

train.max_iter = 184375
train.amp.enabled = True
lr_multiplier.warmup_length = 500 / train.max_iter
lr_multiplier.warmup_factor = 0.067
lr_multiplier.scheduler.milestones = [163889, 177546, train.max_iter]
optimizer.lr = 0.1
optimizer.weight_decay = 4e-5
model.proposal_generator.head.conv_dims = [-1, -1]

dataloader.train.total_batch_size = train.reference_batch_size = 64
dataloader.train.mapper.update(
    augmentations=[
        L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
        L(T.FixedSizeCrop)(crop_size=(1024, 1024)),
        L(T.RandomFlip)(),
    ],
    # Where an object is cut, its box must be found again, from the mask as a bitmap.
    instance_mask_format="bitmask",
    recompute_boxes=True,
)
