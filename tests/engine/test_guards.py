"""Each guard, through a run that it is for; and each switch that lets the run pass."""

import logging

import pytest
import torch
from helpers import CocoFiles, config

from gn_detect.config import ConfigError
from gn_detect.data.coco import register_coco_json
from gn_detect.engine import prepare_run

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"
R50_GN = ["MODEL.WEIGHTS", "catalog://ImageNetPretrained/FAIR/R-50-GN"]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    files = CocoFiles(tmp_path_factory.mktemp("guards") / "data")
    register_coco_json("guarded", str(files.json_file), str(files.image_root))


def prepare(name, *opts, **kwargs):
    data = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "DATASETS.TRAIN", ("guarded",), "DATASETS.TEST", ()]
    cfg = config(name, *data, *opts)
    prepare_run(cfg, **kwargs)
    return cfg


REFUSED = [
    (
        "SCRATCH_FREEZE_AT",
        (SCRATCH, "MODEL.BACKBONE.FREEZE_AT", 2),
        r"MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT is 2: .*3\.3 box AP",
    ),
    (
        "SCRATCH_FROZEN_BN",
        (SCRATCH, "MODEL.RESNETS.NORM", "FrozenBN"),
        "MODEL.WEIGHTS is empty and MODEL.RESNETS.NORM is FrozenBN",
    ),
    (
        "SCRATCH_FROZEN_BN",
        (SCRATCH, "MODEL.ROI_MASK_HEAD.NORM", "FrozenBN"),
        "MODEL.ROI_MASK_HEAD.NORM is FrozenBN",
    ),
    (
        "SCRATCH_FROZEN_BN",
        (SCRATCH, "MODEL.ROI_MASK_HEAD.DECONV_NORM", "FrozenBN"),
        "MODEL.ROI_MASK_HEAD.DECONV_NORM is FrozenBN",
    ),
    (
        "WEIGHTS_STRIDE",
        (R50, *R50_GN, "MODEL.RESNETS.STRIDE_IN_1X1", True),
        "STRIDE_IN_1X1 is True, but catalog://.*R-50-GN was trained with False",
    ),
    (
        "WEIGHTS_INPUT",
        (R50, *R50_GN, "INPUT.FORMAT", "RGB"),
        "INPUT.FORMAT is RGB, the weights' is BGR",
    ),
    (
        "WEIGHTS_INPUT",
        (R50, *R50_GN, "MODEL.PIXEL_STD", [57.375, 57.120, 58.395]),
        r"MODEL.PIXEL_STD is \[57.375.*, the weights' is \[1.0",
    ),
    (
        "SINGLE_VALUE_GROUPS",
        (R18, "MODEL.ROI_BOX_HEAD.FC_NORM", "IN"),
        "FC_NORM is IN, in 256 groups, over the output of a layer of 256 channels",
    ),
    (
        "SINGLE_VALUE_GROUPS",
        (R18, "MODEL.RESNETS.NORM", "IN", "INPUT.MIN_SIZE_TRAIN", (32,)),
        "RESNETS.NORM is IN, .* maps of images of 32 pixels of 512 channels and a single position",
    ),
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
    (
        "SMALL_BATCH_BN",
        (R18, "MODEL.FPN.NORM", "BN", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATE_STEPS", 2),
        "MODEL.FPN.NORM is BN, and its statistics are of 4 images",
    ),
    (
        "SMALL_BATCH_BN",
        (R18, "MODEL.FPN.NORM", "naiveSyncBN", "SOLVER.IMS_PER_BATCH", 4),
        "MODEL.FPN.NORM is naiveSyncBN, and its statistics are of 4 images",
    ),
    (
        "SMALL_BATCH_BN",
        (R18, "MODEL.FPN.NORM", "SyncBN", "SOLVER.IMS_PER_BATCH", 4),
        "MODEL.FPN.NORM is SyncBN, and its statistics are of 4 images",
    ),
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
        (R50, "MODEL.WEIGHTS", __file__, "MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.IMS_PER_GPU", 2),
    ],
)
def test_a_sound_run_is_not_disturbed(run, caplog):
    with caplog.at_level(logging.WARNING, "gn_detect"):
        prepare(*run, "GUARDS.FEW_IMAGES", False)
    assert "GUARDS" not in caplog.text


def test_a_resumed_run_does_not_start_from_weights(tmp_path):
    """The weights of its first start need not be there any more."""
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    (tmp_path / "model_0000009.pth").touch()
    opts = ["MODEL.BACKBONE.FREEZE_AT", 2, "OUTPUT_DIR", str(tmp_path)]
    prepare(SCRATCH, *opts, resume=True)
    with pytest.raises(ConfigError, match="FREEZE_AT is 2"):
        prepare(SCRATCH, *opts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_synchronized_bn_on_a_cpu():
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is SyncBN, .* on CUDA only"):
        prepare(R18, "MODEL.RESNETS.NORM", "SyncBN", num_gpus=2)
    prepare(R18, "MODEL.RESNETS.NORM", "SyncBN")  # nothing to synchronize


def test_the_schedule_is_settled_for_the_processes():
    cfg = prepare(SCRATCH, "SOLVER.IMS_PER_GPU", 1, num_gpus=2)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (2, 0.0025)
