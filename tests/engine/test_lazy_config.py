import pytest
import torch
from omegaconf import OmegaConf

import gn_detect
from gn_detect.checkpoint import Checkpointer, Origin
from gn_detect.config import ConfigError
from gn_detect.data.coco import DataError
from gn_detect.engine.lazy import build_lazy_model
from gn_detect.engine.lazy_config import load_lazy_config, prepare_lazy_run, weight_guards

QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")


def test_overrides_keep_their_kind():
    cfg = load_lazy_config(
        QUICK,
        [
            *("train.max_iter=7", "optimizer.lr=1e-3", "train.amp.enabled=True"),
            *("dataloader.train.dataset.names=[a,b]", "train.init_checkpoint=runs/a.pth"),
            "dataloader.train.mapper.augmentations.0.max_size=96",
            "model.roi_heads.box_head.fc_norm=LN",  # an argument that the config does not state
        ],
    )
    assert (cfg.train.max_iter, cfg.optimizer.lr, cfg.train.amp.enabled) == (7, 0.001, True)
    assert list(cfg.dataloader.train.dataset.names) == ["a", "b"]
    assert cfg.train.init_checkpoint == "runs/a.pth"
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 96
    assert cfg.model.roi_heads.box_head.fc_norm == "LN"


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_itr=7", "no key train.max_itr; similar: train.max_iter"),
        ("trian.max_iter=7", "no key trian.max_iter"),
        ("train.device.x=7", "no key train.device.x"),
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
        ("c.py", "model = dict()", "has no optimizer, lr_multiplier, dataloader, train"),
        ("c.yaml", "MODEL: {MASK_ON: True}", "are for tools/train_net.py"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        load_lazy_config(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)


def test_no_file():
    with pytest.raises(ConfigError, match="--config-file"):
        load_lazy_config("")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.accumulate_steps=0"], "train.accumulate_steps is 0"),
        (["train.accumulate_steps=4"], "total_batch_size is 2, .* a multiple of 4"),
        (["dataloader.train.total_batch_size=0"], "total_batch_size is 0"),
        (["train.checkpointer.max_to_keep=-1"], "max_to_keep is -1; .* or 0 for all"),
        (["train.checkpointer.max_to_keep=1.5"], "max_to_keep is 1.5; "),
        (["train.amp.dtype=fp16"], "train.amp.dtype is 'fp16'; known: float16, bfloat16"),
        (
            ["train.init_checkpoint=absent.pth"],
            "train.init_checkpoint: there is no file absent.pth",
        ),
        (
            ["model.backbone.bottom_up.freeze_at=2"],
            "train.init_checkpoint is empty and model.backbone.bottom_up.freeze_at is 2, so",
        ),
        (
            ["dataloader.train.mapper.image_format=RGB"],
            "dataloader.train.mapper.image_format is RGB, but model.input_format is BGR",
        ),
        (["model.roi_heads.num_classes=80"], "num_classes is 80, but the dataset own declares 2"),
    ],
)
def test_runs_that_cannot_work(lazy_data, tmp_path, overrides, message):
    cfg = lazy_data(f"train.output_dir={tmp_path}", *overrides)
    with pytest.raises(ConfigError, match=message):
        prepare_lazy_run(cfg)


@pytest.mark.parametrize("backbone", ["R_50", "X_50_32x4d", "X_101_32x4d"])
def test_frozen_stages_without_weights_are_refused(backbone):
    name = f"lazy/COCO-InstanceSegmentation/mask_rcnn_{backbone}_FPN_gn_ws_2x.py"
    overrides = ["train.init_checkpoint=''"]
    with pytest.raises(ConfigError, match="bottom_up.freeze_at is 2, so the frozen layers"):
        prepare_lazy_run(load_lazy_config(gn_detect.get_config_file(name), overrides))


R50_GN = "train.init_checkpoint=catalog://ImageNetPretrained/FAIR/R-50-GN"
MASK_RCNN = "lazy/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.py"
STRIDE = "model.backbone.bottom_up.stages.stride_in_1x1"


@pytest.mark.parametrize(
    "switch, overrides, message",
    [
        ("scratch_freeze_at", ["model.backbone.bottom_up.freeze_at=2"], "freeze_at is 2"),
        (
            "scratch_frozen_bn",
            ["model.roi_heads.box_head.conv_norm=FrozenBN"],
            "model.roi_heads.box_head.conv_norm is FrozenBN",
        ),
        ("weights_input", [R50_GN], r"model.pixel_std is \[57.375.* the weights' is \[1.0"),
    ],
)
def test_guards(lazy_data, switch, overrides, message):
    with pytest.raises(ConfigError, match=f"{message}.*set train.guards.{switch} False"):
        prepare_lazy_run(lazy_data(*overrides))
    prepare_lazy_run(lazy_data(*overrides, f"train.guards.{switch}=False"))


