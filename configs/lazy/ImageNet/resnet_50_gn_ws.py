"""ResNet-50 with GN and Weight Standardization (Qiao et al., https://arxiv.org/abs/1903.10520) on
ImageNet, by the recipe of the GN paper (../common/imagenet.py)."""

from ..common.imagenet import dataloader, lr_multiplier, optimizer, resnet, train

model = resnet(50, weight_standardization="authors")
