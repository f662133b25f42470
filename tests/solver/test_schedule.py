import pytest
import torch
from detectron2.solver import build_lr_scheduler
from helpers import config

from gn_detect.config import ConfigError
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
SCRATCH = "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"


def resolved(*opts, processes=1, name=R50):
    cfg = config(name, *opts)
    resolve_schedule(Settings(cfg), processes)
    return cfg


# Total batch, LR, iterations of 1x, 2x, 3x, steps of 3x, warm-up: the linear rule as published by
# Detectron2 (docs/notes/benchmarks), maskrcnn-benchmark (README, single GPU) and Goyal et al.
TABLE = [
    (16, 0.02, 90_000, 180_000, 270_000, (210_000, 250_000), 1000),
    (8, 0.01, 180_000, 360_000, 540_000, (420_000, 500_000), 2000),
    (4, 0.005, 360_000, 720_000, 1_080_000, (840_000, 1_000_000), 4000),
    (2, 0.0025, 720_000, 1_440_000, 2_160_000, (1_680_000, 2_000_000), 8000),
    (1, 0.00125, 1_440_000, 2_880_000, 4_320_000, (3_360_000, 4_000_000), 16_000),
]


@pytest.mark.parametrize("batch, lr, x1, x2, x3, steps, warmup", TABLE)
def test_the_published_table(batch, lr, x1, x2, x3, steps, warmup):
    for per_gpu in (n for n in (1, 2, 4) if batch % n == 0):
        cfg = resolved("SOLVER.IMS_PER_GPU", per_gpu, processes=batch // per_gpu)
        assert cfg.SOLVER.IMS_PER_BATCH == batch and cfg.SOLVER.ACCUMULATE_STEPS == 1
        assert cfg.SOLVER.BASE_LR == pytest.approx(lr, rel=1e-12)
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (x3, steps)
        assert cfg.SOLVER.WARMUP_ITERS == warmup
    for iterations, expected in ((90_000, x1), (180_000, x2)):
        opts = ["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", (), "SOLVER.IMS_PER_GPU", 1]
        assert resolved(*opts, processes=batch).SOLVER.MAX_ITER == expected


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_scratch_keeps_its_last_drops(batch):
    """60k and 20k iterations of 16 images before the end (He et al. 2018, section 3)."""
    solver = resolved("SOLVER.IMS_PER_GPU", 1, processes=batch, name=SCRATCH).SOLVER
    before_end = [(solver.MAX_ITER - step) * batch for step in solver.STEPS]
    assert before_end == [60_000 * 16, 20_000 * 16]


def test_what_is_derived_is_a_recipe_for_its_own_batch():
    """So to resolve it again, as in another process, changes nothing."""
    cfg = resolved("SOLVER.IMS_PER_GPU", 2, processes=2)
    before = cfg.clone()
    assert cfg.SOLVER.REFERENCE_BATCH_SIZE == cfg.SOLVER.IMS_PER_BATCH == 4
    resolve_schedule(Settings(cfg), processes=2)
    assert cfg == before


def test_periods_and_final_rate_follow():
    opts = [
        *("SOLVER.CHECKPOINT_PERIOD", 5000, "TEST.EVAL_PERIOD", 1000),
        *("SOLVER.BASE_LR_END", 0.002, "SOLVER.IMS_PER_GPU", 2),
    ]
    cfg = resolved(*opts)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 40_000 and cfg.TEST.EVAL_PERIOD == 8000
    assert cfg.SOLVER.BASE_LR_END == pytest.approx(0.00025)
    cfg = resolved("SOLVER.IMS_PER_GPU", 2, "SOLVER.CHECKPOINT_PERIOD", 0)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == 0  # off stays off


@pytest.mark.parametrize("batch", [3, 5, 12, 24, 64, 100])
def test_never_shorter_in_images(batch):
    solver = resolved("SOLVER.IMS_PER_GPU", 1, processes=batch).SOLVER
    assert 16_000 <= solver.WARMUP_ITERS * batch < 16_000 + batch
    assert 270_000 * 16 <= solver.MAX_ITER * batch < 270_000 * 16 + batch


def test_steps_that_rounding_makes_one():
    """Detectron2 refuses steps that are not increasing, or not before the end."""
    opts = ["SOLVER.MAX_ITER", 100, "SOLVER.STEPS", (97, 99), "SOLVER.WARMUP_ITERS", 4]
    cfg = resolved(*opts, "SOLVER.IMS_PER_GPU", 1, processes=64)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (25, ())
    build_lr_scheduler(cfg, torch.optim.SGD([torch.zeros(1)], 0.1))


def test_the_scaling_of_detectron2_is_left_to_it():
    opts = ["SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8]
    assert resolved(*opts, processes=3).SOLVER.IMS_PER_BATCH == 16


@pytest.mark.parametrize(
    "per_gpu, processes, stated, steps, batch",
    [
        (1, 1, "auto", 16, 16),
        (2, 4, "auto", 2, 16),
        (2, 8, "auto", 1, 16),
        (4, 8, "auto", 1, 32),
        (3, 1, "auto", 6, 18),
        (1, 2, 4, 4, 8),
    ],
)
def test_accumulation(per_gpu, processes, stated, steps, batch):
    opts = ["SOLVER.IMS_PER_GPU", per_gpu, "SOLVER.ACCUMULATE_STEPS", stated]
    solver = resolved(*opts, processes=processes).SOLVER
    assert (solver.ACCUMULATE_STEPS, solver.IMS_PER_BATCH) == (steps, batch)
    assert solver.BASE_LR == pytest.approx(0.02 * batch / 16)


def test_a_resolved_config_stays_as_it_is():
    cfg = resolved("SOLVER.IMS_PER_GPU", 2, "SOLVER.ACCUMULATE_STEPS", "auto", processes=2)
    before = cfg.dump()
    resolve_schedule(Settings(cfg), 2)
    assert cfg.dump() == before


def test_without_images_per_gpu_all_is_as_stated():
    opts = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 2]
    solver = resolved(*opts).SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.IMS_PER_BATCH) == (0.02, 270_000, 2)


