"""Pre-activation ResNet ("ResNetV2"; He et al., ECCV 2016, https://arxiv.org/abs/1603.05027).

Either that of Big Transfer (BiT; Kolesnikov et al., ECCV 2020, https://arxiv.org/abs/1912.11370),
or with the stem and the shortcuts of ResNet-D (He et al., CVPR 2019,
https://arxiv.org/abs/1812.01187), of which timm has weights with GN (resnetv2_50d_gn).

Norm and ReLU come before each convolution, so what a stage puts out is a sum that nothing has
normalized. An FPN takes it as it is, as users of timm's ``features_only`` and of ``BitBackbone`` of
Hugging Face's transformers do; the GN of its lateral convolutions (``MODEL.FPN.NORM``) brings it to
scale. The norm behind res5 belongs to the classifier: there is none here.
"""

from __future__ import annotations

import functools

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from gn_detect.config import ConfigError, locate
from gn_detect.layers.padding import per_image

from .blocks import Block, GNConv2d, in_memory_mode, norm_act
from .norm import (
    GroupNormFactory,
    finish_from_config,
    finish_norms,
    norm_from_config,
)

_NUM_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# The eps of BiT in timm (StdConv2d(eps=1e-8)); its StdConv2d alone has 1e-6.
_WS_EPS = {"timm": 1e-8}
# Where Detectron2's ResNet has more than this one.
_SUPPORTED = {
    "MODEL.RESNETS.DEPTH": list(_NUM_BLOCKS),
    "MODEL.RESNETS.NUM_GROUPS": [1],
    "MODEL.RESNETS.STRIDE_IN_1X1": [False],
    "MODEL.RESNETS.RES5_DILATION": [1],
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [[False] * 4],
    "MODEL.RESNETV2.VARIANT": ["BiT", "D"],
    # The ReLU behind a gamma and a beta of 0 passes no gradient: they would stay 0.
    "MODEL.GN.ZERO_INIT_RESIDUAL": [False],
}


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> GNConv2d:
    conv = GNConv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    conv.eps_of_variant = _WS_EPS
    weight_init.c2_msra_fill(conv)
    return conv


# Not in place: without a norm, it would change the input of the block.
_norm_relu = functools.partial(norm_act, activation=F.relu)


class BiTStem(CNNBlockBase):
    """A 7x7 convolution and a max pooling, each of stride 2, without a norm. The pooling sees zeros
    around the map, which count where all values at the border are negative."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64):
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _conv(in_channels, out_channels, 7, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, about H/4, about W/4)."""
        return F.max_pool2d(F.pad(self.conv1(x), (1, 1, 1, 1)), kernel_size=3, stride=2)


