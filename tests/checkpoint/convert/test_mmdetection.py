"""Detectors of mmdetection: names and shapes, numbers, and what their configs tell.

``State`` and ``Reference`` are written from mmdetection's source, files of which are named there.
"""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import config
from torch.nn import functional as F
from torchvision.ops import roi_align

from gn_detect.checkpoint.convert import mmdetection
from gn_detect.checkpoint.convert.weights import Weights
from gn_detect.checkpoint.origin import Origin
from gn_detect.checkpoint.safe_load import WeightsError

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
        for i in range(4):
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
                out = self.conv_norm(
                    out, f"{name}.conv2", f"{name}.gn2", stride=stride, padding=1
                ).relu()
                out = self.conv_norm(out, f"{name}.conv3", f"{name}.gn3")
                if not b:
                    x = self.conv_norm(
                        x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride
                    )
                x = (out + x).relu()
            stages.append(x)
        return stages

    def neck(self, stages):
        """mmdet/models/necks/fpn.py: P2 to P6."""
        laterals = [self.conv_module(x, f"neck.lateral_convs.{i}") for i, x in enumerate(stages)]
        for i in (3, 2, 1):
            size = laterals[i - 1].shape[2:]
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size, mode="nearest")
        outs = [
            self.conv_module(x, f"neck.fpn_convs.{i}", padding=1) for i, x in enumerate(laterals)
        ]
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
        return torch.cat(
            [
                roi_align(levels[level], [roi[None]], size, 1 / 2 ** (level + 2), **samples)
                for roi, level in zip(rois, target, strict=True)
            ]
        )

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


