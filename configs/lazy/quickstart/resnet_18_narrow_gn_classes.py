"""The classification of resnet_18_gn_classes.py with a ResNet-18 of a quarter of the width and 4
groups on images of half the size, small enough to compare norms with (tools/compare_norms.py).
model.stem.norm is that of all layers. The last stage has one position: there BN normalizes as many
values as a pass has images."""

import os

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

from .resnet_18_gn_classes import dataloader, lr_multiplier, model, optimizer, train

model.stem.norm = model.stages.norm
model.stem.norm.num_groups = 4
model.stem.out_channels = 16
model.stages = [
    L(ResNet.make_stage)(
        block_class=BasicBlock,
        num_blocks=2,
        stride_per_block=[1 if out_channels == 16 else 2, 1],
        in_channels=in_channels,
        out_channels=out_channels,
        norm="${model.stem.norm}",
    )
    for in_channels, out_channels in ((16, 16), (16, 32), (32, 64), (64, 128))
]
_root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "small_classes")
for split, loader in (("train", dataloader.train), ("val", dataloader.test)):
    loader.dataset.update(root=f"{_root}/{split}", image_size=32, radii=[0.32, 0.42])
    loader.dataset.update(clutter=1, noise=1)
    for augmentation in loader.mapper.augmentations:
        if "size" in augmentation:
            augmentation.size = 32
optimizer.lr = 0.1