class DeepStem(Block, CNNBlockBase):
    """The stem of ResNet-D: three 3x3 convolutions, the first with stride 2, and a max pooling. The
    norm of the last is that of the first block.

    Attributes:
        mask_padding: of ``finish_norms``.

    Args:
        norm: as ``get_norm`` takes it.
    """

    mask_padding = False

    def __init__(
        self, in_channels: int = 3, out_channels: int = 64, *, norm: GroupNormFactory | str
    ):
        super().__init__(in_channels, out_channels, 4)
        width = out_channels // 2
        self.conv1 = _conv(in_channels, width, 3, 2)
        self.norm1 = get_norm(norm, width)
        self.conv2 = _conv(width, width, 3)
        self.norm2 = get_norm(norm, width)
        self.conv3 = _conv(width, out_channels, 3)

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, about H/4, about W/4)."""
        x = self.conv2(_norm_relu(self.norm1, self.conv1(x)))
        x = self.conv3(_norm_relu(self.norm2, x))
        pool = functools.partial(F.max_pool2d, kernel_size=3, stride=2, padding=1)
        # No norm, no ReLU: the zeros of the padding may be the largest.
        return per_image(pool, x, lambda size: (size + 1) // 2) if self.mask_padding else pool(x)


class PreActBottleneckBlock(Block, CNNBlockBase):
    """Norm, ReLU and convolution, of 1x1, 3x3 and 1x1, and the sum with the shortcut. The 3x3
    strides; a shortcut with a convolution starts behind the first norm and ReLU.

    Args:
        bottleneck_channels: of the 3x3 convolution.
        norm: as ``get_norm`` takes it.
        avg_down: the shortcut takes the mean of 2x2 positions and then a convolution of stride 1
            (ResNet-D), in place of a convolution of stride 2.
    """

    pre_activation = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm: GroupNormFactory | str,
        avg_down: bool = False,
    ):
        super().__init__(in_channels, out_channels, stride)
        self.avg_down = avg_down and stride > 1
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, 1 if self.avg_down else stride)
        self.norm1 = get_norm(norm, in_channels)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1)
        self.norm2 = get_norm(norm, bottleneck_channels)
        self.conv2 = _conv(bottleneck_channels, bottleneck_channels, 3, stride)
        self.norm3 = get_norm(norm, bottleneck_channels)
        self.conv3 = _conv(bottleneck_channels, out_channels, 1)

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, ceil(H/stride), ceil(W/stride))."""
        out = _norm_relu(self.norm1, x)
        if self.shortcut is not None:
            x = out
            if self.avg_down:  # at an odd border, the mean of the positions that there are
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = self.shortcut(x)
        out = self.conv2(_norm_relu(self.norm2, self.conv1(out)))
        return self.conv3(_norm_relu(self.norm3, out)) + x


@BACKBONE_REGISTRY.register()
def build_gn_resnetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ``ResNet`` of the blocks above. Depth, widths, norm and outputs are those of
    ``MODEL.RESNETS``; for BiT of w times the width, multiply ``STEM_OUT_CHANNELS``,
    ``WIDTH_PER_GROUP`` and ``RES2_OUT_CHANNELS`` by w. Weight Standardization
    (``MODEL.GN.WEIGHT_STANDARDIZATION``) is that of every convolution. Not for C4 models: the res5
    of their heads is that of the ResNet of 2015.

    Raises:
        ConfigError: a key has a value that this ResNet does not support, or the groups do not
            divide a layer's channels.
    """
    backbone = _build_resnetv2(cfg, input_shape)
    finish_norms(backbone, "backbone", **finish_from_config(cfg))
    return backbone


@BACKBONE_REGISTRY.register()
def build_gn_resnetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The above with an FPN, as Detectron2's ``build_resnet_fpn_backbone``."""
    backbone = FPN(
        bottom_up=_build_resnetv2(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=norm_from_config(cfg, "MODEL.FPN.NORM"),
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    finish_norms(backbone, "backbone", **finish_from_config(cfg))
    return backbone


def _build_resnetv2(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    for key, supported in _SUPPORTED.items():
        node, name = locate(cfg, key)
        if node[name] not in supported:
            raise ConfigError(
                f"{key} is {node[name]!r}; the pre-activation ResNet supports "
                f"{' or '.join(map(repr, supported))}"
            )
    resnets = cfg.MODEL.RESNETS
    deep = cfg.MODEL.RESNETV2.VARIANT == "D"
    norm = norm_from_config(cfg, "MODEL.RESNETS.NORM")
    channels = input_shape.channels, resnets.STEM_OUT_CHANNELS
    stem = DeepStem(*channels, norm=norm) if deep else BiTStem(*channels)
    stages, in_channels = [], resnets.STEM_OUT_CHANNELS
    for index, num_blocks in enumerate(_NUM_BLOCKS[resnets.DEPTH]):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**index
        stage = ResNet.make_stage(
            PreActBottleneckBlock,
            num_blocks,
            in_channels=in_channels,
            out_channels=out_channels,
            bottleneck_channels=resnets.WIDTH_PER_GROUP * 2**index,
            stride_per_block=[2 if index else 1] + [1] * (num_blocks - 1),
            norm=norm,
            avg_down=deep,
        )
        stages.append(stage)
        in_channels = out_channels
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=freeze_at)