SMALL = {"width": 8, "channels": 16, "fc": 32, "classes": 5}
SMALL_CONFIG = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.GN.NUM_GROUPS", 4),
    *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 5),
]
# What version 1 computes, for the keys that the converter names.
VERSION_1 = ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
for head in ("BOX", "MASK"):
    VERSION_1 += [f"MODEL.ROI_{head}_HEAD.POOLER_TYPE", "ROIAlign"]
    VERSION_1 += [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO", 2]


def convert(state, meta=None) -> Weights:
    assert mmdetection.recognizes(list(state))
    return mmdetection.convert(state, meta or {})


@pytest.fixture(
    scope="module", params=[(1, False), (1, True), (2, False), (2, True)], ids=lambda p: f"{p}"
)
def pair(request, one_thread):
    """Version, ``Reference`` and our model, of which all parameters come from the converter."""
    version, ws = request.param
    state = State(version, **SMALL).random()
    name = f"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_{'gn_ws_2x' if ws else 'gn_2x'}.yaml"
    model = build_model(config(name, *SMALL_CONFIG, *(VERSION_1 if version == 1 else [])))
    model.load_state_dict(convert(state).state)
    return version, Reference(state, version, ws, groups=4), model.double().eval()


@pytest.fixture(scope="module")
def levels(pair):
    """Features of our backbone, and of the reference, for one image."""
    _, reference, model = pair
    image = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        return model.backbone(image), reference.neck(reference.backbone(image))


@torch.no_grad()
def test_features(levels):
    ours, theirs = levels
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    torch.testing.assert_close(list(ours.values()), theirs)  # float64: 1e-7


@torch.no_grad()
def test_proposals(pair, levels):
    version, reference, model = pair
    rpn, features = model.proposal_generator, list(levels[0].values())
    anchors = rpn.anchor_generator(features)
    logits, deltas = rpn.rpn_head(features)
    deltas = [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for d in deltas]
    boxes = rpn._decode_proposals(anchors, deltas)
    for i, (theirs, their_deltas) in enumerate(reference.rpn(levels[1])):
        ours = logits[i].permute(0, 2, 3, 1).flatten().sigmoid()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(deltas[i][0], their_deltas)
        their_anchors = reference.anchors(*features[i].shape[2:], stride=4 * 2**i)
        theirs = reference.decode(their_anchors, their_deltas, [1.0] * 4).squeeze(1)
        if version == 1:  # the last pixel of a box, and the end of it
            theirs[:, 2:] += 1
        torch.testing.assert_close(boxes[i][0], theirs.float(), rtol=1e-6, atol=1e-4)


ROIS = [[4, 4, 30, 40], [1.5, 7.25, 90, 80], [0, 0, 130, 140], [-100, -120, 250, 260]]
ROIS += [[-40, -30, 460, 470], [50, 20, 100, 90]]


@torch.no_grad()
def test_classes_boxes_and_masks(pair, levels):
    version, reference, model = pair
    heads, features = model.roi_heads, [levels[0][f"p{i}"] for i in range(2, 6)]
    boxes = Boxes(torch.tensor(ROIS))
    proposals = [Instances((96, 128), proposal_boxes=boxes)]
    rois = boxes.tensor.double() - torch.tensor([0, 0, 1, 1]) * (version == 1)

    predictions = heads.box_predictor(heads.box_head(heads.box_pooler(features, [boxes])))
    scores, deltas = reference.box_head(reference.pool(levels[1], rois, 7))
    (ours,) = heads.box_predictor.predict_probs(predictions, proposals)
    assert ours.shape == (6, 6) and scores.std(1).min() > 0.01
    torch.testing.assert_close(ours[:, :-1], scores)
    torch.testing.assert_close(ours[:, -1], 1 - scores.sum(1))

    (ours,) = heads.box_predictor.predict_boxes(predictions, proposals)
    theirs = reference.decode(rois, deltas, [0.1, 0.1, 0.2, 0.2])
    theirs[..., 2:] += version == 1
    torch.testing.assert_close(ours, theirs.flatten(1).float(), rtol=1e-6, atol=1e-4)

    ours = heads.mask_head.layers(heads.mask_pooler(features, [boxes]))
    theirs = reference.mask_head(reference.pool(levels[1], rois, 14))
    assert ours.shape == (6, 5, 28, 28)
    torch.testing.assert_close(ours, theirs)


PUBLISHED = {  # mmdetection's configs/gn, configs/gn+ws and configs/scratch
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_2x": {},
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_gn_2x": {"depth": 101},
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_2x": {},
    "COCO-InstanceSegmentation/mask_rcnn_X_50_32x4d_FPN_gn_ws_2x": {"groups": 32, "base_width": 4},
    "COCO-Detection/faster_rcnn_R_50_FPN_gn_ws_1x": {"mask": False},
    "COCO-Detection/scratch_faster_rcnn_R_50_FPN_gn_6x": {"mask": False},
    # not published
    "COCO-Detection/cascade_rcnn_R_50_FPN_gn_heads_2x": {
        **{"mask": False, "norm": "bn", "stages": 3, "agnostic": True},
    },
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_whole_detectors(name, version):
    state = State(version, **PUBLISHED[name]).meta()
    weights = convert(state)
    model = build_model(config(f"{name}.yaml", "MODEL.DEVICE", "meta"))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in weights.state.items()} == expected
    assert (weights.format, weights.partial) == ("mmdetection", False)
    assert all(name.endswith(".num_batches_tracked") for name in weights.left_out)
    assert len(weights.left_out) == len(state) - len(expected)


def test_heads_of_two_layers_and_class_agnostic_masks():
    state = State(1, num_convs=0, num_fcs=2, agnostic=True, **SMALL).random()
    weights = convert(state).state
    for k in (1, 2):
        theirs = state[f"bbox_head.shared_fcs.{k - 1}.weight"]
        assert torch.equal(weights[f"roi_heads.box_head.fc{k}.weight"], theirs)
    for ours, theirs in [
        ("box_predictor.bbox_pred", "bbox_head.fc_reg"),
        ("mask_head.predictor", "mask_head.conv_logits"),
    ]:
        assert torch.equal(weights[f"roi_heads.{ours}.bias"], state[f"{theirs}.bias"])


def test_what_no_detector_has_is_left_out():
    extra = ["backbone.fc.weight", "ema_neck_fpn_convs_0_gn_weight"]
    state = State(**SMALL).meta()
    weights = convert({**state, **{name: torch.zeros(1) for name in extra}})
    assert weights.left_out == extra
    assert len(weights.state) == len(state)


def test_names_of_others_are_not_recognized():
    model = build_model(config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"))
    assert not mmdetection.recognizes(model.state_dict())
    assert not mmdetection.recognizes(["layer1.0.conv1.weight", "gn1.weight", "fc.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "backbone.layer2.0.conv2.conv_offset.weight",  # deformable convolution
        "backbone.stem.0.weight",  # deep stem
        "backbone.layer2.0.downsample.2.weight",  # avg_down
        "backbone.layer2.0.conv1.weight_gamma",  # ConvAWS
        "neck.fpn_convs.4.conv.weight",  # RetinaNet
        "rpn_head.rpn_conv.0.conv.weight",
        "roi_head.bbox_head.cls_convs.0.conv.weight",
        "roi_head.mask_head.0.conv_logits.weight",  # Cascade Mask R-CNN
        "roi_head.semantic_head.lateral_convs.0.conv.weight",  # HTC
    ],
)
def test_layers_that_detectron2_lacks_are_named(name):
    state = {**State(**SMALL).meta(), name: torch.zeros(1)}
    with pytest.raises(WeightsError, match=rf"1 weights .*: {name}\."):
        convert(state)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rpn_head.rpn_cls.weight": 6}, "6 channels for 3 anchors"),  # softmax
        ({"rpn_head.rpn_cls.weight": 9, "rpn_head.rpn_reg.weight": 36}, "9 anchors per position"),
        ({"roi_head.bbox_head.fc_reg.weight": 24}, "fc_reg.weight has 24 channels"),
        ({"roi_head.mask_head.conv_logits.bias": 6}, "conv_logits.bias has 6 channels"),
        ({"roi_head.bbox_head.fc_cls.weight": 7}, "expected 24, or 4"),  # Seesaw loss
    ],
)
def test_channels_that_detectron2_lacks_are_named(changes, message):
    state = State(**SMALL).meta()
    for name, channels in changes.items():
        state[name] = state[name].new_empty(channels, *state[name].shape[1:])
    with pytest.raises(WeightsError, match=message):
        convert(state)


