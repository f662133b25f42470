"""A small classification: ResNet-18 with GN on generated images of ten classes
(gn_detect/data/classes.py), from scratch: 10 epochs of 5000 images, 32 per iteration."""

import os

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler

from gn_detect.data.classes import read_classes

from ..common.imagenet import dataloader, lr_multiplier, optimizer, resnet, train

model = resnet(18)
model.stages.norm.num_groups = 16  # as in the demo of detection

_root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "classes")
dataloader.train.update(total_batch_size=32, num_workers=1)
dataloader.train.dataset = L(read_classes)(root=f"{_root}/train")
dataloader.train.mapper.augmentations[0].update(size=64, scale=[0.7, 1.0])
dataloader.test.num_workers = 1
dataloader.test.dataset = L(read_classes)(root=f"{_root}/val")
dataloader.test.mapper.augmentations[0].size = 64
dataloader.test.mapper.augmentations[1].size = 64

optimizer.lr = 0.05
lr_multiplier.scheduler = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)

train.seed = 0
train.reference_batch_size = 32
train.epochs = 10
train.eval_epochs = 5
train.max_iter = 1562
train.checkpointer.period = 500
