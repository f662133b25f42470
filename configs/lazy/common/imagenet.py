"""ImageNet, or any other folder of images by class, as in the GN paper (Wu and He, ECCV 2018,
section 4.1): 100 epochs of 256 images per iteration, rate 0.1, a tenth of it from the epochs 30, 60
and 90 on; the last gamma of each block starts at 0; weight decay on all parameters, gamma and beta
as well. Crops and flips are those of Goyal et al. (https://arxiv.org/abs/1706.02677, section 5.1),
the warm-up that of Detectron2's configs/Misc/torchvision_imagenet_R_50.py."""

import os

import torchvision.transforms.v2 as T
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from gn_detect.data.image_folder import ClassificationMapper, read_image_folder
from gn_detect.data.loader import resumable_train_loader
from gn_detect.evaluation.classification import ClassificationEvaluator
from gn_detect.modeling import GroupNormFactory, ResNetClassifier, build_detector

from .base import load
from .train import train

IMAGES = 1_281_167  # of ImageNet
_ROOT = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "imagenet")

dataloader = dict(
    train=L(resumable_train_loader)(
        dataset=L(read_image_folder)(root=f"{_ROOT}/train"),
        mapper=L(ClassificationMapper)(
            augmentations=[L(T.RandomResizedCrop)(size=224), L(T.RandomHorizontalFlip)()],
            image_format="${model.input_format}",
        ),
        total_batch_size=256,
        aspect_ratio_grouping=False,
        num_workers=8,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(read_image_folder)(root=f"{_ROOT}/val"),
        mapper=L(ClassificationMapper)(
            augmentations=[L(T.Resize)(size=256), L(T.CenterCrop)(size=224)],
            image_format="${model.input_format}",
        ),
        batch_size=32,
        num_workers=8,
    ),
    evaluator=L(ClassificationEvaluator)(),
)

optimizer = load("optim.py", "SGD")
optimizer.params.weight_decay_norm = None  # as of the others
optimizer.lr = 0.1
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01, 0.001], milestones=[30, 60, 90], num_updates=100
    ),
    warmup_factor=0.1,
    warmup_length=1 / 100,
)

train.reference_batch_size = 256
train.epochs = 100  # of the folder
train.warmup_epochs = train.eval_epochs = 1
train.max_iter = train.epochs * IMAGES // train.reference_batch_size  # of ImageNet
train.checkpointer.update(period=IMAGES // train.reference_batch_size, max_to_keep=3)
train.best_metric = "classification/top1_error"


def resnet(depth, norm=None, weight_standardization=""):
    """``norm``: of all layers, as Detectron2 takes it; GN with 32 groups if None."""
    stride = dict(stride_in_1x1=False) if depth >= 50 else {}  # of bottleneck blocks
    return L(build_detector)(
        meta_arch=ResNetClassifier,
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="${..stages.norm}"),
        stages=L(ResNet.make_default_stages)(
            depth=depth, norm=norm or L(GroupNormFactory)(num_groups=32), **stride
        ),
        num_classes=None,  # those of the folder
        input_format="BGR",  # with ImageNet's mean and deviation
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[57.375, 57.120, 58.395],
        zero_init=True,
        label_smoothing=0.0,
        mix=None,
        weight_standardization=weight_standardization,
        memory="fast",
        channels_last=False,
    )
