"""ResNet-18 with GN on ImageNet, by the recipe of the GN paper (../common/imagenet.py)."""

from ..common.imagenet import dataloader, lr_multiplier, optimizer, resnet, train

model = resnet(18)
