"""Every config that ships: GN is where it says, and the parameters are those of Detectron2's own
model; and each kind of detector trains an iteration.

Configs that differ in their schedule alone share one model, without memory for its weights.
"""

import dataclasses
import functools
import re
from unittest import mock

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from detectron2_reference import detectron2_config
from helpers import CONFIGS, as_shipped, config, training_image
from torch import nn

from gn_detect.layers import GroupNorm

pytestmark = pytest.mark.slow


@functools.cache
def configured(name):
    return config(name, "INPUT.MASK_FORMAT", "bitmask")


def grouped(configure) -> dict[str, list[str]]:
    """The names of all configs that have the same model, by the first of them."""
    groups = {}
    for name in CONFIGS:
        model = configure(name).MODEL.clone()
        model.PIXEL_MEAN = model.PIXEL_STD = []  # no layer depends on them
        groups.setdefault(model.dump(), []).append(name)
    return {names[0]: names for names in groups.values()}


def thin(name):
    """The config of the same kind of detector, with fewer and narrower layers and proposals."""
    cfg = configured(name).clone()
    model = cfg.MODEL
    model.BACKBONE.FREEZE_AT = 0
    model.RESNETS.DEPTH = min(model.RESNETS.DEPTH, 50)
    model.RESNETS.RES2_OUT_CHANNELS = 64
    model.RESNETS.WIDTH_PER_GROUP = 32 // model.RESNETS.NUM_GROUPS
    model.GN.NUM_GROUPS, model.GN.CHANNELS_PER_GROUP = 32, 0
    model.FPN.OUT_CHANNELS = model.SEM_SEG_HEAD.CONVS_DIM = 64
    model.ROI_BOX_HEAD.CONV_DIM = model.ROI_BOX_HEAD.FC_DIM = model.ROI_MASK_HEAD.CONV_DIM = 64
    model.ROI_KEYPOINT_HEAD.CONV_DIMS = [64] * 8
    model.ROI_HEADS.NUM_CLASSES = model.RETINANET.NUM_CLASSES = 3
    model.RPN.PRE_NMS_TOPK_TRAIN, model.RPN.POST_NMS_TOPK_TRAIN = 50, 10
    model.RPN.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16, 8
    return cfg


MODELS = grouped(configured)
KINDS = grouped(thin)


@dataclasses.dataclass
class Model:
    name: str  # the first config with it
    cfg: CfgNode
    module: nn.Module

    def layers(self, kind) -> dict[str, nn.Module]:
        return {n: m for n, m in self.module.named_modules() if isinstance(m, kind)}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    cfg = configured(request.param)
    return Model(request.param, cfg, without_memory(cfg))


def without_memory(cfg):
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    # Slow, and of no effect where there is nothing to fill.
    no_filling = mock.patch.object(torch.Tensor, "normal_", lambda self, *args, **kwargs: self)
    with torch.device("meta"), no_filling:
        return build_model(cfg)


def is_preactivated(cfg) -> bool:
    return cfg.MODEL.BACKBONE.NAME == "build_gn_resnetv2_fpn_backbone"


def has_biases(cfg) -> bool:
    """Before the norms of FPN and heads."""
    return cfg.MODEL.BACKBONE.NAME == "build_tensorpack_resnet_fpn_backbone"