def test_the_log_says_what_was_derived(caplog):
    with caplog.at_level("INFO"):
        resolved("SOLVER.IMS_PER_GPU", 1, processes=2)
    assert (
        "2 images per iteration = 2 (processes) x 1 (IMS_PER_GPU) x 1 (ACCUMULATE_STEPS)"
        in caplog.text
    )
    row = next(line for line in caplog.text.splitlines() if "SOLVER.STEPS" in line)
    assert "(210000, 250000)" in row and "(1680000, 2000000)" in row


@pytest.mark.parametrize(
    "opts, processes, message",
    [
        (["SOLVER.ACCUMULATE_STEPS", "auto"], 1, "set SOLVER.IMS_PER_GPU"),
        (["SOLVER.ACCUMULATE_STEPS", 0], 1, "ACCUMULATE_STEPS is 0"),
        (["SOLVER.ACCUMULATE_STEPS", True], 1, "ACCUMULATE_STEPS is True"),
        (
            ["SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.REFERENCE_WORLD_SIZE", 8],
            1,
            "REFERENCE_WORLD_SIZE is 8 and SOLVER.ACCUMULATE_STEPS is 2",
        ),
        (["SOLVER.ACCUMULATE_STEPS", "all"], 1, "ACCUMULATE_STEPS is 'all'"),
        (["SOLVER.IMS_PER_GPU", -1], 1, "IMS_PER_GPU is -1"),
        (["SOLVER.IMS_PER_BATCH", 6], 4, "must be a multiple of 4: the processes"),
        (["SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_STEPS", 3], 1, "must be a multiple of 3"),
        (
            ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.IMS_PER_GPU", 2],
            1,
            "IMS_PER_BATCH is 2, but SOLVER.REFERENCE_BATCH_SIZE.* is 16",
        ),
        (
            ["SOLVER.IMS_PER_GPU", 2, "SOLVER.REFERENCE_WORLD_SIZE", 8],
            1,
            "both scale the recipe",
        ),
    ],
)
def test_contradictions(opts, processes, message):
    with pytest.raises(ConfigError, match=message):
        resolved(*opts, processes=processes)