def test_guard_of_the_stride():
    cfg = load_lazy_config(gn_detect.get_config_file(MASK_RCNN), [f"{STRIDE}=True"])
    origin = Origin.of_name(cfg.train.init_checkpoint)
    with pytest.raises(ConfigError, match=f"{STRIDE} is True.*set train.guards.weights_stride"):
        weight_guards(cfg).check_origin(origin, "R-50-GN")
    cfg.train.guards.weights_stride = False
    weight_guards(cfg).check_origin(origin, "R-50-GN")
    name = MASK_RCNN.replace("R_50_FPN_gn_3x", "X_50_32x4d_FPN_gn_ws_2x")
    resnext = load_lazy_config(gn_detect.get_config_file(name))
    assert weight_guards(resnext).ours.stride_in_1x1 is False
    assert weight_guards(resnext).ours.input_format == "RGB"


def test_all_stages_have_one_stride():
    name = MASK_RCNN.replace("FPN_gn_3x", "C4_gn_3x")
    cfg = load_lazy_config(gn_detect.get_config_file(name))
    assert weight_guards(cfg).ours.stride_in_1x1 is False
    cfg.model.backbone.stages.stride_in_1x1 = True
    with pytest.raises(ConfigError, match=r"model\.roi_heads\.res5\.stride_in_1x1 is False"):
        weight_guards(cfg)


def test_masks_as_rle_need_bitmasks(lazy_data, coco_files):
    coco_files.content["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": [9, 4087]}
    coco_files.write()
    key = "dataloader.train.mapper.instance_mask_format"
    with pytest.raises(ConfigError, match=f"{key} is polygon, but own has masks as RLE"):
        prepare_lazy_run(lazy_data(f"{key}=polygon"))
    prepare_lazy_run(lazy_data(f"{key}=bitmask"))


def test_a_config_of_detectron2_lacks_keys(tmp_path):
    text = "model = optimizer = lr_multiplier = dataloader = dict(a=1)\ntrain = dict(max_iter=1)\n"
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match="it has no train.output_dir, .*train.amp.dtype"):
        load_lazy_config(str(tmp_path / "own.py"))


def test_guard_of_bn_weights(lazy_data, tmp_path):
    cfg = lazy_data()
    for key in ("stem.norm", "stages.norm"):
        OmegaConf.update(cfg, f"model.backbone.bottom_up.{key}", "BN")
    model = build_lazy_model(cfg)
    Checkpointer(model, str(tmp_path), guards=weight_guards(cfg)).save("bn")
    cfg = lazy_data()
    guards = weight_guards(cfg)
    assert guards.ours.stride_in_1x1 is None  # ResNet-18
    with pytest.raises(ConfigError, match="BN in 20 layers .* train.guards.bn_weights_into_gn"):
        Checkpointer(build_lazy_model(cfg), guards=guards).load(str(tmp_path / "bn.pth"))


def test_bad_data_is_refused(lazy_data, coco_files):
    cfg = lazy_data()
    cfg.dataloader.test.dataset.names = "nothing"
    with pytest.raises(DataError, match="'nothing', which is not registered"):
        prepare_lazy_run(cfg)
    coco_files.content["annotations"][0]["category_id"] = 5
    coco_files.write()
    with pytest.raises(DataError, match="annotation 10"):
        prepare_lazy_run(lazy_data())


def test_frozen_stages_matter_to_training_alone(lazy_data, tmp_path):
    weights = tmp_path / "weights.pth"
    weights.touch()
    freeze = "model.backbone.bottom_up.freeze_at=2"
    prepare_lazy_run(lazy_data(freeze, f"train.init_checkpoint={weights}"))
    with pytest.raises(ConfigError, match="train.init_checkpoint is empty: with --eval-only"):
        prepare_lazy_run(lazy_data(), eval_only=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is done without CUDA")
def test_without_cuda(lazy_data, caplog):
    cfg = lazy_data("train.device=cuda", "train.amp.enabled=True")
    prepare_lazy_run(cfg)
    assert cfg.train.device == "cpu" and not cfg.train.amp.enabled
    assert "no CUDA device is available: train.device = cpu" in caplog.text
    assert "float16 needs CUDA: train.amp.enabled = False" in caplog.text
    cfg = lazy_data("train.amp.enabled=True", "train.amp.dtype=bfloat16")
    prepare_lazy_run(cfg)
    assert cfg.train.amp.enabled
