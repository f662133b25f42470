"""ResNet-50 with GN on ImageNet, by torchvision's present recipe: 600 epochs of 1024 images per
iteration with TrivialAugment, random erasing, MixUp, CutMix, label smoothing, no weight decay of
norms, and EMA; trained at 176 pixels, evaluated at 224 (https://pytorch.org/blog/
how-to-train-state-of-the-art-models-using-torchvision-latest-primitives; references/classification
in pytorch/vision, ResNet50_Weights.IMAGENET1K_V2: 80.9 % top-1 with BN). Left out: its repeated
augmentation of an image."""

import torchvision.transforms.v2 as T
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ..common.imagenet import IMAGES, dataloader, optimizer, resnet, train

model = resnet(50)
model.label_smoothing = 0.1
_classes = "${model.num_classes}"
model.mix = L(T.RandomChoice)(
    transforms=[
        L(T.MixUp)(alpha=0.2, num_classes=_classes),
        L(T.CutMix)(alpha=1.0, num_classes=_classes),
    ]
)

dataloader.train.total_batch_size = 1024
dataloader.train.mapper.augmentations = [
    L(T.RandomResizedCrop)(size=176),
    L(T.RandomHorizontalFlip)(),
    L(T.TrivialAugmentWide)(),
    L(T.RandomErasing)(p=0.1, value=114),  # about the mean
]
dataloader.test.mapper.augmentations[0].size = 232

optimizer.lr = 0.5
optimizer.weight_decay = 2e-5
optimizer.params.weight_decay_norm = 0.0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.01,
    warmup_length=5 / 600,
)

train.reference_batch_size = 1024
train.epochs, train.warmup_epochs = 600, 5
train.max_iter = train.epochs * IMAGES // train.reference_batch_size
train.checkpointer.period = IMAGES // train.reference_batch_size
# 0.99998 there, at every 32nd step, for 8 GPUs, 128 images of each and 600 epochs.
train.ema = dict(enabled=True, decay=1 - (1 - 0.99998) * 8 * 128 / 600)
