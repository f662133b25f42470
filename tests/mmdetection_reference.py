"""What mmdetection names and computes, written from its source, files of which are named here."""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
ANCHORS = 3


class State(dict):
    """Names and shapes of the ``state_dict`` of a two-stage detector of mmdetection.

    mmdet/models/backbones/resnet.py, resnext.py, utils/res_layer.py, necks/fpn.py,
    dense_heads/rpn_head.py, roi_heads/bbox_heads/convfc_bbox_head.py,
    roi_heads/mask_heads/fcn_mask_head.py; in version 1, mmdet/models/bbox_heads and mask_heads,
    which are attributes of the detector itself and count the background as a class.

    Args:
        version: of mmdetection; 3 has the names of 2.
        norm: "gn" or "bn" of the backbone. The rest has GN.
        groups, base_width: of ResNeXt.
        agnostic: boxes and masks are the same for all classes.
        stages: of a Cascade R-CNN.
    """

    def __init__(
        self,
        version=2,
        *,
        depth=50,
        norm="gn",
        groups=1,
        base_width=64,
        width=64,
        channels=256,
        fc=1024,
        classes=80,
        num_convs=4,
        num_fcs=1,
        mask=True,
        agnostic=False,
        stages=0,
    ):
        self.norm_name = norm
        self.conv("backbone.conv1", width, 3, 7, bias=False)
        self.norm("backbone.{}1", width)
        in_channels = width
        for i, blocks in enumerate(BLOCKS[depth]):
            planes = width * 2**i
            inner = math.floor(planes * base_width / 64) * groups
            for b in range(blocks):
                block = f"backbone.layer{i + 1}.{b}"
                self.conv(f"{block}.conv1", inner, in_channels, 1, bias=False)
                self.norm(f"{block}.{{}}1", inner)
                self.conv(f"{block}.conv2", inner, inner // groups, 3, bias=False)
                self.norm(f"{block}.{{}}2", inner)
                self.conv(f"{block}.conv3", planes * 4, inner, 1, bias=False)
                self.norm(f"{block}.{{}}3", planes * 4)
                if b == 0:
                    self.conv(f"{block}.downsample.0", planes * 4, in_channels, 1, bias=False)
                    self.norm(f"{block}.downsample.1", planes * 4)
                in_channels = planes * 4
        self.norm_name = "gn"
        for i in range(4):
            self.conv_module(f"neck.lateral_convs.{i}", channels, width * 4 * 2**i, 1)
            self.conv_module(f"neck.fpn_convs.{i}", channels, channels, 3)
        self.conv("rpn_head.rpn_conv", channels, channels, 3)
        self.conv("rpn_head.rpn_cls", ANCHORS, channels, 1)
        self.conv("rpn_head.rpn_reg", ANCHORS * 4, channels, 1)
        roi_head, rows = ("", classes + 1) if version == 1 else ("roi_head.", classes)
        if agnostic:
            rows = 1
        for stage in [f"{i}." for i in range(stages)] or [""]:
            head = f"{roi_head}bbox_head.{stage}"
            for i in range(num_convs):
                self.conv_module(f"{head}shared_convs.{i}", channels, channels, 3)
            for i in range(num_fcs):
                self.linear(f"{head}shared_fcs.{i}", fc, fc if i else channels * 49)
            self.linear(f"{head}fc_cls", classes + 1, fc)
            self.linear(f"{head}fc_reg", rows * 4, fc)
        if mask:
            for i in range(4):
                self.conv_module(f"{roi_head}mask_head.convs.{i}", channels, channels, 3)
            self.conv(f"{roi_head}mask_head.upsample", channels, channels, 2)
            self.conv(f"{roi_head}mask_head.conv_logits", rows, channels, 1)

    def conv(self, name, out_channels, in_channels, size, bias=True):
        self[f"{name}.weight"] = (out_channels, in_channels, size, size)
        if bias:
            self[f"{name}.bias"] = (out_channels,)

    def norm(self, name, channels):
        name = name.format(self.norm_name)
        for parameter in ("weight", "bias"):
            self[f"{name}.{parameter}"] = (channels,)
        if self.norm_name == "bn":
            for buffer in ("running_mean", "running_var"):
                self[f"{name}.{buffer}"] = (channels,)
            self[f"{name}.num_batches_tracked"] = ()

    def conv_module(self, name, *shape):
        """mmcv/cnn/bricks/conv_module.py: no bias before a norm; names of norm.py."""
        self.conv(f"{name}.conv", *shape, bias=False)
        self.norm(f"{name}.{{}}", shape[0])

    def linear(self, name, out_features, in_features):
        self[f"{name}.weight"] = (out_features, in_features)
        self[f"{name}.bias"] = (out_features,)

    def meta(self):
        return {name: torch.empty(shape, device="meta") for name, shape in self.items()}

    def random(self):
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, shape in self.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if len(shape) > 1:
                value = (value + 0.3) / math.sqrt(math.prod(shape[1:]))
            elif "gn" in name or "downsample" in name:
                value = 0.2 * value + (1 if name.endswith("weight") else 0)
            value = value * (0.05 if "rpn_reg" in name else 1)  # boxes of a moderate size
            state[name] = value.float().double()  # a model is born as float32
        return state


class Reference:
    """What mmdetection computes with a ``state_dict``, for one image.

    Args:
        version: of mmdetection.
        ws: whether ``conv_cfg`` is ``ConvWS``.
    """

    def __init__(self, state, version, ws, groups):
        self.state, self.version, self.ws, self.groups = state, version, ws, groups
        self.roi_head = "" if version == 1 else "roi_head."

    def conv(self, x, name, **kwargs):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **kwargs)

    def conv_norm(self, x, conv, norm, **kwargs):
        """mmcv/cnn/bricks/conv_ws.py, and then GN."""
        weight = self.state[f"{conv}.weight"]
        if self.ws:
            flat = weight.flatten(1)
            mean, std = flat.mean(1)[:, None, None, None], flat.std(1)[:, None, None, None]
            weight = (weight - mean) / (std + 1e-5)
        x = F.conv2d(x, weight, **kwargs)
        affine = (self.state[f"{norm}.weight"], self.state[f"{norm}.bias"])
        return F.group_norm(x, self.groups, *affine, eps=1e-5)

    def conv_module(self, x, name, **kwargs):
        return self.conv_norm(x, f"{name}.conv", f"{name}.gn", **kwargs)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def backbone(self, x):
        """mmdet/models/backbones/resnet.py, style "pytorch": the 3x3 convolution strides."""
        x = self.conv_norm(x, "backbone.conv1", "backbone.gn1", stride=2, padding=3).relu()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        stages = []
        for i, blocks in enumerate(BLOCKS[50]):
            for b in range(blocks):
                name, stride = f"backbone.layer{i + 1}.{b}", 2 if i and not b else 1
                out = self.conv_norm(x, f"{name}.conv1", f"{name}.gn1").relu()
                strided = {"stride": stride, "padding": 1}
                out = self.conv_norm(out, f"{name}.conv2", f"{name}.gn2", **strided).relu()
                out = self.conv_norm(out, f"{name}.conv3", f"{name}.gn3")
                if not b:
                    conv, norm = f"{name}.downsample.0", f"{name}.downsample.1"
                    x = self.conv_norm(x, conv, norm, stride=stride)
                x = (out + x).relu()
            stages.append(x)
        return stages

    def neck(self, stages):
        """mmdet/models/necks/fpn.py: P2 to P6."""
        laterals = [self.conv_module(x, f"neck.lateral_convs.{i}") for i, x in enumerate(stages)]
        for i in (3, 2, 1):
            size = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size, mode="nearest")
        convs = [f"neck.fpn_convs.{i}" for i in range(4)]
        outs = [self.conv_module(*x, padding=1) for x in zip(laterals, convs, strict=True)]
        return [*outs, F.max_pool2d(outs[-1], 1, stride=2)]

    def rpn(self, levels):
        """mmdet/models/dense_heads/rpn_head.py: scores (A,) and deltas (A, 4) of each level."""
        for x in levels:
            x = self.conv(x, "rpn_head.rpn_conv", padding=1).relu()
            scores = self.conv(x, "rpn_head.rpn_cls").permute(0, 2, 3, 1).reshape(-1).sigmoid()
            yield scores, self.conv(x, "rpn_head.rpn_reg").permute(0, 2, 3, 1).reshape(-1, 4)

    def anchors(self, height, width, stride):
        """mmdet/core/anchor/anchor_generator.py, scale 8, (A, 4); ``LegacyAnchorGenerator`` for
        version 1, before it rounds."""
        ratios = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        ws, hs = 8 * stride / ratios.sqrt(), 8 * stride * ratios.sqrt()
        centre = 0
        if self.version == 1:
            centre, ws, hs = 0.5 * (stride - 1), ws - 1, hs - 1
        base = torch.stack([-ws / 2, -hs / 2, ws / 2, hs / 2], 1) + centre
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) * stride
        return (shifts + base).reshape(-1, 4)

    def decode(self, boxes, deltas, stds):
        """mmdet/core/bbox/coder/delta_xywh_bbox_coder.py: (N, 4) and (N, K * 4) to (N, K, 4);
        ``delta2bbox`` of mmdet/core/bbox/transforms.py in version 1, where x2 is within the box."""
        last = 1 if self.version == 1 else 0
        dx, dy, dw, dh = (deltas.unflatten(1, (-1, 4)) * torch.tensor(stds)).unbind(-1)
        x1, y1, x2, y2 = (boxes[:, None, i] for i in range(4))
        w, h = x2 - x1 + last, y2 - y1 + last
        gx, gy, gw, gh = (x1 + x2) / 2 + w * dx, (y1 + y2) / 2 + h * dy, w * dw.exp(), h * dh.exp()
        half = torch.tensor([0.5, 0.5, -0.5, -0.5]) * last
        return torch.stack([gx - gw / 2, gy - gh / 2, gx + gw / 2, gy + gh / 2], -1) + half

    def pool(self, levels, rois, size):
        """mmdet/models/roi_heads/roi_extractors/single_level_roi_extractor.py; the ``RoIAlign`` of
        version 1 (mmdet/ops/roi_align) has two samples, no half pixel, and takes x2 + 1."""
        last = 1 if self.version == 1 else 0
        scale = ((rois[:, 2] - rois[:, 0] + last) * (rois[:, 3] - rois[:, 1] + last)).sqrt()
        target = torch.floor(torch.log2(scale / 56 + 1e-6)).clamp(0, 3).long()
        assert set(target.tolist()) == {0, 1, 2, 3}
        rois = rois + torch.tensor([0, 0, last, last])
        samples = {"sampling_ratio": 2} if last else {"sampling_ratio": 0, "aligned": True}
        pooled = [
            roi_align(levels[level], [roi[None]], size, 1 / 2 ** (level + 2), **samples)
            for roi, level in zip(rois, target, strict=True)
        ]
        return torch.cat(pooled)

    def box_head(self, x):
        """Shared4Conv1FCBBoxHead: class scores (N, C) and deltas, without those of background."""
        head = f"{self.roi_head}bbox_head."
        for i in range(4):
            x = self.conv_module(x, f"{head}shared_convs.{i}", padding=1).relu()
        x = self.linear(x.flatten(1), f"{head}shared_fcs.0").relu()
        scores, deltas = self.linear(x, f"{head}fc_cls").softmax(1), self.linear(x, f"{head}fc_reg")
        if self.version == 1:  # multiclass_nms: classes from the second on
            return scores[:, 1:], deltas[:, 4:]
        return scores[:, :-1], deltas

    def mask_head(self, x):
        """FCNMaskHead: logits of the classes."""
        head = f"{self.roi_head}mask_head."
        for i in range(4):
            x = self.conv_module(x, f"{head}convs.{i}", padding=1).relu()
        weight, bias = (self.state[f"{head}upsample.{name}"] for name in ("weight", "bias"))
        x = F.conv_transpose2d(x, weight, bias, stride=2).relu()
        logits = self.conv(x, f"{head}conv_logits")
        return logits[:, 1:] if self.version == 1 else logits  # ``labels + 1`` of get_seg_masks
