"""Every config that ships: it builds and trains an iteration, GN is where it says, the parameters
are those of Detectron2's own model, and the schedule is the one in its name.

Configs that differ in their schedule alone share one model.
"""

import dataclasses
import functools
import json
import math
import re

import pytest
import timm
import torch
from detectron2.checkpoint.catalog import ModelCatalog
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from helpers import ROOT, config
from torch import nn

import gn_detect
from gn_detect.config import ConfigError, load_config
from gn_detect.engine.guards import check_recipe
from gn_detect.layers import GroupNorm
from gn_detect.solver import resolve_schedule

CONFIGS = sorted(
    p.relative_to(ROOT / "configs").as_posix()
    for p in (ROOT / "configs").rglob("*.yaml")
    if not p.name.startswith("Base-")
)
PUBLISHED = json.loads((ROOT / "configs" / "published.json").read_text())
every_config = pytest.mark.parametrize("name", CONFIGS)


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def as_shipped(name):
    return load_config(gn_detect.get_config_file(name))


def small_run(name):
    """The config, with fewer proposals: no layer depends on their number."""
    classes = 1 if "keypoint" in name else 80
    return config(
        name,
        *("MODEL.ROI_HEADS.NUM_CLASSES", classes, "INPUT.MASK_FORMAT", "bitmask"),
        *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10),
        *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 16, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
    )


def training_image(cfg):
    """An image of 96 x 64 pixels with two objects."""
    instances = Instances((64, 96))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 6, 40, 50], [30, 20, 90, 60]]))
    instances.gt_classes = torch.tensor([0, 0 if cfg.MODEL.KEYPOINT_ON else 3])
    if cfg.MODEL.MASK_ON:
        masks = torch.zeros(2, 64, 96, dtype=torch.bool)
        masks[0, 6:50, 4:40] = masks[1, 20:60, 40:90] = True
        instances.gt_masks = BitMasks(masks)
    if cfg.MODEL.KEYPOINT_ON:
        points = torch.tensor([22.0, 28, 2]), torch.tensor([60.0, 40, 2])
        instances.gt_keypoints = Keypoints(torch.stack([p.repeat(17, 1) for p in points]))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)
    sem_seg = torch.randint(0, 54, (64, 96), generator=generator)
    return {"image": image, "instances": instances, "sem_seg": sem_seg, "height": 64, "width": 96}


@dataclasses.dataclass
class Iteration:
    """What the tests look at, of a model that is too large to be kept."""

    norms: dict[str, nn.Module]  # name -> layer
    convs: dict[str, str]  # name of a convolution -> its weight standardization
    losses: dict[str, float]
    gradients: dict[str, float | None]  # name -> largest absolute value, None where there is none
    frozen: set[str]
    decay_of_gn: set[float]


ITERATIONS: dict[str, Iteration] = {}


def iteration(name) -> Iteration:
    cfg = small_run(name)
    like = cfg.MODEL.clone()
    like.PIXEL_MEAN = like.PIXEL_STD = []  # no layer depends on them
    key = like.dump()
    if key not in ITERATIONS:
        ITERATIONS[key] = run_iteration(cfg)
    return ITERATIONS[key]


def run_iteration(cfg) -> Iteration:
    torch.manual_seed(0)
    model = build_model(cfg)
    with EventStorage():  # the model logs to one
        losses = model([training_image(cfg)])
    sum(losses.values()).backward()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    norm_types = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    gn = {id(p) for m in modules.values() if isinstance(m, nn.GroupNorm) for p in m.parameters()}
    decay = {
        group["weight_decay"]
        for group in build_optimizer(cfg, model).param_groups
        if any(id(p) in gn for p in group["params"])
    }
    return Iteration(
        convs={
            n: getattr(m, "weight_standardization", "")
            for n, m in modules.items()
            if isinstance(m, nn.Conv2d)
        },
        losses={k: v.item() for k, v in losses.items()},
        gradients={
            n: None if p.grad is None else p.grad.abs().max().item()
            for n, p in parameters.items()
            if p.requires_grad
        },
        frozen={n for n, p in parameters.items() if not p.requires_grad},
        decay_of_gn=decay,
        norms={n: m.to("meta") for n, m in modules.items() if isinstance(m, norm_types)},
    )


