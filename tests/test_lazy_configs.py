"""Every lazy config agrees with the YAML of the same name, which tests/test_configs.py holds to its
own: keys, settings and losses of the model, schedule, data."""

import dataclasses

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import LRMultiplier, build_lr_scheduler, build_optimizer
from detectron2.utils.events import EventStorage
from helpers import ROOT, training_image
from omegaconf import DictConfig, ListConfig
from torch import nn

import gn_detect
from gn_detect.checkpoint import WeightGuards
from gn_detect.config import ConfigError, load_config
from gn_detect.data.loader import NamingDatasetMapper, resumable_train_loader
from gn_detect.engine.guards import check_recipe
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.layers import GroupNorm
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

LAZY = ROOT / "configs/lazy"
NAMES = sorted(
    path.relative_to(LAZY).with_suffix("").as_posix()
    for path in LAZY.rglob("*.py")
    if path.parent.name != "common" and not path.name.startswith("resnet_")
)
every_config = pytest.mark.parametrize("name", NAMES)

pytestmark = pytest.mark.slow


def load(name):
    return LazyConfig.load(str(LAZY / f"{name}.py"))


def yaml_config(name):
    cfg = load_config(gn_detect.get_config_file(f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])
    for section in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        if section.NUM_CLASSES is None:  # it follows the data
            section.NUM_CLASSES = 1 if cfg.MODEL.KEYPOINT_ON else 80
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    return cfg


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


def layers(model):
    """The class of each layer, and which of its parameters are trained."""
    own = {
        name: [(n, p.shape, p.requires_grad) for n, p in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
    }
    return {
        n: (type(model.get_submodule(n)), parameters) for n, parameters in own.items() if parameters
    }


@torch.no_grad()
def losses(model) -> dict[str, float]:
    """Of a small image, with few RoIs, to be quick on a CPU."""
    if hasattr(model, "roi_heads"):
        model.roi_heads.batch_size_per_image = 8
    torch.manual_seed(1)  # proposals and RoIs are sampled
    with EventStorage():  # the model logs to one
        return {name: loss.item() for name, loss in model([training_image()]).items()}


def test_each_kind_of_detector_has_an_example():
    kinds = ("faster_rcnn", "C4", "retinanet", "mask_rcnn", "cascade_mask", "keypoint", "panoptic")
    kinds += ("scratch", "lsj", "heads", "gn_ws", "X_50", "v2", "quickstart")
    assert [kind for kind in kinds if not any(kind in name for name in NAMES)] == []


@every_config
def test_same_model_as_the_yaml(name):
    ours, theirs = instantiate(load(name).model), build_model(yaml_config(name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert layers(ours) == layers(theirs)
    assert settings(ours) == settings(theirs)
    with torch.no_grad():  # norms that are not the identity
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter), alpha=0.3)
    ours.load_state_dict(theirs.state_dict())
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


@every_config
def test_same_guards_as_the_yaml(name, caplog):
    cfg = load_lazy_config(str(LAZY / f"{name}.py"), ["train.device=cpu"])
    theirs = yaml_config(name)
    resolve_schedule(Settings(cfg), 1)
    check_recipe(cfg, processes=1, num_images=600 if "shapes" in name else 118_000)
    assert not caplog.records
    ours, theirs = (WeightGuards.from_config(c) for c in (cfg, theirs))
    told = {} if "_v2_" not in name else {"stride_in_1x1": None}  # no argument of its blocks
    assert ours.ours == dataclasses.replace(theirs.ours, **told)
    switches = theirs.run.cfg.GUARDS
    assert {name: ours.run[name] for name in switches} == dict(switches)


def rates(scheduler, iterations):
    out = []
    for scheduler.last_epoch in iterations:
        out += scheduler.get_lr()
    return out


@every_config
def test_same_recipe_as_the_yaml(name):
    cfg, theirs = load(name), yaml_config(name)
    solver, length = theirs.SOLVER, cfg.train.max_iter
    assert length == solver.MAX_ITER
    points = [0, solver.WARMUP_ITERS // 2, solver.WARMUP_ITERS, length // 2]
    points += [step + shift for step in solver.STEPS for shift in (-1, 0)] + [length - 1]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), GroupNorm(1, 2))
    expected = build_optimizer(theirs, model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    for ours, group in zip(optimizer.param_groups, expected.param_groups, strict=True):
        assert ours["params"] == group["params"]
        for key in ("lr", "momentum", "weight_decay", "nesterov"):  # no decay of gamma and beta
            assert ours[key] == group[key]
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), length)
    assert rates(scheduler, points) == pytest.approx(
        rates(build_lr_scheduler(theirs, expected), points)
    )
    assert cfg.train.init_checkpoint == theirs.MODEL.WEIGHTS
    assert cfg.train.checkpointer.period == solver.CHECKPOINT_PERIOD
    assert cfg.train.eval_period == theirs.TEST.EVAL_PERIOD
    assert cfg.train.seed == theirs.SEED
    assert (cfg.train.amp.enabled, cfg.train.amp.dtype) == (solver.AMP.ENABLED, solver.AMP.DTYPE)
    for key in ("reference_batch_size", "ims_per_gpu", "accumulate_steps"):
        assert cfg.train[key] == solver[key.upper()]
    off = {key for key, on in theirs.GUARDS.items() if not on}
    assert {key.upper() for key, on in cfg.train.guards.items() if not on} == off


@every_config
def test_same_data_as_the_yaml(name):
    loaders, theirs = load(name).dataloader, yaml_config(name)
    train, test = (instantiate(loader.mapper) for loader in (loaders.train, loaders.test))
    assert settings(train) == settings(NamingDatasetMapper(theirs, is_train=True))
    for key in ("augmentations", "image_format"):  # no annotations are read
        expected = getattr(NamingDatasetMapper(theirs, is_train=False), key)
        assert settings(getattr(test, key)) == settings(expected)
    assert loaders.train._target_ is resumable_train_loader
    assert (loaders.train.dataset.names,) == theirs.DATASETS.TRAIN
    assert (loaders.test.dataset.names,) == theirs.DATASETS.TEST
    assert loaders.train.total_batch_size == theirs.SOLVER.IMS_PER_BATCH
    assert loaders.train.num_workers == theirs.DATALOADER.NUM_WORKERS
    filter_empty = loaders.train.dataset.get("filter_empty", True)
    assert filter_empty == theirs.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    keypoints = theirs.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    expected = keypoints if theirs.MODEL.KEYPOINT_ON else 0
    assert loaders.train.dataset.get("min_keypoints", 0) == expected


def test_lazy_configs_are_found_by_name():
    path = gn_detect.get_config_file("lazy/COCO-Detection/retinanet_R_50_FPN_gn_1x.py")
    assert path == str(LAZY / "COCO-Detection/retinanet_R_50_FPN_gn_1x.py")
    with pytest.raises(FileNotFoundError, match="lazy/COCO-Detection/retinanet_R_50_FPN_gn_1x.py"):
        gn_detect.get_config_file("lazy/COCO-Detection/retinanet_R_50_gn_1x.py")


def test_groups_that_do_not_fit_name_the_layers():
    cfg = load("quickstart/mask_rcnn_R_18_FPN_gn_shapes")
    cfg.model.backbone.norm.num_groups = 24
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=r"model\.backbone\.fpn_lat.* 64 ch"),
    ):
        instantiate(cfg.model)