def expected_norm_layers(cfg) -> dict[str, tuple[str, int]]:
    """Component -> (its norm, its layers with a norm), from the architectures as published."""
    model = cfg.MODEL
    # Stem, convolutions of the blocks, and one shortcut for each stage that changes the channels.
    resnet = {18: 1 + 16 + 3, 50: 1 + 3 * 16 + 4, 101: 1 + 3 * 33 + 4}[model.RESNETS.DEPTH]
    if is_preactivated(cfg):  # before the convolutions of the blocks; two in the deep stem
        resnet += -1 - 4 + {"D": 2, "BiT": 0}[model.RESNETV2.VARIANT]
    if model.META_ARCHITECTURE == "GNRetinaNet":
        return {
            "backbone.bottom_up": (model.RESNETS.NORM, resnet),
            "backbone.fpn": (model.FPN.NORM, 2 * 3),
            "head": (model.RETINANET.NORM, 2 * 4),  # four for the classes, four for the boxes
        }
    masks = {"roi_heads.mask_head": (model.ROI_MASK_HEAD.NORM, 4)} if model.MASK_ON else {}
    if model.ROI_HEADS.NAME == "GNRes5ROIHeads":
        return {
            "backbone": (model.RESNETS.NORM, resnet - 10),
            "roi_heads.res5": (model.RESNETS.NORM, 3 * 3 + 1),
            "proposal_generator": (model.RPN.NORM, 1),
        }
    stages = 3 if model.ROI_HEADS.NAME == "CascadeROIHeads" else 1
    box_head = {(4, 1): 4, (0, 2): 0}[model.ROI_BOX_HEAD.NUM_CONV, model.ROI_BOX_HEAD.NUM_FC]
    layers = {
        "backbone.bottom_up": (model.RESNETS.NORM, resnet),
        "backbone.fpn": (model.FPN.NORM, 2 * 4),
        "proposal_generator": (model.RPN.NORM, len(model.RPN.CONV_DIMS)),
        "roi_heads.box_head": (model.ROI_BOX_HEAD.NORM, box_head * stages),
        **masks,
    }
    if model.KEYPOINT_ON:
        layers["roi_heads.keypoint_head"] = (model.ROI_KEYPOINT_HEAD.NORM, 8)
    if model.META_ARCHITECTURE == "GNPanopticFPN":  # p5 is upsampled three times, p4 twice, ...
        layers["sem_seg_head"] = (model.SEM_SEG_HEAD.NORM, 3 + 2 + 1 + 1)
    return layers


NORM_TYPES = {
    "GN": GroupNorm,
    "LN": GroupNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
}


# The GN layers of well-known models.
GN_LAYERS = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml": 69,
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_gn_3x.yaml": 120,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml": 53,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_heads_3x.yaml": 16,
    "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml": 69 + 8,
    "tensorpack/mask_rcnn_R_50_FPN_gn_2x.yaml": 69,
    "tensorpack/scratch_cascade_mask_rcnn_R_101_FPN_gn_9x.yaml": 120 + 8,
    "COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml": 53 + 6 + 8,
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.yaml": 69 + 7,
    "GN-paper/table5_frozen_bn.yaml": 0,
    "GN-paper/table5_frozen_bn_gn_box_head.yaml": 4,
    "GN-paper/table5_gn_gn_box_head.yaml": 65,
    "GN-paper/table6_R_101_frozen_bn.yaml": 0,
    "GN-paper/table7_scratch_R_50_syncbn.yaml": 0,
}


def test_norms_are_where_the_config_says(model):
    cfg = model.cfg
    norms = model.layers((nn.GroupNorm, nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))
    counted = 0
    for component, (norm, count) in expected_norm_layers(cfg).items():
        layers = [m for n, m in norms.items() if re.match(rf"{component}[._]", n)]
        assert len(layers) == (count if norm else 0), component
        assert all(type(layer) is NORM_TYPES[norm] for layer in layers), component
        counted += len(layers)
        for layer in layers if norm in ("GN", "LN") else ():
            gn = cfg.MODEL.GN
            groups = gn.NUM_GROUPS or layer.num_channels // gn.CHANNELS_PER_GROUP
            assert layer.num_groups == (1 if norm == "LN" else groups)
            assert layer.eps == 1e-5
    assert counted == len(norms)  # and nowhere else
    for name in GN_LAYERS.keys() & set(MODELS[model.name]):
        assert len(model.layers(nn.GroupNorm)) == GN_LAYERS[name]


