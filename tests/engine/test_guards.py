"""Each guard, through a run that it is for; and each switch that lets the run pass."""

import importlib.util
import logging

import pytest
import torch
from detectron2.solver import build_lr_scheduler
from helpers import CocoFiles, config
from torch import nn, optim

from gn_detect.config import ConfigError
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import guards, prepare_run
from gn_detect.engine.guards import check_options, check_recipe

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
FROM_SCRATCH = ("COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml", "MODEL.BACKBONE.FREEZE_AT", 0)
R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"
R50_GN = ["MODEL.WEIGHTS", "catalog://ImageNetPretrained/FAIR/R-50-GN"]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    files = CocoFiles(tmp_path_factory.mktemp("guards") / "data")
    register_coco_json("guarded", str(files.json_file), str(files.image_root))


def prepare(name, *opts, **kwargs):
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.RETINANET.NUM_CLASSES", 2]
    data = [*classes, "DATASETS.TRAIN", ("guarded",), "DATASETS.TEST", ()]
    cfg = config(name, *data, *opts)
    prepare_run(cfg, **kwargs)
    return cfg


# Switch, config and options, message
REFUSED = [
    ("SCRATCH_FREEZE_AT", (SCRATCH, "MODEL.BACKBONE.FREEZE_AT", 2), r"FREEZE_AT is 2.*3\.3 box AP"),
    ("SCRATCH_FREEZE_AT", (SCRATCH, "MODEL.BACKBONE.FREEZE_AT", 1), "1: random"),  # the stem alone
    (
        "SCRATCH_FROZEN_BN",
        (SCRATCH, "MODEL.RESNETS.NORM", "FrozenBN"),
        "MODEL.WEIGHTS is empty and 53 layers are FrozenBN, such as backbone.bottom_up.stem.conv1",
    ),
    *[
        ("SCRATCH_FROZEN_BN", (R18, f"MODEL.ROI_MASK_HEAD.{key}", "FrozenBN"), message)
        for key, message in [
            ("NORM", "4 layers are FrozenBN, such as roi_heads.mask_head.mask_fcn1.norm"),
            ("DECONV_NORM", "1 layers are FrozenBN, such as roi_heads.mask_head.deconv_norm"),
        ]
    ],
    (
        "WEIGHTS_STRIDE",
        (R50, *R50_GN, "MODEL.RESNETS.STRIDE_IN_1X1", True),
        "STRIDE_IN_1X1 is True, but catalog://.*R-50-GN was trained with False",
    ),
    ("WEIGHTS_INPUT", (R50, *R50_GN, "INPUT.FORMAT", "RGB"), "RGB, the weights' is BGR"),
    (
        "WEIGHTS_INPUT",
        (R50, *R50_GN, "MODEL.PIXEL_STD", [57.375, 57.120, 58.395]),
        r"MODEL.PIXEL_STD is \[57.375.*, the weights' is \[1.0",
    ),
    (
        "SINGLE_VALUE_GROUPS",
        (R18, "MODEL.ROI_BOX_HEAD.FC_NORM", "IN"),
        "roi_heads.box_head.fc_norm1 normalizes in 256 groups 256 channels at a single position",
    ),
    *[
        (
            "SINGLE_VALUE_GROUPS",
            (name, *key, "IN", "INPUT.MIN_SIZE_TRAIN", sizes),
            f"{layer} normalizes in .* of images of {sizes[0]} pixels",
        )
        # Where the smallest map, of the largest stride, is a single position
        for name, *key, layer, sizes in [
            (R18, "MODEL.RESNETS.NORM", r"backbone.bottom_up.res5.0.\S+", (32, 640)),
            (R18, "MODEL.FPN.NORM", "backbone.fpn_lateral5.norm", (32,)),
            (R18, "MODEL.RPN.NORM", "proposal_generator.rpn_head.conv.norm", (64,)),
            (*FROM_SCRATCH, "MODEL.RETINANET.NORM", "head.cls_subnet.1", (128,)),
        ]
    ],
]


@pytest.mark.parametrize("switch, run, message", REFUSED)
def test_refused_and_passed_with_its_switch(switch, run, message):
    with pytest.raises(ConfigError, match=message) as error:
        prepare(*run)
    assert str(error.value).endswith(f"set GUARDS.{switch} False")
    prepare(*run, f"GUARDS.{switch}", False)


WARNED = [
    (
        "LEARNING_RATE",
        (SCRATCH, "SOLVER.IMS_PER_BATCH", 2),
        "BASE_LR is 0.02 for 2 images per iteration, 8 times the 0.0025 of the linear rule",
    ),
    (
        "LEARNING_RATE",
        (SCRATCH, "SOLVER.IMS_PER_GPU", 2, "SOLVER.MAX_ITER", 500, "SOLVER.STEPS", (375,)),
        "WARMUP_ITERS is 8000, but the rate drops, or training ends, at iteration 3000",
    ),
    ("FEW_IMAGES", (R18,), "there are 3 images to train on"),
    *[
        (
            "SMALL_BATCH_BN",
            (R18, "MODEL.FPN.NORM", norm, "SOLVER.IMS_PER_BATCH", 4 * steps, *accumulated),
            f"backbone.fpn_lateral2.norm is {kind}, and its statistics are of 4 images",
        )
        for norm, kind, steps, *accumulated in [
            ("BN", "BatchNorm2d", 2, "SOLVER.ACCUMULATE_STEPS", 2),
            ("naiveSyncBN", "NaiveSyncBatchNorm", 1),
            ("SyncBN", "SyncBatchNorm", 1),
        ]
    ],
]


