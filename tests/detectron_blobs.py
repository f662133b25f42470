"""Names and shapes of the blobs of Detectron's networks with GN (its detectron/modeling: ResNet.py,
FPN.py, fast_rcnn_heads.py, mask_rcnn_heads.py)."""

import numpy as np
import torch

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Blobs(dict):
    """Arrays by the names that Detectron's functions give them.

    Args:
        width: of the stem; the stages follow from it.
        dim: of FPN and heads.
        fc: of the fully connected layer of the box head.
    """

    def __init__(self, depth=50, width=64, dim=256, fc=1024, classes=80):
        self._rng = np.random.default_rng(0)
        self._blocks, self._width = BLOCKS[depth], width
        self._dim, self._fc, self._classes = dim, fc, classes

    def add(self, name, *shape, scale=None):
        scale = scale or (1 / np.prod(shape[1:])) ** 0.5
        self[name] = self._rng.normal(0, scale, shape).astype(np.float32)

    def conv_gn(self, name, out, dim_in, k):  # model.ConvGN: no bias
        self.add(f"{name}_w", out, dim_in, k, k)
        self.add(f"{name}_gn_s", out, scale=1)
        self.add(f"{name}_gn_b", out, scale=0.1)

    def conv(self, name, *shape):
        self.add(f"{name}_w", *shape)
        self.add(f"{name}_b", shape[0], scale=0.1)

    def resnet(self):
        self.conv_gn("conv1", self._width, 3, 7)
        dim_in = self._width
        for stage, blocks in enumerate(self._blocks, 2):
            inner, out = (n * self._width * 2 ** (stage - 2) for n in (1, 4))
            for block in range(blocks):
                name = f"res{stage}_{block}_branch"
                self.conv_gn(f"{name}2a", inner, dim_in, 1)
                self.conv_gn(f"{name}2b", inner, inner, 3)
                self.conv_gn(f"{name}2c", out, inner, 1)
                if block == 0:
                    self.conv_gn(f"{name}1", out, dim_in, 1)
                dim_in = out

    def heads(self):
        """FPN, RPN, box head and mask head."""
        dim, last = self._dim, {s: f"res{s}_{n - 1}" for s, n in enumerate(self._blocks, 2)}
        self.conv_gn(f"fpn_inner_{last[5]}_sum", dim, 32 * self._width, 1)
        for stage in (4, 3, 2):
            name = f"fpn_inner_{last[stage]}_sum_lateral"
            self.conv_gn(name, dim, 2**stage * self._width, 1)
        for stage in (5, 4, 3, 2):
            self.conv_gn(f"fpn_{last[stage]}_sum", dim, dim, 3)
        self.conv("conv_rpn_fpn2", dim, dim, 3, 3)
        self.conv("rpn_cls_logits_fpn2", 3, dim, 1, 1)
        self.conv("rpn_bbox_pred_fpn2", 12, dim, 1, 1)
        for i in range(4):
            self.conv_gn(f"head_conv{i + 1}", dim, dim, 3)
            self.conv_gn(f"_mask_fcn{i + 1}", dim, dim, 3)
        self.conv("fc6", self._fc, dim * 7 * 7)
        self.conv("cls_score", self._classes + 1, self._fc)
        self.conv("bbox_pred", (self._classes + 1) * 4, self._fc)
        self.conv("conv5_mask", dim, dim, 2, 2)
        self.conv("mask_fcn_logits", self._classes + 1, dim, 1, 1)


class Shapes(Blobs):
    """``Blobs`` without values."""

    def add(self, name, *shape, scale=None):
        self[name] = torch.empty(shape, device="meta")
