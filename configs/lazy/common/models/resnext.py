"""The stages of ResNeXt 32x4d (Xie et al., CVPR 2017, table 1) with GN."""

from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BottleneckBlock

from gn_detect.modeling import GroupNormFactory


def resnext_stages(blocks):
    """``blocks``: the number of residual blocks of each stage, from res2 to res5."""
    return [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=num_blocks,
            stride_per_block=[1 if stage == 0 else 2] + [1] * (num_blocks - 1),
            in_channels=64 if stage == 0 else 128 * 2**stage,
            bottleneck_channels=128 * 2**stage,  # 32 groups of 4, 8, 16, 32 channels
            out_channels=256 * 2**stage,
            num_groups=32,
            stride_in_1x1=False,
            norm=L(GroupNormFactory)(num_groups=32),
        )
        for stage, num_blocks in enumerate(blocks)
    ]