@pytest.mark.parametrize("switch, run, message", WARNED)
def test_warned_of_and_silenced_with_its_switch(switch, run, message, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        prepare(*run)
    assert message in caplog.text and f"GUARDS.{switch} False" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        prepare(*run, f"GUARDS.{switch}", False)
    assert f"GUARDS.{switch}" not in caplog.text


@pytest.mark.parametrize(
    "run",
    [
        (SCRATCH, "SOLVER.IMS_PER_GPU", 1),
        (R50, *R50_GN, "SOLVER.IMS_PER_GPU", 2, "SOLVER.ACCUMULATE_STEPS", "auto"),
        (R18, "MODEL.FPN.NORM", "BN", "SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 0.02),
        (R18, "MODEL.RESNETS.NORM", "IN", "SOLVER.IMS_PER_BATCH", 16, "SOLVER.BASE_LR", 0.02),
        (R18, "MODEL.RESNETS.NORM", "IN", "INPUT.MIN_SIZE_TRAIN", (0,), "SOLVER.IMS_PER_BATCH", 16),
        (R18, "MODEL.RPN.NORM", "IN", "INPUT.MIN_SIZE_TRAIN", (65,), "SOLVER.IMS_PER_BATCH", 16),
        (R50, "MODEL.WEIGHTS", __file__, "MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.IMS_PER_GPU", 2),
    ],
)
def test_a_sound_run_is_not_disturbed(run, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        prepare(*run, "GUARDS.FEW_IMAGES", False)
    assert "GUARDS" not in caplog.text


@pytest.mark.parametrize("num_images, warns", [(9_999, True), (10_000, False), (None, False)])
def test_how_many_images_are_few(num_images, warns, caplog):
    cfg = prepare(R18, "GUARDS.FEW_IMAGES", False)
    cfg.GUARDS.FEW_IMAGES = True
    check_recipe(cfg, processes=1, num_images=num_images)
    assert (f"there are {num_images} images to train on" in caplog.text) == warns


@pytest.mark.parametrize("norm, warns", [("BN", True), ("naiveSyncBN", False)])
def test_batch_norm_sees_the_images_of_its_process(norm, warns, caplog):
    prepare(R18, "MODEL.FPN.NORM", norm, "SOLVER.IMS_PER_BATCH", 8, processes=2)
    assert ("its statistics are of 4 images" in caplog.text) == warns
    assert ("GUARDS.SMALL_BATCH_BN" in caplog.text) == warns


def test_a_component_that_cannot_be_built_on_the_meta_device(monkeypatch):
    """Such as Detectron2's Swin transformer, which calls ``item`` on a tensor."""
    build = guards.build_model

    def build_model(cfg):
        torch.zeros(1).item()
        return build(cfg)

    monkeypatch.setattr(guards, "build_model", build_model)
    with pytest.raises(ConfigError, match="4 layers are FrozenBN"):
        prepare(R18, "MODEL.ROI_MASK_HEAD.NORM", "FrozenBN")


def test_a_resumed_run_does_not_start_from_weights(tmp_path):
    """The weights of its first start need not be there any more."""
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    torch.save({"iteration": 9}, tmp_path / "model_0000009.pth")
    opts = ["MODEL.BACKBONE.FREEZE_AT", 2, "OUTPUT_DIR", str(tmp_path)]
    opts += ["GUARDS.OVERWRITE_OUTPUT", False]
    prepare(SCRATCH, *opts, resume=True)
    with pytest.raises(ConfigError, match="FREEZE_AT is 2"):
        prepare(SCRATCH, *opts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_synchronized_bn_on_a_cpu():
    with pytest.raises(ConfigError, match="stem.conv1.norm is SyncBN, .* on CUDA only"):
        prepare(R18, "MODEL.RESNETS.NORM", "SyncBN", processes=2)
    prepare(R18, "MODEL.RESNETS.NORM", "SyncBN")  # nothing to synchronize


def test_the_schedule_is_settled_for_the_processes():
    cfg = prepare(SCRATCH, "SOLVER.IMS_PER_GPU", 1, processes=2)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (2, 0.0025)


def test_pictures_of_training_need_opencv(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cfg = config()
    check_options(cfg, training=True)
    cfg.VIS_PERIOD = 20
    with pytest.raises(ConfigError, match="VIS_PERIOD is 20, .* opencv-python-headless"):
        check_options(cfg, training=True)
    check_options(cfg, training=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_options(cfg, training=True)


def test_a_schedule_that_fails_at_its_end():
    cfg = config()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.MAX_ITER = "WarmupStepWithFixedGammaLR", 4
    cfg.SOLVER.WARMUP_ITERS = 1
    with pytest.raises(ConfigError, match="use WarmupMultiStepLR"):
        check_options(cfg, training=True)
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1)
    schedule = build_lr_scheduler(cfg, optimizer)
    with pytest.raises(IndexError):  # once there is none, the refusal can go
        for _ in range(cfg.SOLVER.MAX_ITER):
            optimizer.step()
            schedule.step()