def test_a_detector_without_fpn_is_refused():
    state = {k: v for k, v in State(**SMALL).meta().items() if not k.startswith("neck")}
    with pytest.raises(WeightsError, match="neck.lateral_convs.3.conv.weight is missing"):
        convert(state)


# As Config.text of version 1 has it: the path of the file, and its content
# (mmdetection's configs/gn/mask_rcnn_r50_fpn_gn_2x.py).
VERSION_1_TEXT = """/home/user/mmdetection/configs/gn/mask_rcnn_r50_fpn_gn_2x.py
# model settings
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)

model = dict(
    type='MaskRCNN',
    pretrained='open-mmlab://detectron/resnet50_gn',
    backbone=dict(type='ResNet', depth=50, frozen_stages=1, style='pytorch', norm_cfg=norm_cfg))
train_cfg = dict(rpn=dict(allowed_border=0, smoothl1_beta=1 / 9.0))
img_norm_cfg = dict(
    mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
data = dict(train=dict(type='CocoDataset', img_norm_cfg=img_norm_cfg, img_scale=(1333, 800)))
"""
# As Config.pretty_text of version 2 has it, with all that it inherits
# (configs/gn+ws/mask_rcnn_r50_fpn_gn_ws-all_2x_coco.py).
VERSION_2_TEXT = """model = dict(
    type='MaskRCNN',
    backbone=dict(
        type='ResNet',
        depth=50,
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://jhu/resnet50_gn_ws'),
        conv_cfg=dict(type='ConvWS')),
    neck=dict(
        type='FPN',
        in_channels=[256, 512, 1024, 2048],
        conv_cfg=dict(type='ConvWS'),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True)))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', img_scale=(1333, 800), keep_ratio=True),
    dict(
        type='Normalize',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True)
]
load_from = None
"""
# Version 3 sorts the keys (configs/gn/mask-rcnn_r50-fpn-gn-all_2x_coco.py).
VERSION_3_TEXT = """backend_args = None
model = dict(
    backbone=dict(
        depth=101,
        norm_cfg=dict(num_groups=16, requires_grad=True, type='GN'),
        style='caffe',
        type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            103.53,
            116.28,
            123.675,
        ],
        pad_size_divisor=32,
        std=[
            1.0,
            1.0,
            1.0,
        ],
        type='DetDataPreprocessor'),
    type='MaskRCNN')
"""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
UNIT = (1.0, 1.0, 1.0)


def origin(**meta) -> Origin:
    return convert(State(**SMALL).meta(), meta).origin


def test_origin_of_each_version():
    detectron = (102.9801, 115.9465, 122.7717)
    assert origin(config=VERSION_1_TEXT) == Origin("BGR", detectron, UNIT, False, "", 32)
    assert origin(config=VERSION_2_TEXT) == Origin("RGB", MEAN, STD, False, "authors", 32)
    assert origin(cfg=VERSION_3_TEXT) == Origin("BGR", MEAN[::-1], UNIT, True, "", 16)


def test_origin_that_the_config_does_not_tell():
    assert origin() == origin(config=None) == origin(cfg="not (a config") == Origin()
    twice = VERSION_2_TEXT.replace("to_rgb=True)\n]", "to_rgb=False)\n]")
    assert origin(config=twice) == Origin(None, None, None, False, "authors", 32)
    two_groups = VERSION_2_TEXT.replace("num_groups=32", "num_groups=16", 1)
    assert origin(config=two_groups).num_groups is None


def test_a_config_is_not_executed(tmp_path):
    marker = tmp_path / "executed"
    call = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    text = f"{call}\nimg_norm_cfg = dict(mean={call}, std=[{call}], to_rgb=True)\nx = dict({call})"
    assert origin(config=text) == Origin(weight_standardization="")
    assert not marker.exists()
    eval(call)  # what was not executed would have been seen
    assert marker.exists()


@pytest.mark.parametrize("text", ["dict(" * 10000, "[" * 100000, "-" * 100000 + "1", "a\0b"])
def test_malformed_configs_tell_nothing(text):
    assert origin(config=text) == Origin()
