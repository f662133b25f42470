"""COCO 2017 boxes."""

from .coco import dataloader

dataloader.train.mapper.use_instance_mask = False
