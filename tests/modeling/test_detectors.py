"""Every kind of detector: modes of memory, norms that are exchanged, and the memory format change
no number."""

import copy
import functools

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ROIAlign
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import TINY, config, randomize, training_image
from torch import nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import boxes

import gn_detect
from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.layers.recompute import MODES
from gn_detect.modeling import norm
from gn_detect.modeling.blocks import Block

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
SMALL = [
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    *("MODEL.BACKBONE.FREEZE_AT", 0, "INPUT.MASK_FORMAT", "bitmask", "MODEL.GN.MEMORY", "lean"),
]
NARROW = [
    *("MODEL.GN.NUM_GROUPS", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (32, 32), "MODEL.ROI_KEYPOINT_HEAD.NORM", "GN"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
]
COCO = "COCO-InstanceSegmentation/mask_rcnn_"
MODELS = {
    "basic blocks": (R18, *TINY, "MODEL.RPN.NORM", "GN", "MODEL.ROI_MASK_HEAD.DECONV_NORM", "GN"),
    "bottlenecks": (f"{COCO}R_50_FPN_gn_3x.yaml", *NARROW, "MODEL.ROI_BOX_HEAD.FC_NORM", "GN"),
    "C4": (f"{COCO}R_50_C4_gn_3x.yaml", *NARROW),
    "ResNeXt": (f"{COCO}X_50_32x4d_FPN_gn_ws_2x.yaml", *NARROW, "MODEL.RESNETS.WIDTH_PER_GROUP", 1),
    "deep stem": (f"{COCO}R_50d_v2_FPN_gn_3x.yaml", *NARROW),
    "BiT": (f"{COCO}R_50x1_bit_FPN_gn_ws_3x.yaml", *NARROW),
    "RetinaNet": ("COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml", *NARROW),
    "keypoints": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.yaml", *NARROW),
    "panoptic": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.yaml", *NARROW),
}
# What torchvision's roi_align puts out is NCHW. The first convolution behind it puts it right.
NCHW = (ROIPooler, ROIAlign)

pytestmark = pytest.mark.slow


def build(name, *opts):
    file, *of_model = MODELS[name]
    cfg = config(file, *SMALL, *of_model, *opts)
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    return build_model(cfg)


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    """The name of a kind of detector, a detector of it, and a step of it that keeps everything."""
    torch.manual_seed(0)
    model = randomize(build(request.param))
    assert {m.memory for m in model.modules() if has_memory(m)} == {"lean"}
    fast = with_memory(copy.deepcopy(model), "fast")
    step(fast)  # in the first pass of RetinaNet, PyTorch adds in another order
    return request.param, model, step(fast)


def has_memory(module) -> bool:
    return isinstance(module, Block) and any(isinstance(m, GroupNorm) for m in module.modules())


def with_memory(model, memory):
    for module in filter(has_memory, model.modules()):
        module.memory = memory
    return model


def step(model, amp=False, times=1):
    """Losses, and gradients by name, of two images of different sizes."""
    model.train().zero_grad()
    model.loss_normalizer = 100  # RetinaNet's moving average
    with EventStorage():
        for i in range(times):
            torch.manual_seed(i)  # anchors and RoIs are sampled
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                losses = model([training_image(), training_image(80, 64)])
            sum(losses.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@torch.no_grad()
def detections(model):
    outputs = model.eval()([training_image(), training_image(80, 64)])
    return [output["instances"].get_fields() for output in outputs]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close(found, expected, rtol, atol):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():  # by norms: before a GN all may be 0 but for rounding
        assert (found[1][name] - value).norm() <= rtol * value.norm() + atol, name


@pytest.mark.parametrize("memory", MODES[1:])
def test_modes_give_the_same_bits(kind, memory):
    _, model, expected = kind
    assert len(expected[1]) > 40
    assert_same(step(with_memory(copy.deepcopy(model), memory)), expected)


def test_every_group_norm_can_be_one_of_pytorch(kind):
    """What follows a norm, residual and ReLU, does not leave with it."""
    _, model, expected = kind
    model = copy.deepcopy(model)
    for name, ours in list(model.named_modules()):
        if isinstance(ours, GroupNorm):
            theirs = nn.GroupNorm(ours.num_groups, ours.num_channels, ours.eps)
            theirs.load_state_dict(ours.state_dict())
            model.set_submodule(name, theirs)
    assert not any(isinstance(m, GroupNorm) for m in model.modules())
    assert_close(step(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", ["lean", "checkpoint"])
@pytest.mark.parametrize("how", ["frozen stages", "bfloat16", "accumulation"])
def test_in_a_training_step(how, memory):
    torch.manual_seed(0)
    model = randomize(build("basic blocks", "MODEL.BACKBONE.FREEZE_AT", 3 * (how[0] == "f")))
    options = {"amp": how == "bfloat16", "times": 2 if how == "accumulation" else 1}
    expected = step(with_memory(model, "fast"), **options)
    found = step(with_memory(model, memory), **options)
    assert_same(found, expected)
    frozen = [n for n in found[1] if ".stem." in n or ".res2." in n or ".res3." in n]
    assert bool(frozen) == (how != "frozen stages")


def test_components_without_gn_have_no_mode():
    """They would be run twice for nothing."""
    opts = ("MODEL.RESNETS.NORM", "BN", "MODEL.GN.MEMORY", "checkpoint")
    model = build_model(config(R18, *TINY, *opts))
    modes = {type(m).__name__: m.memory for m in model.modules() if isinstance(m, Block)}
    assert modes == {
        "GNRPNHead": "fast",
        "GNFastRCNNConvFCHead": "checkpoint",
        "GNMaskRCNNConvUpsampleHead": "checkpoint",
    }


# --- MODEL.CHANNELS_LAST ---


def is_channels_last(tensor) -> bool:
    return tensor.dim() != 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def watch(model) -> tuple[list[str], list[str]]:
    """Names of the modules that put out maps from now on: in channels_last, and others."""
    seen, others = [], []

    def look(name, module, inputs, output):
        tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        for tensor in (t for t in tensors if t.dim() == 4):
            (seen if is_channels_last(tensor) else others).append(name)

    for name, module in model.named_modules():
        if not isinstance(module, NCHW):
            module.register_forward_hook(functools.partial(look, name))
    return seen, others


def norms_of_maps(model) -> set[str]:
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    return {n for n in norms if "fc_norm" not in n}


@pytest.fixture
def nms_in_float64(monkeypatch):
    """Detectron2 gives torchvision's NMS float32 boxes, with which it takes no other scores."""
    nms = boxes.batched_nms
    monkeypatch.setattr(boxes, "batched_nms", lambda b, s, *args: nms(b, s.float(), *args))


@pytest.mark.usefixtures("nms_in_float64")
def test_channels_last_is_kept_and_changes_no_number(kind):
    name, plain, _ = kind
    model = build(name, "MODEL.CHANNELS_LAST", True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert all(map(is_channels_last, model.parameters()))
    assert all(p.is_contiguous() for p in plain.parameters())  # off by default
    model, plain = model.double(), copy.deepcopy(plain).double()
    seen, others = watch(model)
    # Detectron2's semantic head rounds its predictions to float32.
    assert_close(step(model), step(plain), rtol=1e-6, atol=1e-7)
    assert others == [] and norms_of_maps(model) <= set(seen)
    assert "backbone" in seen or name == "C4"
    for found, wanted in zip(detections(model), detections(plain), strict=True):
        for field, value in wanted.items():
            both = (v.tensor if isinstance(v, Boxes) else v for v in (found[field], value))
            torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["build_gn_resnet_backbone", "build_gn_resnetv2_backbone"])
def test_channels_last_of_a_backbone_without_fpn(name):
    file, *opts = MODELS["deep stem"]
    opts += ["MODEL.BACKBONE.NAME", name, "MODEL.CHANNELS_LAST", True]
    backbone = build_backbone(config(file, *SMALL, *opts))
    seen, others = watch(backbone)
    backbone(torch.randn(1, 3, 64, 96))
    assert others == [] and seen


def test_channels_last_of_a_lazy_config():
    file = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")
    cfg = LazyConfig.load(file)
    cfg.model.channels_last = True
    cfg.model.roi_heads.batch_size_per_image = 8
    model = instantiate(cfg.model)
    seen, others = watch(model)
    step(model)
    assert others == [] and norms_of_maps(model) <= set(seen)


def test_channels_last_refuses_deformable_convolutions(monkeypatch):
    """Their kernel, which is not compiled here, reads the memory as that of NCHW."""
    monkeypatch.setattr(norm, "_DEFORMABLE", nn.Conv2d)
    module = nn.Sequential(nn.Conv2d(4, 4, 3))
    with pytest.raises(ConfigError, match="MODEL.CHANNELS_LAST.*backbone.0 is a deformable"):
        norm.finish_norms(module, "backbone", channels_last=True)
