"""ResNet-50 with BN on ImageNet, by the recipe of the GN paper (../common/imagenet.py). Its
statistics are of the images that a GPU has in a forward pass."""

from ..common.imagenet import dataloader, lr_multiplier, optimizer, resnet, train

model = resnet(50, norm="BN")