def is_preactivated(cfg) -> bool:
    return cfg.MODEL.BACKBONE.NAME == "build_gn_resnetv2_fpn_backbone"


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
    if model.META_ARCHITECTURE == "PanopticFPN":  # p5 is upsampled three times, p4 twice, ...
        layers["sem_seg_head"] = (model.SEM_SEG_HEAD.NORM, 3 + 2 + 1 + 1)
    return layers


NORM_TYPES = {
    "GN": GroupNorm,
    "LN": GroupNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
}


@every_config
def test_norms_are_where_the_config_says(name):
    cfg, norms = as_shipped(name), iteration(name).norms
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


@pytest.mark.parametrize(
    "name, layers",
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x", 69),
        ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_gn_3x", 120),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x", 53),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_heads_3x", 16),
        ("COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x", 69 + 8),
        ("COCO-Detection/retinanet_R_50_FPN_gn_3x", 53 + 6 + 8),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x", 69 + 7),
        ("GN-paper/table5_frozen_bn", 0),
        ("GN-paper/table5_frozen_bn_gn_box_head", 4),
        ("GN-paper/table5_gn_gn_box_head", 65),
        ("GN-paper/table6_R_101_frozen_bn", 0),
        ("GN-paper/table7_scratch_R_50_syncbn", 0),
    ],
)
def test_the_number_of_gn_layers(name, layers):
    norms = iteration(f"{name}.yaml").norms.values()
    assert sum(isinstance(m, nn.GroupNorm) for m in norms) == layers


@every_config
def test_weight_standardization_is_where_gn_is(name):
    run = iteration(name)
    standardized = {n for n, variant in run.convs.items() if variant}
    before_gn = {n.removesuffix(".norm") for n, m in run.norms.items() if type(m) is GroupNorm}
    if is_preactivated(as_shipped(name)):  # GN stands before each convolution there
        before_gn = {n for n in before_gn if not n.startswith("backbone.bottom_up.")}
        before_gn |= {n for n in run.convs if n.startswith("backbone.bottom_up.")}
    assert standardized == (before_gn if "_ws_" in name else set())


@every_config
def test_an_iteration(name):
    cfg, run = as_shipped(name), iteration(name)
    assert set(run.losses) == expected_losses(cfg)
    assert all(math.isfinite(loss) for loss in run.losses.values()), run.losses
    assert all(g is not None and math.isfinite(g) for g in run.gradients.values())
    resnet = "backbone" if "C4" in name else "backbone.bottom_up"
    stages = [f"{resnet}.{stage}." for stage in ("stem", "res2", "res3", "res4")]
    frozen_stages = tuple(stages[: cfg.MODEL.BACKBONE.FREEZE_AT])
    assert all(n.startswith(frozen_stages) for n in run.frozen)
    assert not any(n.startswith(frozen_stages) for n in run.gradients)
    for stage in stages[cfg.MODEL.BACKBONE.FREEZE_AT :]:
        reached = [g for n, g in run.gradients.items() if n.startswith(stage) and "conv" in n]
        assert reached and min(reached) > 0, stage


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
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        losses.add("loss_sem_seg")
    return losses


@every_config
def test_gamma_and_beta_have_no_weight_decay(name):
    cfg, run = as_shipped(name), iteration(name)
    has_gn = any(norm in ("GN", "LN") and n for norm, n in expected_norm_layers(cfg).values())
    assert run.decay_of_gn == ({0.0} if has_gn else set()) and cfg.SOLVER.WEIGHT_DECAY > 0


