"""What maskrcnn-benchmark names and computes, written from its source, files of which are named
here: the networks are those of mmdetection 1 but for anchors and RoIAlign."""

import re

import torch
from mmdetection_reference import Reference
from torchvision.ops import roi_align

# mmdetection 1 -> maskrcnn_benchmark/modeling: backbone/resnet.py and fpn.py, make_layers.py,
# rpn/rpn.py, roi_heads/box_head and mask_head; i3 is 3 times the number of a convolution.
_NAMES = {
    r"backbone\.(conv|gn|bn)1\.": "backbone.body.stem.{0}1.",
    r"backbone\.(layer.*)": "backbone.body.{0}",
    r"neck\.lateral_convs\.(\d)\.": "backbone.fpn.fpn_inner{i1}.",
    r"neck\.fpn_convs\.(\d)\.": "backbone.fpn.fpn_layer{i1}.",
    r"rpn_head\.rpn_conv\.": "rpn.head.conv.",
    r"rpn_head\.rpn_cls\.": "rpn.head.cls_logits.",
    r"rpn_head\.rpn_reg\.": "rpn.head.bbox_pred.",
    r"bbox_head\.shared_convs\.(\d)\.conv": "roi_heads.box.feature_extractor.xconvs.{i3}",
    r"bbox_head\.shared_convs\.(\d)\.gn": "roi_heads.box.feature_extractor.xconvs.{gn}",
    r"bbox_head\.shared_fcs\.0\.": "roi_heads.box.feature_extractor.fc6.",
    r"bbox_head\.shared_fcs\.1\.": "roi_heads.box.feature_extractor.fc7.",
    r"bbox_head\.fc_cls\.": "roi_heads.box.predictor.cls_score.",
    r"bbox_head\.fc_reg\.": "roi_heads.box.predictor.bbox_pred.",
    r"mask_head\.convs\.(\d)\.": "roi_heads.mask.feature_extractor.mask_fcn{i1}.",
    r"mask_head\.upsample\.": "roi_heads.mask.predictor.conv5_mask.",
    r"mask_head\.conv_logits\.": "roi_heads.mask.predictor.mask_fcn_logits.",
}


def _rename(name: str) -> str:
    for old, new in _NAMES.items():
        if match := re.match(old, name):
            groups = match.groups()
            i = int(groups[0]) if groups and groups[0].isdigit() else 0
            name = new.format(*groups, i1=i + 1, i3=3 * i, gn=3 * i + 1) + name[match.end() :]
            break
    if "fpn_" in name or "mask_fcn" in name:  # a Sequential
        name = name.replace(".conv.", ".0.").replace(".gn.", ".1.")
    return re.sub(r"\.gn(\d)\.", r".bn\1.", name)


def renamed(state: dict) -> dict:
    """A ``State`` of mmdetection 1 with the names of maskrcnn-benchmark, and its anchors."""
    anchors = {f"rpn.anchor_generator.cell_anchors.{i}": torch.zeros(3, 4) for i in range(5)}
    return {_rename(name): value for name, value in state.items()} | anchors


class Benchmark(Reference):
    """With a ``State`` of mmdetection 1, and WS as in joe-siyuan-qiao/maskrcnn-benchmark."""

    def __init__(self, state, ws, groups):
        super().__init__(state, 1, ws, groups)

    def anchors(self, height, width, stride):
        """modeling/rpn/anchor_generator.py: of one size, 8 strides, and three ratios."""
        anchors = []
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w = round((stride * stride / ratio) ** 0.5)
                    w, h = 8 * w, 8 * round(w * ratio)
                    cx, cy = (i * stride + 0.5 * (stride - 1) for i in (x, y))
                    sides = (w - 1) / 2, (h - 1) / 2
                    anchors.append([cx - sides[0], cy - sides[1], cx + sides[0], cy + sides[1]])
        return torch.tensor(anchors, dtype=torch.float64)

    def pool(self, levels, rois, size):
        """modeling/poolers.py and csrc/cpu/ROIAlign_cpu.cpp: levels by the area with the last
        pixel, RoIs without it."""
        area = (rois[:, 2] - rois[:, 0] + 1) * (rois[:, 3] - rois[:, 1] + 1)
        target = torch.floor(4 + torch.log2(area.sqrt() / 224 + 1e-6)).clamp(2, 5).long() - 2
        assert set(target.tolist()) == {0, 1, 2, 3}
        pooled = [
            roi_align(levels[i], [roi[None]], size, 1 / 2 ** (i + 2), sampling_ratio=2)
            for roi, i in zip(rois, target.tolist(), strict=True)
        ]
        return torch.cat(pooled)
