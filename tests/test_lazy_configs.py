"""Every lazy config: it builds, has GN where it should, trains a step, and agrees with the YAML of
the same name wherever there is one: keys, settings, losses, schedule and data."""

import dataclasses
import math
import re
import zlib

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from helpers import ROOT, training_image
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

import gn_detect
from gn_detect.config import ConfigError, load_config
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.layers import GroupNorm

LAZY = ROOT / "configs/lazy"


def load(name):
    return LazyConfig.load(str(LAZY / f"{name}.py"))


def yaml_config(name):
    cfg = load_config(str(ROOT / f"configs/{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    for section in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        if section.NUM_CLASSES is None:  # it follows the data
            section.NUM_CLASSES = 80
    return cfg


NAMES = sorted(
    path.relative_to(LAZY).with_suffix("").as_posix()
    for path in LAZY.rglob("*.py")
    if path.relative_to(LAZY).parts[0] != "common"
)
COUNTERPARTS = [name for name in NAMES if (ROOT / f"configs/{name}.yaml").is_file()]

every_config = pytest.mark.parametrize("name", NAMES)
every_counterpart = pytest.mark.parametrize("name", COUNTERPARTS)


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclasses.dataclass
class Summary:
    """What a model is, and what it does in a training step."""

    shapes: dict[str, torch.Size]  # of the state dict
    layers: dict[str, type]  # modules without modules in them
    settings: dict
    num_groups: dict[str, int]
    standardized: dict[str, str]
    frozen: set[str]
    losses: dict[str, float]
    bad_gradients: list[str]  # of parameters that are trained


_summaries: dict[str, Summary] = {}


def lazy_summary(name) -> Summary:
    """Of the model of a lazy config; configs of the same model share one."""
    cfg = load(name)
    key = str(OmegaConf.to_container(cfg.model))
    if key not in _summaries:
        _summaries[key] = summarize(instantiate(cfg.model))
    return _summaries[key]


def yaml_summary(name) -> Summary:
    cfg = yaml_config(name)
    cfg.MODEL.WEIGHTS = ""
    key = cfg.MODEL.dump()
    if key not in _summaries:
        _summaries[key] = summarize(build_model(cfg))
    return _summaries[key]


def summarize(model) -> Summary:
    told = settings(model)
    set_weights(model)
    losses = step(model)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return Summary(
        shapes={k: v.shape for k, v in model.state_dict().items()},
        layers={n: type(m) for n, m in modules.items() if not any(m.children())},
        settings=told,
        num_groups={n: m.num_groups for n, m in modules.items() if isinstance(m, GroupNorm)},
        standardized={
            n: m.weight_standardization
            for n, m in modules.items()
            if getattr(m, "weight_standardization", "")
        },
        frozen={n for n, p in parameters.items() if not p.requires_grad},
        losses=losses,
        bad_gradients=[
            n
            for n, p in parameters.items()
            if p.requires_grad and not (p.grad is not None and p.grad.isfinite().all())
        ],
    )


def settings(obj):
    """What an object was told, as plain values: numbers, strings and containers, recursively."""
    if obj is None or isinstance(obj, (bool, int, float, str)):
        return obj
    if isinstance(obj, (list, tuple, ListConfig)):
        return [settings(value) for value in obj]
    if isinstance(obj, (dict, DictConfig)):
        if "loss_box_reg" in obj:  # a loss that is not listed has the weight 1
            return {key: weight for key, weight in obj.items() if weight != 1}
        return {key: settings(value) for key, value in obj.items()}
    if isinstance(obj, nn.Module):
        own = {k: v for k, v in vars(obj).items() if k not in vars(nn.Module())}
        children = {name: settings(child) for name, child in obj.named_children()}
        return {"own": settings(own), **children}
    if type(obj).__module__.startswith(("LabGym.detectron2", "detectron2", "gn_detect")):
        return [type(obj).__name__, settings(vars(obj))]
    return type(obj).__name__  # tensors, devices, loggers


@torch.no_grad()
def set_weights(model) -> None:
    """Weights that depend on their names alone, and norms that are not the identity."""
    for name, value in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if value.dim() > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.uniform_(-0.2, 0.2, generator=generator)
            value.add_(name.endswith("weight"))  # gamma


def step(model) -> dict[str, float]:
    """The losses of a training step on a small image, with few RoIs, to be quick on a CPU."""
    model.train()
    if hasattr(model, "roi_heads"):
        model.roi_heads.batch_size_per_image = 8
    torch.manual_seed(1)  # proposals and RoIs are sampled
    with EventStorage():  # the model logs to one
        losses = model([training_image()])
    sum(losses.values()).backward()
    return {name: loss.item() for name, loss in losses.items()}


def depth_of(name):
    return next(depth for depth in (18, 50, 101) if re.search(rf"_{depth}(d|x1)?_", name))


BACKBONE_NORMS = {18: 20, 50: 53, 101: 104}  # one for each convolution of the ResNet, by depth
# But in pre-activation ResNets: none after the (last) convolution of the stem and in shortcuts.
PREACTIVATED = {"R_50d_v2": -1 - 4 + 2, "R_50x1_bit": -1 - 4}


def expected_norms(name) -> dict[str, int]:
    """Prefix of layer names -> number of GN layers there; none anywhere else."""
    backbone = BACKBONE_NORMS[depth_of(name)]
    backbone += sum(difference for part, difference in PREACTIVATED.items() if part in name)
    if "_C4_" in name:
        return {"backbone.": 43, "roi_heads.res5.": 10}
    if "retinanet" in name:
        return {"backbone.bottom_up.": backbone, "backbone.fpn_": 6, "head.": 8}
    counts = {"backbone.bottom_up.": 0 if "_heads_" in name else backbone, "backbone.fpn_": 8}
    counts["roi_heads.box_head."] = 12 if "cascade" in name else 4
    if "mask" in name or "panoptic" in name:
        counts["roi_heads.mask_head."] = 4
    if "panoptic" in name:
        counts["sem_seg_head."] = 1 + 1 + 2 + 3
    return counts


def is_from_scratch(name):
    return name.split("/")[-1].startswith("scratch") or "_lsj_" in name or "quickstart" in name


def test_every_task_is_there(capsys):
    with capsys.disabled():
        print(f"\n{len(NAMES)} lazy configs, {len(COUNTERPARTS)} with a YAML of the same name")
    families = {name.split("/")[-1].split("_R_")[0].split("_X_")[0] for name in NAMES}
    assert families == {
        *("mask_rcnn", "scratch_mask_rcnn", "cascade_mask_rcnn", "scratch_cascade_mask_rcnn"),
        *("faster_rcnn", "scratch_faster_rcnn", "cascade_rcnn", "retinanet"),
        *("keypoint_rcnn", "scratch_keypoint_rcnn", "panoptic_fpn"),
    }
    yamls = {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        for path in (ROOT / "configs").glob("*/*.yaml")
        if not path.name.startswith("Base-") and path.parent.name != "GN-paper"
    }
    # Its data, and with it the number of classes, come from the command line of train_net.py.
    assert set(NAMES) == yamls - {"quickstart/mask_rcnn_R_18_FPN_gn_photos"}
    assert NAMES == COUNTERPARTS


@every_config
def test_gn_where_it_should_be(name):
    summary, expected = lazy_summary(name), expected_norms(name)
    norms = summary.num_groups
    assert {p: sum(n.startswith(p) for n in norms) for p in expected} == expected
    assert len(norms) == sum(expected.values())
    assert set(norms.values()) == {16 if "quickstart" in name else 32}
    other = {n: t.__name__ for n, t in summary.layers.items() if "Norm" in t.__name__}
    other = {n: kind for n, kind in other.items() if kind != "GroupNorm"}
    frozen_bn = BACKBONE_NORMS[depth_of(name)] if "_heads_" in name else 0
    assert sum(n.startswith("backbone.bottom_up.") for n in other) == len(other) == frozen_bn
    assert set(other.values()) == ({"FrozenBatchNorm2d"} if frozen_bn else set())


@every_config
def test_weights_are_standardized_where_the_name_says_so(name):
    standardized = lazy_summary(name).standardized
    variant = "timm" if "_bit_" in name else "authors"
    assert set(standardized.values()) == ({variant} if "_ws_" in name else set())
    convs = sum(expected_norms(name).values()) - PREACTIVATED["R_50x1_bit"] * ("_bit_" in name)
    assert len(standardized) == ("_ws_" in name) * convs


@every_config
def test_first_stages_are_frozen_unless_from_scratch(name):
    summary = lazy_summary(name)
    bottom_up = "backbone." if "_C4_" in name else "backbone.bottom_up."
    stages = [] if is_from_scratch(name) else ["stem.", "res2."]
    first = tuple(bottom_up + stage for stage in stages)
    expected = {n for n in summary.shapes if first and n.startswith(first)}
    if "_heads_" in name:  # frozen BN has no parameters at all
        expected = {n for n in expected if ".norm." not in n}
    assert summary.frozen == expected


@every_config
def test_weights_are_those_of_the_yaml_config(name):
    yaml = load_config(gn_detect.get_config_file(f"{name}.yaml"))
    assert load(name).train.init_checkpoint == yaml.MODEL.WEIGHTS


@every_config
def test_one_training_step(name):
    summary = lazy_summary(name)
    assert summary.losses and all(map(math.isfinite, summary.losses.values()))
    assert not summary.bad_gradients


ITERATIONS = {  # of the schedule: length and drops of the learning rate
    "1x": (90000, 60000, 80000),
    "2x": (180000, 120000, 160000),
    "3x": (270000, 210000, 250000),
    "6x": (540000, 480000, 520000),
    "9x": (810000, 750000, 790000),
    "100ep": (184375, 163889, 177546),
    "200ep": (368750, 327778, 355092),
    "400ep": (737500, 655556, 710184),
}


def learning_rate(cfg, iterations):
    """The learning rate of a lazy config at each of ``iterations``."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], cfg.optimizer.lr)
    multiplier = instantiate(cfg.lr_multiplier)
    return rates(LRMultiplier(optimizer, multiplier, cfg.train.max_iter), iterations)


def rates(scheduler, iterations):
    out = []
    for scheduler.last_epoch in iterations:
        out += scheduler.get_lr()
    return out


@pytest.mark.parametrize("name", [n for n in NAMES if "quickstart" not in n])
def test_schedule(name):
    cfg = load(name)
    length, first, second = ITERATIONS[name.split("_")[-1]]
    if name.endswith("_ws_2x"):  # as its authors
        first, second = 150000, 170000
    assert cfg.train.max_iter == length
    lsj = "_lsj_" in name
    base = 0.1 if lsj else 0.01 if "retinanet" in name else 0.02
    warmup, factor = (500, 0.067) if lsj else (1000, 0.001)
    points = [0, warmup, first - 1, first, second - 1, second, length - 1]
    factors = [factor, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert learning_rate(cfg, points) == pytest.approx([base * f for f in factors])
    assert cfg.dataloader.train.total_batch_size == (64 if lsj else 16)
    assert cfg.optimizer.weight_decay == (4e-5 if lsj else 1e-4)


@every_config
def test_no_weight_decay_on_gamma_and_beta(name):
    cfg = load(name)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), GroupNorm(1, 2))
    cfg.optimizer.params.model = model
    groups = instantiate(cfg.optimizer).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    conv, norm = ([decay[id(p)] for p in layer.parameters()] for layer in model)
    assert conv == [cfg.optimizer.weight_decay] * 2 and norm == [0.0] * 2


@every_counterpart
def test_same_model_as_the_yaml(name):
    ours, theirs = lazy_summary(name), yaml_summary(name)
    for field in ("shapes", "layers", "settings", "num_groups", "standardized", "frozen"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)


@every_counterpart
def test_same_recipe_as_the_yaml(name):
    cfg, theirs = load(name), yaml_config(name)
    length = cfg.train.max_iter
    assert length == theirs.SOLVER.MAX_ITER
    points = [0, theirs.SOLVER.WARMUP_ITERS // 2, theirs.SOLVER.WARMUP_ITERS, length // 2]
    points += [step + shift for step in theirs.SOLVER.STEPS for shift in (-1, 0)] + [length - 1]
    optimizer = build_optimizer(theirs, nn.Conv2d(1, 1, 1))
    expected = rates(build_lr_scheduler(theirs, optimizer), points)
    assert learning_rate(cfg, points) == pytest.approx(expected)
    (group,) = optimizer.param_groups
    for key in ("momentum", "weight_decay", "nesterov"):
        assert cfg.optimizer.get(key, False) == group[key]
    assert cfg.train.init_checkpoint == theirs.MODEL.WEIGHTS
    assert cfg.train.checkpointer.period == theirs.SOLVER.CHECKPOINT_PERIOD
    assert cfg.train.eval_period == theirs.TEST.EVAL_PERIOD
    assert cfg.train.seed == theirs.SEED
    assert cfg.train.amp.enabled == theirs.SOLVER.AMP.ENABLED


@every_counterpart
def test_same_data_as_the_yaml(name):
    loaders, theirs = load(name).dataloader, yaml_config(name)
    train, test = (instantiate(loader.mapper) for loader in (loaders.train, loaders.test))
    assert settings(train) == settings(NamingDatasetMapper(theirs, is_train=True))
    for key in ("augmentations", "image_format"):  # no annotations are read
        expected = getattr(NamingDatasetMapper(theirs, is_train=False), key)
        assert settings(getattr(test, key)) == settings(expected)
    assert (loaders.train.dataset.names,) == theirs.DATASETS.TRAIN
    assert (loaders.test.dataset.names,) == theirs.DATASETS.TEST
    assert loaders.train.total_batch_size == theirs.SOLVER.IMS_PER_BATCH
    assert loaders.train.num_workers == theirs.DATALOADER.NUM_WORKERS
    filter_empty = loaders.train.dataset.get("filter_empty", True)
    assert filter_empty == theirs.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def test_lazy_configs_are_found_by_name():
    path = gn_detect.get_config_file("lazy/COCO-Detection/retinanet_R_50_FPN_gn_1x.py")
    assert path == str(LAZY / "COCO-Detection/retinanet_R_50_FPN_gn_1x.py")
    with pytest.raises(FileNotFoundError, match="lazy/COCO-Detection/retinanet_R_50_FPN_gn_1x.py"):
        gn_detect.get_config_file("lazy/COCO-Detection/retinanet_R_50_gn_1x.py")


def test_groups_that_do_not_fit_name_the_layers():
    cfg = load("quickstart/mask_rcnn_R_18_FPN_gn_shapes")
    cfg.model.backbone.norm.num_groups = 24
    with pytest.raises(ConfigError, match="model.backbone.fpn_lateral2.norm: 64 channels"):
        instantiate(cfg.model)