DETECTRON2_NAMES = {
    "build_gn_resnet_backbone": "build_resnet_backbone",
    "build_gn_resnet_fpn_backbone": "build_resnet_fpn_backbone",
    "build_gn_resnetv2_fpn_backbone": "build_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone": "build_retinanet_resnet_fpn_backbone",
    "GNRPNHead": "StandardRPNHead",
    "GNRes5ROIHeads": "Res5ROIHeads",
    "GNFastRCNNConvFCHead": "FastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead": "MaskRCNNConvUpsampleHead",
    "GNKRCNNConvDeconvUpsampleHead": "KRCNNConvDeconvUpsampleHead",
    "GNRetinaNet": "RetinaNet",
    "GNSemSegFPNHead": "SemSegFPNHead",
}


def detectron2_config(ours):
    """The config in Detectron2's keys and names alone."""

    def copy(node, into):
        for key, value in into.items():
            if isinstance(value, dict):
                copy(node[key], value)
            else:
                name = node[key] if isinstance(node[key], str) else ""
                into[key] = DETECTRON2_NAMES.get(name, node[key])

    cfg = get_cfg()
    copy(ours.MODEL, cfg.MODEL)
    return cfg


def shapes(cfg):
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return [(k, v.shape) for k, v in build_model(cfg).state_dict().items()]


@every_config
def test_parameters_are_those_of_detectron2(name):
    cfg = small_run(name)
    model = cfg.MODEL
    # Detectron2 has no key for these.
    assert not model.RPN.NORM and not model.ROI_KEYPOINT_HEAD.NORM
    assert not model.ROI_BOX_HEAD.FC_NORM and not model.ROI_MASK_HEAD.DECONV_NORM
    ours, theirs = shapes(cfg), shapes(detectron2_config(cfg))
    if is_preactivated(cfg):  # that ResNet is timm's: tests/modeling/test_resnetv2.py
        ours, theirs = (
            [(k, shape) for k, shape in both if not k.startswith("backbone.bottom_up.")]
            for both in (ours, theirs)
        )
    assert ours == theirs


def test_anchors_of_retinanet():
    sizes = as_shipped("COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml").MODEL.ANCHOR_GENERATOR.SIZES
    for given, size in zip(sizes, (32, 64, 128, 256, 512), strict=True):
        assert given == pytest.approx([size, size * 2 ** (1 / 3), size * 2 ** (2 / 3)], rel=1e-5)


