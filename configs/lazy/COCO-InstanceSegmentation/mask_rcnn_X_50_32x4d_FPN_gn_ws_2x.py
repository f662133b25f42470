"""ResNeXt 32x4d (Xie et al., CVPR 2017, table 1) with GN and Weight Standardization (Qiao et al.,
2019), fine-tuned from its authors' ImageNet weights."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BottleneckBlock

from ..common.coco import use_rgb
from ..common.gn import GN
from .mask_rcnn_R_50_FPN_gn_3x import dataloader, lr_multiplier, model, optimizer, train

train.init_checkpoint = "http://cs.jhu.edu/~syqiao/WeightStandardization/X-50-GN-WS.pth.tar"
use_rgb(model, dataloader, mean=[123.675, 116.280, 103.530], std=[58.395, 57.120, 57.375])
model.weight_standardization = "authors"
model.backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=num_blocks,
        stride_per_block=[2 if stage else 1] + [1] * (num_blocks - 1),
        in_channels=128 * 2**stage if stage else 64,
        bottleneck_channels=128 * 2**stage,  # 32 groups of 4, 8, 16, 32 channels
        out_channels=256 * 2**stage,
        num_groups=32,
        stride_in_1x1=False,
        norm=GN,
    )
    for stage, num_blocks in enumerate([3, 4, 6, 3])
]
# The authors' 360000 iterations of 8 images with drops at 300000 and 340000, for 16 images
train.max_iter = 180000
lr_multiplier.warmup_length = 1000 / train.max_iter
lr_multiplier.scheduler.milestones = [150000, 170000, 180000]
