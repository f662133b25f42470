import re
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import instantiate
from detectron2.solver import build_lr_scheduler
from helpers import SQUARE_RLE, config

import gn_detect
from gn_detect.checkpoint import Origin, WeightGuards
from gn_detect.config import ConfigError
from gn_detect.engine import guards, prepare_run
from gn_detect.engine.lazy_config import check_lazy_config, load_lazy_config
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")
FREEZE_AT = "model.backbone.bottom_up.freeze_at"
NORM = "model.backbone.bottom_up.stages.0.norm"
TRAIN_MAPPER = "dataloader.train.mapper"
SIZES = f"{TRAIN_MAPPER}.augmentations.0.short_edge_length"


def load(name, *overrides):
    return load_lazy_config(gn_detect.get_config_file(f"lazy/{name}.py"), overrides)


def test_overrides_keep_their_kind():
    cfg = load_lazy_config(
        QUICK,
        [
            *("train.max_iter=7", "optimizer.lr=1e-3", "train.amp.enabled=True"),
            *("dataloader.train.dataset.names=[a,b]", "train.init_checkpoint=runs/a.pth"),
            f"{TRAIN_MAPPER}.augmentations.0.max_size=96",
            "model.roi_heads.box_head.fc_norm=LN",  # an argument that the config does not state
            *("train.accumulate_steps=auto", "train.guards.learning_rate=False"),
        ],
    )
    assert (cfg.train.max_iter, cfg.optimizer.lr, cfg.train.amp.enabled) == (7, 0.001, True)
    assert list(cfg.dataloader.train.dataset.names) == ["a", "b"]
    assert cfg.train.init_checkpoint == "runs/a.pth"
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 96
    assert cfg.model.roi_heads.box_head.fc_norm == "LN"
    assert cfg.train.accumulate_steps == "auto"
    assert not cfg.train.guards.learning_rate and cfg.train.guards.single_value_groups


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_itr=7", "no key train.max_itr; similar: train.max_iter"),
        ("trian.max_iter=7", "no key trian.max_iter"),
        ("train.device.x=7", "no key train.device.x"),
        ("train.guards.few_image=False", "similar: train.guards.few_images"),
        ("train.max_iter=many", "train.max_iter is 'many', not a number like 1800"),
        ("train.max_iter", "'train.max_iter' is not of the form key=value"),
        ("train.max_iter=[", "the command line: train.max_iter="),
        ("train.amp=True", "train.amp holds keys, such as train.amp.enabled"),
        ("train.init_checkpoint=a.pth?b=True", "'train.init_checkpoint=\"VALUE\"'"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(ConfigError) as error:
        load_lazy_config(QUICK, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("absent.py", None, "absent.py"),
        ("c.txt", "", "has to be a python or yaml file"),
        ("c.py", "model = (", "syntax error"),
        ("c.py", "from .other import model", "other.py does not exist"),
        ("c.py", "model = dict(a=1)", "has no optimizer.lr, lr_multiplier, dataloader.train.total"),
        ("c.py", "model = dict(a=1)\ntrain = dict(max_iter=1)", "train.output_dir, train.init_"),
        ("c.yaml", "MODEL: {MASK_ON: True}", "are for tools/train_net.py"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_lazy_config(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.accumulate_steps=4"], "total_batch_size is 2, .* a multiple of 4"),
        (["train.accumulate_steps=auto"], "restores the reference batch .* set train.ims_per_gpu"),
        (
            ["train.ims_per_gpu=1", "dataloader.train.total_batch_size=4"],
            "total_batch_size is 4, but train.reference_batch_size, .* is 2",
        ),
        (["train.checkpointer.max_to_keep=-1"], "max_to_keep is -1; .* or 0 for all"),
        (["train.checkpointer.seconds=-1"], "checkpointer.seconds is -1; .* or 0 to save by"),
        (["train.checkpointer.seconds=null"], "checkpointer.seconds is None; .* or 0 to save by"),
        (
            ["train.early_stop=2", "train.eval_period=0"],
            "early_stop is 2, .* but train.eval_period is 0; set it to the",
        ),
        (["train.ema.decay=1.5"], r"train.ema.decay is 1.5; it must be in \[0, 1\)"),
        (["train.best_metric=segm/mAP"], "best_metric is 'segm/mAP', .*; it measures bbox/AP, "),
        (["train.amp.dtype=fp16"], "train.amp.dtype is 'fp16'; known: float16, bfloat16"),
        (["train.init_checkpoint=absent.pth"], "init_checkpoint: there is no file absent.pth"),
        ([f"{TRAIN_MAPPER}.image_format=RGB"], "image_format is RGB, but model.input_format is B"),
        (["dataloader.test.mapper.bit_depth_range=[0,1]"], r"is \[0, 1\], but .*train.* is \[\];"),
        (["model.roi_heads.num_classes=80"], "num_classes is 80, but the dataset own declares 2"),
        (["model.backbone.bottom_up.freeze=2"], "model: .*unexpected keyword argument 'freeze'"),
    ],
)
def test_runs_that_cannot_work(lazy_data, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        prepare_run(lazy_data(f"train.output_dir={tmp_path}", *overrides))


GUARDED = [
    ("scratch_freeze_at", [f"{FREEZE_AT}=1"], f"init_checkpoint is empty and {FREEZE_AT} is 1"),
    ("scratch_frozen_bn", [f"{NORM}=FrozenBN"], "init_checkpoint is empty and 3 layers are"),
    (
        "weights_input",
        ["train.init_checkpoint=catalog://ImageNetPretrained/FAIR/R-50-GN"],
        r"model.pixel_std is \[57.375.* the weights' is \[1.0",
    ),
    (
        "single_value_groups",
        ["model.backbone.norm.num_groups=64", f"{SIZES}=[32]"],
        "normalizes in 64 groups 64 channels .* 32 pixels.*num_groups or channels_per_",
    ),
    ("few_images", [], "train.init_checkpoint is empty and there are 3 images"),
    (
        "learning_rate",
        ["optimizer.lr=0.01"],
        "optimizer.lr is 0.01 for 2 images per iteration, 4 times .*train.ims_per_gpu derives",
    ),
    (
        "learning_rate",
        ["lr_multiplier.warmup_length=1.0"],
        "lr_multiplier.warmup_length is 1.0, .* at iteration 1: optimizer.lr is never",
    ),
    (
        "small_batch_bn",
        ["model.roi_heads.box_head.conv_norm=BN"],
        "roi_heads.box_head.conv1.norm is BatchNorm2d, and its statistics are of 2 images",
    ),
]


@pytest.mark.parametrize("switch, overrides, message", GUARDED)
def test_guards(lazy_data, switch, overrides, message, caplog):
    """As of a YAML config, with the keys of this one."""

    def said(on: bool) -> str:
        caplog.clear()
        quiet = ("optimizer.lr=0.005", "train.guards.few_images=False")
        try:
            prepare_run(lazy_data(*quiet, f"train.guards.{switch}={on}", *overrides))
        except ConfigError as error:
            return str(error)
        return " ".join(m for m in caplog.messages if "train.guards" in m)

    assert said(False) == ""
    assert re.search(f"{message}.*train.guards.{switch} False", said(True))


@pytest.mark.parametrize("num_updates", [None, 270000])
def test_drops_are_relative_to_the_end(lazy_data, caplog, num_updates):
    cfg = lazy_data("train.max_iter=900", "train.guards.learning_rate=True")
    cfg.lr_multiplier = load("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x").lr_multiplier
    cfg.lr_multiplier.scheduler.num_updates = num_updates
    cfg.lr_multiplier.warmup_length = 0.78  # the first drop is at 7/9
    prepare_run(cfg)
    assert "warmup_length is 0.78, but the rate drops, or training ends, at iteration 700" in (
        caplog.text
    )


def test_a_config_of_detectron2_itself():
    zoo = Path(detectron2.__file__).parent / "model_zoo/configs"
    cfg = load_lazy_config(str(zoo / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"))
    cfg.train.device = "cpu"
    resolve_schedule(Settings(cfg), 1)
    guards.check_recipe(cfg, processes=1, num_images=118_000)
    assert WeightGuards.from_config(cfg).ours == Origin.of_name("MSRA/R-50")


def test_weights_of_another_stride():
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x"
    key = "model.backbone.bottom_up.stages.stride_in_1x1"
    cfg = load(name, f"{key}=True")
    origin = Origin.of_name(cfg.train.init_checkpoint)
    with pytest.raises(ConfigError, match=f"{key} is True.*set train.guards.weights_stride"):
        WeightGuards.from_config(cfg).check_origin(origin, "R-50-GN")
    cfg.train.guards.weights_stride = False
    WeightGuards.from_config(cfg).check_origin(origin, "R-50-GN")


def test_all_stages_have_one_stride(lazy_data):
    cfg = lazy_data()
    cfg.model = load("COCO-Detection/faster_rcnn_R_50_C4_gn_1x").model
    assert WeightGuards.from_config(cfg).ours.stride_in_1x1 is False
    cfg.model.backbone.stages.stride_in_1x1 = True
    with pytest.raises(ConfigError, match=r"model\.roi_heads\.res5\.stride_in_1x1 is False"):
        prepare_run(cfg)
    cfg = load("COCO-InstanceSegmentation/mask_rcnn_X_50_32x4d_FPN_gn_ws_2x")
    cfg.model.backbone.bottom_up.stages[2].stride_in_1x1 = True
    with pytest.raises(ConfigError, match=r"stages\[2\]\.stride_in_1x1 is True, but .*\[0\]"):
        check_lazy_config(cfg)


def test_the_format_of_the_masks_can_follow_the_data_of_every_example():
    """Detectron2's own configs, on which they build, do not state it."""
    cfg = load("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x")
    assert Settings(cfg)["mask_format"] == "polygon"


def test_masks_as_rle_become_bitmaps(lazy_data, coco_files):
    for expected in ("polygon", "bitmask"):
        cfg = lazy_data(f"{TRAIN_MAPPER}.instance_mask_format=polygon")
        prepare_run(cfg)
        assert cfg.dataloader.train.mapper.instance_mask_format == expected
        coco_files.content["annotations"][0]["segmentation"] = SQUARE_RLE
        coco_files.write()


def test_a_loader_of_another_kind(lazy_data):
    cfg = lazy_data("train.guards.few_images=True")
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        loader.dataset = {"_target_": "builtins.list"}
    prepare_run(cfg)


def test_weights_matter_to_the_evaluation(lazy_data, tmp_path):
    with pytest.raises(ConfigError, match="train.init_checkpoint is empty: with --eval-only"):
        prepare_run(lazy_data(), eval_only=True)
    (tmp_path / "weights.pth").touch()
    # Frozen stages do not.
    cfg = lazy_data(f"{FREEZE_AT}=2", f"train.init_checkpoint={tmp_path / 'weights.pth'}")
    prepare_run(cfg, eval_only=True)


@pytest.mark.parametrize(
    "name",
    [
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_lsj_100ep",
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes",
    ],
)
@pytest.mark.parametrize("per_gpu, steps, processes", [(1, None, 1), (2, "auto", 1), (2, 3, 2)])
def test_the_derived_schedule_is_that_of_yaml_configs(name, per_gpu, steps, processes):
    cfg, yaml = load(name, f"train.ims_per_gpu={per_gpu}"), config(f"{name}.yaml")
    cfg.train.eval_period, yaml.TEST.EVAL_PERIOD = 0, 0
    cfg.train.accumulate_steps = yaml.SOLVER.ACCUMULATE_STEPS = steps
    yaml.SOLVER.IMS_PER_GPU = per_gpu
    for _ in range(2):  # a second time changes nothing
        resolve_schedule(Settings(cfg), processes)
        resolve_schedule(Settings(yaml), processes)
        solver = yaml.SOLVER
        assert cfg.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
        assert cfg.train.reference_batch_size == solver.IMS_PER_BATCH
        assert cfg.train.accumulate_steps == solver.ACCUMULATE_STEPS
        assert cfg.optimizer.lr == pytest.approx(solver.BASE_LR)
        assert cfg.train.max_iter == solver.MAX_ITER
        assert cfg.train.checkpointer.period == solver.CHECKPOINT_PERIOD
        assert cfg.train.eval_period == 0
    scheduler = build_lr_scheduler(yaml, torch.optim.SGD([torch.zeros(1)], solver.BASE_LR))
    multiplier = instantiate(cfg.lr_multiplier)
    for iteration in (0, solver.WARMUP_ITERS // 2, solver.WARMUP_ITERS, *solver.STEPS):
        scheduler.last_epoch = iteration
        rate = cfg.optimizer.lr * multiplier(iteration / solver.MAX_ITER)
        assert [rate] == pytest.approx(scheduler.get_lr(), rel=0.03)  # iterations are rounded


@pytest.mark.parametrize(
    "typed",
    [
        {"max_iter": 20},
        {"epochs": 3},
        {"epochs": 2.5, "warmup_epochs": 0.1, "eval_epochs": 1},
        {"max_iter": 5000, "eval_period": 7},
    ],
)
def test_a_typed_length_is_that_of_yaml_configs(typed):
    name, per_gpu = "quickstart/mask_rcnn_R_18_FPN_gn_shapes", {"ims_per_gpu": 1}
    keys = [f"train.{key}" for key in typed | per_gpu]
    cfg = load(name, *(f"train.{key}={value}" for key, value in (typed | per_gpu).items()))
    section = {key: "TEST" if key.startswith("eval") else "SOLVER" for key in typed | per_gpu}
    opts = [(f"{section[key]}.{key.upper()}", v) for key, v in (typed | per_gpu).items()]
    yaml = config(f"{name}.yaml", *(word for pair in opts for word in pair))
    for _ in range(2):
        resolve_schedule(Settings(cfg, keys), 1, 100)
        resolve_schedule(Settings(yaml, [key for key, _ in opts]), 1, 100)
        assert cfg.train.max_iter == yaml.SOLVER.MAX_ITER
        assert cfg.train.eval_period == yaml.TEST.EVAL_PERIOD
        assert cfg.train.checkpointer.period == yaml.SOLVER.CHECKPOINT_PERIOD
        warmup = cfg.lr_multiplier.warmup_length * cfg.train.max_iter
        assert warmup == pytest.approx(yaml.SOLVER.WARMUP_ITERS)


def test_epochs_of_a_warm_up_that_is_not_there():
    cfg = load("quickstart/mask_rcnn_R_18_FPN_gn_shapes", "train.warmup_epochs=1")
    cfg.lr_multiplier = cfg.lr_multiplier.scheduler
    with pytest.raises(ConfigError, match="train.warmup_epochs is 1, but lr_multiplier has no"):
        resolve_schedule(Settings(cfg), 1, 100)


def test_what_scores_is_named_by_its_own_key(lazy_data):
    cfg = lazy_data("dataloader.evaluator.coco_eval=c")
    with pytest.raises(ConfigError, match="^dataloader.evaluator.coco_eval is 'c'; known: auto"):
        prepare_run(cfg)
