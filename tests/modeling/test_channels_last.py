"""``MODEL.CHANNELS_LAST``: the memory format changes, from the stem to the heads, and no number."""

import functools

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ROIAlign
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import config, randomize
from torch import nn
from torchvision.ops import boxes

import gn_detect
from gn_detect.config import ConfigError
from gn_detect.modeling import norm

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
SMALL = [
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    *("MODEL.BACKBONE.FREEZE_AT", 0, "INPUT.MASK_FORMAT", "bitmask"),
]
NARROW = [
    *("MODEL.GN.NUM_GROUPS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (32, 32), "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
]
MODELS = {
    "basic blocks": (R18, "MODEL.RPN.NORM", "GN", "MODEL.ROI_MASK_HEAD.DECONV_NORM", "GN"),
    "lean": (R18, "MODEL.GN.MEMORY", "lean", "MODEL.GN.WEIGHT_STANDARDIZATION", "authors"),
    "bottlenecks": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml", *NARROW),
    "C4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml", *NARROW),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml", *NARROW),
    "keypoints": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.yaml", *NARROW),
    "panoptic": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.yaml", *NARROW),
    "deep stem": ("COCO-InstanceSegmentation/mask_rcnn_R_50d_v2_FPN_gn_3x.yaml", *NARROW),
    "BiT": ("COCO-InstanceSegmentation/mask_rcnn_R_50x1_bit_FPN_gn_ws_3x.yaml", *NARROW),
}
# What torchvision's roi_align puts out is NCHW. The first convolution behind it puts it right.
NCHW = (ROIPooler, ROIAlign)

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(cfg):
    """Two images of different sizes, two objects each."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in ((64, 96), (80, 64)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 6, 40, 50], [20, 20, 60, 60]]))
        instances.gt_classes = torch.tensor([0, 0])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 6:50, 4:40] = masks[1, 30:60, 20:50] = True
        instances.gt_masks = BitMasks(masks)
        if cfg.MODEL.KEYPOINT_ON:
            points = torch.tensor([22.0, 28, 2]), torch.tensor([50.0, 40, 2])
            instances.gt_keypoints = Keypoints(torch.stack([p.repeat(17, 1) for p in points]))
        pixels = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        sem_seg = torch.randint(0, 54, (height, width), generator=generator)
        images.append({"image": pixels, "instances": instances, "sem_seg": sem_seg})
        images[-1].update(height=height, width=width)
    return images


def step(model, images, **autocast):
    """Losses, and gradients by name."""
    model.train().zero_grad()
    torch.manual_seed(1)  # anchors and RoIs are sampled
    with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        losses = model(images)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, gradients


def is_channels_last(tensor) -> bool:
    return tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def maps(output) -> list[torch.Tensor]:
    """The tensors of four dimensions in what a module puts out."""
    if isinstance(output, torch.Tensor):
        return [output] if output.dim() == 4 else []
    parts = list(output.values()) if isinstance(output, dict) else output
    return [t for part in parts for t in maps(part)] if isinstance(parts, (list, tuple)) else []


def watch(model) -> tuple[list[str], list[str]]:
    """Names of the modules that put out maps from now on: in channels_last, and others."""
    seen, others = [], []

    def look(name, module, inputs, output):
        for tensor in maps(output):
            (seen if is_channels_last(tensor) else others).append(name)

    for name, module in model.named_modules():
        if not isinstance(module, NCHW):
            module.register_forward_hook(functools.partial(look, name))
    return seen, others


def pair(name):
    """(cfg, NCHW, channels_last), with the same weights."""
    file, *opts = MODELS[name]
    cfg = config(file, *SMALL, *opts)
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    torch.manual_seed(0)
    plain = randomize(build_model(cfg))
    cfg.MODEL.CHANNELS_LAST = True
    model = build_model(cfg)
    model.load_state_dict(plain.state_dict(), strict=True)
    return cfg, plain, model


@pytest.fixture
def nms_in_float64(monkeypatch):
    """Detectron2 gives torchvision's NMS float32 boxes, with which it takes no other scores."""
    nms = boxes.batched_nms
    monkeypatch.setattr(boxes, "batched_nms", lambda b, s, *args: nms(b, s.float(), *args))


@pytest.mark.usefixtures("nms_in_float64")
@pytest.mark.parametrize("name", MODELS)
def test_every_map_is_in_the_format_and_no_number_changes(name):
    cfg, plain, model = pair(name)
    seen, others = watch(model)
    assert all(map(is_channels_last, model.parameters()))
    losses, gradients = step(model.double(), batch(cfg))
    assert others == []
    assert {n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)} <= set(seen)
    assert "backbone" in seen or cfg.MODEL.ROI_HEADS.IN_FEATURES == ["res4"]
    expected_losses, expected_gradients = step(plain.double(), batch(cfg))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=1e-9)
    # Detectron2's semantic head rounds its predictions to float32.
    assert_same_gradients(gradients, expected_gradients, rtol=1e-6, atol=1e-7)

    with torch.no_grad():
        outputs, expected = (m.eval()(batch(cfg)) for m in (model, plain))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same_instances(actual["instances"], wanted["instances"])


def assert_same_gradients(actual, expected, rtol, atol) -> None:
    """By their norms: those before a GN may be zero but for rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= rtol * value.norm() + atol, name


def assert_same_instances(actual, expected) -> None:
    assert len(actual) == len(expected)
    for field, value in expected.get_fields().items():
        value, ours = (v.tensor if isinstance(v, Boxes) else v for v in (value, actual.get(field)))
        torch.testing.assert_close(ours, value, rtol=1e-6, atol=1e-6)


def test_float32():
    cfg, plain, model = pair("basic blocks")
    losses, gradients = step(model, batch(cfg))
    expected_losses, expected_gradients = step(plain, batch(cfg))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-6)
    assert_same_gradients(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_in_the_format():
    cfg, _, model = pair("basic blocks")
    seen, others = watch(model)
    step(model, batch(cfg), bfloat16=True)
    assert others == [] and seen


@pytest.mark.parametrize("name", ["build_gn_resnet_backbone", "build_gn_resnetv2_backbone"])
def test_a_backbone_without_fpn(name):
    file = MODELS["deep stem"][0]
    opts = ["MODEL.BACKBONE.NAME", name, "MODEL.CHANNELS_LAST", True]
    backbone = build_backbone(config(file, *SMALL, *NARROW, *opts))
    seen, others = watch(backbone)
    backbone(torch.randn(1, 3, 64, 96))
    assert others == [] and seen


def test_a_lazy_config_has_it():
    file = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")
    cfg = LazyConfig.load(file)
    cfg.model.channels_last = True
    cfg.model.roi_heads.batch_size_per_image = 8
    model = instantiate(cfg.model)
    seen, others = watch(model)
    step(model, batch(config(R18)))
    assert others == []
    assert {n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)} <= set(seen)


def test_it_is_off_by_default():
    model = build_model(config(R18))
    assert all(p.is_contiguous() for p in model.parameters())


def test_deformable_convolutions_are_refused(monkeypatch):
    """Their kernel, which is not compiled here, reads the memory as that of NCHW."""
    monkeypatch.setattr(norm, "DeformConv", nn.Conv2d)
    module = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ConfigError, match="MODEL.CHANNELS_LAST.*backbone.0 is a deformable"):
        norm.finish_norms(module, "backbone", channels_last=True)