def test_weight_standardization_is_where_gn_is(model):
    before_gn = {n.removesuffix(".norm") for n in model.layers(GroupNorm)}
    if is_preactivated(model.cfg):  # GN stands before each convolution there
        resnet = "backbone.bottom_up."
        before_gn = {n for n in before_gn if not n.startswith(resnet)}
        before_gn |= {n for n in model.layers(nn.Conv2d) if n.startswith(resnet)}
    convs = model.layers(nn.Conv2d).items()
    standardized = {n for n, m in convs if getattr(m, "weight_standardization", "")}
    assert standardized == (before_gn if "_ws_" in model.name else set())


def resnet_stages(cfg) -> list[str]:
    resnet = "backbone.bottom_up" if cfg.MODEL.FPN.IN_FEATURES else "backbone"
    return [f"{resnet}.{stage}." for stage in ("stem", "res2", "res3", "res4", "res5")]


def test_what_is_frozen_and_what_decays(model):
    trained = {id(p) for p in model.module.parameters() if p.requires_grad}
    parameters = {n: id(p) for n, p in model.module.named_parameters()}
    frozen = tuple(resnet_stages(model.cfg)[: model.cfg.MODEL.BACKBONE.FREEZE_AT])
    assert {n for n, p in parameters.items() if p not in trained} == {
        n for n in parameters if n.startswith(frozen)
    }
    norms = model.layers((nn.GroupNorm, nn.modules.batchnorm._BatchNorm)).values()
    exempt = {id(p) for norm in norms for p in norm.parameters()}
    if has_biases(cfg := model.cfg):
        exempt |= {p for n, p in parameters.items() if n.endswith(".bias")}
    assert cfg.SOLVER.WEIGHT_DECAY > 0
    for group in build_optimizer(cfg, model.module).param_groups:
        decays = group["weight_decay"] > 0
        assert all((id(p) in exempt) != decays for p in group["params"])


@pytest.mark.parametrize("name", KINDS)
def test_an_iteration(name):
    cfg = thin(name)
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage():  # the model logs to one
        losses = model([training_image()])
    assert set(losses) == expected_losses(cfg)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name.startswith(tuple(resnet_stages(cfg))) and "conv" in name:
            assert parameter.grad.any(), name


def expected_losses(cfg):
    if cfg.MODEL.META_ARCHITECTURE == "GNRetinaNet":
        return {"loss_cls", "loss_box_reg"}
    losses = {"loss_rpn_cls", "loss_rpn_loc"}
    cascade = cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    for stage in ("_stage0", "_stage1", "_stage2") if cascade else ("",):
        losses |= {f"loss_cls{stage}", f"loss_box_reg{stage}"}
    if cfg.MODEL.MASK_ON:
        losses.add("loss_mask")
    if cfg.MODEL.KEYPOINT_ON:
        losses.add("loss_keypoint")
    if cfg.MODEL.META_ARCHITECTURE == "GNPanopticFPN":
        losses.add("loss_sem_seg")
    return losses


def test_parameters_are_those_of_detectron2(model):
    cfg = model.cfg.MODEL
    # Detectron2 has no key for these.
    assert not cfg.RPN.NORM and not cfg.ROI_KEYPOINT_HEAD.NORM
    assert not cfg.ROI_BOX_HEAD.FC_NORM and not cfg.ROI_MASK_HEAD.DECONV_NORM
    theirs = without_memory(detectron2_config(model.cfg))
    if has_biases(model.cfg):
        for name, conv in theirs.named_modules():
            if getattr(conv, "norm", None) is not None and "bottom_up" not in name:
                conv.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels))
    ours, theirs = (
        [
            (name, value.shape)
            for name, value in module.state_dict().items()
            # That ResNet is timm's: tests/modeling/test_resnetv2.py.
            if not (is_preactivated(model.cfg) and name.startswith("backbone.bottom_up."))
        ]
        for module in (model.module, theirs)
    )
    assert ours == theirs


def test_anchors_of_retinanet():
    sizes = as_shipped("COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for given, size in zip(sizes, (32, 64, 128, 256, 512), strict=True):
        assert given == pytest.approx([size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)], rel=1e-5)


def test_number_of_configs():
    assert len(CONFIGS) >= 90 and GN_LAYERS.keys() <= set(CONFIGS)