@every_config
def test_schedule(name):
    cfg = as_shipped(name)
    solver = cfg.SOLVER
    assert solver.IMS_PER_BATCH == solver.REFERENCE_BATCH_SIZE
    images = solver.MAX_ITER * solver.IMS_PER_BATCH
    stem = name.removesuffix(".yaml")
    if match := re.search(r"_(\d+)x$", stem):
        assert solver.IMS_PER_BATCH == 16 and images == int(match[1]) * 90_000 * 16
    elif match := re.search(r"_(\d+)ep$", stem):
        assert images == pytest.approx(int(match[1]) * 118_000, rel=1e-6)
    elif name.startswith("GN-paper/"):
        long = "_long" in name or "scratch" in name or "table3" in name
        assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (16, 270_000 if long else 180_000)
    else:
        assert name.startswith("quickstart/") and solver.STEPS == ()
        return
    before_the_end = tuple((solver.MAX_ITER - s) * solver.IMS_PER_BATCH // 16 for s in solver.STEPS)
    if "_lsj_" in name:  # of Detectron2, at 8/9 and 26/27
        scale = solver.MAX_ITER // 184_375
        assert solver.STEPS == (163_889 * scale, 177_546 * scale)
    elif stem.endswith("_1x") or re.search(r"_ws_2x$", stem):
        assert before_the_end == (30_000, 10_000)
    else:
        assert before_the_end == (60_000, 20_000)


@every_config
def test_weights_and_guards(name, caplog):
    """What is fine-tuned has weights that fit, what is not has nothing frozen; and where there are
    no public weights, the user is told so."""
    cfg = as_shipped(name).clone()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 80  # as from the data
    weights = cfg.MODEL.WEIGHTS
    depth = cfg.MODEL.RESNETS.DEPTH
    from_scratch = any(word in name for word in ("scratch", "_lsj_", "table3", "quickstart"))
    to_be_named = name.endswith("_ln.yaml")
    assert (weights == "") == (from_scratch or to_be_named)
    assert cfg.MODEL.BACKBONE.FREEZE_AT == (0 if from_scratch else 2)
    if weights.startswith("catalog://"):
        assert ModelCatalog.get(weights.removeprefix("catalog://")).startswith("https://")
    elif weights.startswith("timm://"):
        assert timm.is_model_pretrained(weights.removeprefix("timm://"))
    elif "_ws_" in name:
        letter = "X" if "_X_" in name else "R"
        assert weights.endswith(f"syqiao/WeightStandardization/{letter}-{depth}-GN-WS.pth.tar")
    elif weights:
        assert weights == f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
    assert (
        f"_R_{cfg.MODEL.RESNETS.DEPTH}" in name
        or f"_X_{cfg.MODEL.RESNETS.DEPTH}" in name
        or (cfg.MODEL.RESNETS.DEPTH == 50 and "GN-paper" in name)
    )
    resolve_schedule(cfg, processes=1)
    if to_be_named:
        with pytest.raises(ConfigError, match="MODEL.WEIGHTS is empty"):
            check_recipe(cfg, processes=1, num_images=600)
        cfg.MODEL.WEIGHTS = "converted.pth"
    check_recipe(cfg, processes=1, num_images=600 if "shapes" in name else 118_000)
    assert not caplog.records


def test_the_input_of_weights_in_the_layout_of_torchvision_is_its_own():
    """Other weights of timm are compared with timm in tests/modeling/test_resnetv2.py."""
    rgb = {name for name in CONFIGS if as_shipped(name).INPUT.FORMAT == "RGB"}
    of_timm = {n for n in CONFIGS if as_shipped(n).MODEL.WEIGHTS.startswith("timm://resnetv2")}
    a1h = {name for name in CONFIGS if "_a1h_" in name}
    assert rgb == {name for name in CONFIGS if "_ws_" in name} | of_timm | a1h
    for name in rgb - of_timm:
        model = as_shipped(name).MODEL
        assert model.PIXEL_MEAN == pytest.approx([255 * v for v in (0.485, 0.456, 0.406)])
        assert model.PIXEL_STD == pytest.approx([255 * v for v in (0.229, 0.224, 0.225)])


def test_large_scale_jitter_configs():
    names = [name for name in CONFIGS if as_shipped(name).INPUT.LSJ.ENABLED]
    assert names == [name for name in CONFIGS if "_lsj_" in name] != []
    for name in names:
        cfg = as_shipped(name)
        lsj, solver = cfg.INPUT.LSJ, cfg.SOLVER
        assert (lsj.MIN_SCALE, lsj.MAX_SCALE, lsj.IMAGE_SIZE) == (0.1, 2.0, 1024)
        assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (64, 0.1, 4e-5)
        assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (500, 0.067)
        assert solver.AMP.ENABLED and cfg.MODEL.RPN.CONV_DIMS == [-1, -1]


def test_published_figures_belong_to_configs_and_sources():
    assert PUBLISHED["configs"].keys() <= set(CONFIGS)
    assert {row["source"] for row in PUBLISHED["configs"].values()} == PUBLISHED["sources"].keys()
    for name, row in PUBLISHED["configs"].items():
        assert row.keys() <= {"box", "mask", "keypoint", "PQ", "source", "note"}, name
        assert not {"box", "mask", "keypoint", "PQ"}.isdisjoint(row) or "note" in row, name


def test_number_of_configs(capsys):
    with capsys.disabled():
        print(f"\n{len(CONFIGS)} configs, {len(ITERATIONS)} models")
    assert len(CONFIGS) >= 90
