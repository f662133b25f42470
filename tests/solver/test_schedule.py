import re

import pytest
import torch
from detectron2.solver import build_lr_scheduler
from helpers import config

from gn_detect.config import ConfigError, locate
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


# What is typed is of this run: only what the file states is scaled.


def typed(*opts, processes=1, num_images=None, name=R50):
    cfg = config(name, *opts)
    run = Settings(cfg, opts[::2])
    for _ in range(2):  # a second time changes nothing
        before = cfg.clone()
        resolve_schedule(run, processes, num_images)
    assert cfg == before
    return cfg


PHOTOS = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
SHORT = ("SOLVER.IMS_PER_GPU", 1, "SOLVER.MAX_ITER", 20)


def test_20_typed_iterations_are_20():
    cfg = typed(*SHORT, name=PHOTOS)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (20, 1)
    assert cfg.SOLVER.BASE_LR == 0.01  # 0.02 for 2 images
    # 200 iterations would see the images of the file's warm-up; it evaluates twice.
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == (2, 10)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 10


def test_steps_keep_their_part_of_a_typed_length():
    cfg = typed(*SHORT)
    # 7/9 and 25/27 of 20, rounded up
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (20, (16, 19), 2)
    cfg = typed("SOLVER.IMS_PER_GPU", 2, "SOLVER.MAX_ITER", 540_000)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == ((420_000, 500_000), 8000)
    assert cfg.SOLVER.CHECKPOINT_PERIOD == 40_000


TYPED = {
    "SOLVER.MAX_ITER": 300,
    "SOLVER.STEPS": (100, 200),
    "SOLVER.WARMUP_ITERS": 77,
    "SOLVER.BASE_LR": 0.5,
    "SOLVER.BASE_LR_END": 0.25,
    "SOLVER.CHECKPOINT_PERIOD": 11,
    "TEST.EVAL_PERIOD": 13,
}


@pytest.mark.parametrize("key", TYPED)
@pytest.mark.parametrize("length", [(), ("SOLVER.EPOCHS", 3.0)], ids=["scaled", "epochs"])
def test_a_typed_key_is_not_scaled(key, length):
    if key == "SOLVER.MAX_ITER" and length:
        return
    opts = ("SOLVER.IMS_PER_GPU", 2, *length)
    expected = config(R50, *opts)
    resolve_schedule(Settings(expected, opts[::2]), 1, 1000)
    cfg = typed(*opts, key, TYPED[key], num_images=1000)
    node, name = locate(cfg, key)
    assert node[name] == TYPED[key]
    if key != "SOLVER.MAX_ITER":  # and nothing else than it differs
        node, name = locate(expected, key)
        node[name] = TYPED[key]
        assert cfg == expected


def test_the_accumulation_follows_from_a_typed_batch():
    opts = ("SOLVER.IMS_PER_BATCH", 8, "SOLVER.IMS_PER_GPU", 2)
    solver = typed(*opts, processes=2).SOLVER
    assert (solver.IMS_PER_BATCH, solver.ACCUMULATE_STEPS, solver.BASE_LR) == (8, 2, 0.01)
    assert solver.MAX_ITER == 540_000
    typed(*opts, "SOLVER.ACCUMULATE_STEPS", 2, processes=2)
    solver = typed(*opts, "SOLVER.ACCUMULATE_STEPS", "auto", processes=2).SOLVER
    assert solver.ACCUMULATE_STEPS == 2
    for wrong, processes in (((), 3), (("SOLVER.ACCUMULATE_STEPS", 3), 2)):
        with pytest.raises(ConfigError, match="BATCH is 8, .*IMS_PER_GPU 2 and . process.*ACCUMUL"):
            typed(*opts, *wrong, processes=processes)


def test_the_reference_is_of_files():
    with pytest.raises(ConfigError, match="REFERENCE_BATCH_SIZE is 4 on the command line, but it"):
        typed("SOLVER.IMS_PER_BATCH", 2, "SOLVER.IMS_PER_GPU", 2, "SOLVER.REFERENCE_BATCH_SIZE", 4)


def test_typed_without_images_per_gpu_all_is_as_stated():
    solver = typed("SOLVER.MAX_ITER", 20, "SOLVER.IMS_PER_BATCH", 2).SOLVER
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.BASE_LR) == ((210_000, 250_000), 1000, 0.02)


# Epochs


@pytest.mark.parametrize(
    "epochs, batch, num_images, expected",
    [(1, 1, 7, 7), (1, 2, 7, 4), (2.5, 2, 7, 9), (0.1, 4, 7, 1), (3, 4, 100, 75), (0.7, 1, 10, 7)],
)
def test_an_epoch_rounds_up(epochs, batch, num_images, expected):
    opts = ("SOLVER.EPOCHS", epochs, "SOLVER.IMS_PER_GPU", batch)
    assert typed(*opts, num_images=num_images).SOLVER.MAX_ITER == expected
    opts = ("SOLVER.EPOCHS", epochs, "SOLVER.IMS_PER_BATCH", batch)
    solver = typed(*opts, num_images=num_images).SOLVER
    assert (solver.MAX_ITER, solver.BASE_LR) == (expected, 0.02)  # which is as stated


def test_steps_warm_up_and_evaluation_of_epochs():
    cfg = typed(
        *("SOLVER.EPOCHS", 10, "SOLVER.IMS_PER_GPU", 4, "SOLVER.STEPS_AT", (0.5, 0.9)),
        *("SOLVER.WARMUP_EPOCHS", 2, "TEST.EVAL_EPOCHS", 0.5),
        num_images=42,
    )
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (105, (53, 95))
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.TEST.EVAL_PERIOD) == (21, 6)


def test_a_resolved_config_in_epochs_follows_the_next_batch():
    """As from a saved config: nothing of it is scaled twice."""
    cfg = typed("SOLVER.EPOCHS", 10, "SOLVER.IMS_PER_GPU", 1, num_images=40)
    before = cfg.clone()
    cfg.SOLVER.REFERENCE_MAX_ITER = cfg.SOLVER.MAX_ITER
    resolve_schedule(Settings(cfg), 1, 40)
    assert cfg == before and cfg.SOLVER.STEPS == (312, 371)
    resolve_schedule(Settings(cfg), 4, 40)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (100, (78, 93), 10)


@pytest.mark.parametrize("length", [("SOLVER.EPOCHS", 1), ("SOLVER.MAX_ITER", 40)])
def test_the_epochs_of_a_file_give_way_to_a_typed_length(length):
    cfg = config(R50, *length, "SOLVER.IMS_PER_GPU", 1)
    if length[0] == "SOLVER.MAX_ITER":
        cfg.SOLVER.EPOCHS = 7.0
    cfg.SOLVER.WARMUP_EPOCHS, cfg.SOLVER.STEPS_AT = 1.0, (0.5,)
    resolve_schedule(Settings(cfg, [length[0]]), 1, 40)
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (40, (20,), 4)
    assert solver.EPOCHS == (1 if length[0] == "SOLVER.EPOCHS" else 0)
    before = cfg.clone()
    resolve_schedule(Settings(cfg), 1, 40)  # of the saved config
    assert cfg == before


@pytest.mark.parametrize(
    "opts, num_images, message",
    [
        (("SOLVER.EPOCHS", 1, "SOLVER.MAX_ITER", 9), 9, "MAX_ITER and SOLVER.EPOCHS are both on"),
        (("SOLVER.STEPS_AT", (0.5,), "SOLVER.STEPS", (9,)), 9, "STEPS and SOLVER.STEPS_AT are bot"),
        (("TEST.EVAL_EPOCHS", 1, "TEST.EVAL_PERIOD", 9), 9, "EVAL_PERIOD and TEST.EVAL_EPOCHS"),
        (("SOLVER.EPOCHS", 1), None, "EPOCHS is 1, but how many images .* DATASETS.TRAIN is no"),
        (("SOLVER.EPOCHS", -1), 9, "EPOCHS is -1.0; it must be a number of epochs, or 0"),
        (("SOLVER.EPOCHS", "1e999"), 9, "EPOCHS is inf; it must be a number of epochs"),
        (("SOLVER.STEPS_AT", (0.9, 0.5)), 9, r"STEPS_AT is \(0.9, 0.5\); it must be parts of the"),
        (("SOLVER.STEPS_AT", (1.5,)), 9, r"STEPS_AT is \(1.5,\); it must be parts of the run"),
    ],
)
def test_contradictions_of_epochs(opts, num_images, message):
    with pytest.raises(ConfigError, match=message):
        typed(*opts, num_images=num_images)


def test_the_table_says_why(caplog):
    with caplog.at_level("INFO"):
        typed("SOLVER.IMS_PER_GPU", 2, "SOLVER.EPOCHS", 3, "SOLVER.BASE_LR", 0.01, num_images=75)
    table = caplog.messages[0].splitlines()
    columns = [re.split(r"\s{2,}", line.strip()) for line in table[1:]]
    rows = {key: rest for key, *rest in columns}
    assert rows["SOLVER.MAX_ITER"] == ["270000", "113", "3 epochs of 75 images"]
    assert rows["SOLVER.WARMUP_ITERS"] == ["1000", "12", "at most 10% of the run"]
    assert rows["SOLVER.BASE_LR"] == ["0.01", "typed"]
    assert rows["SOLVER.STEPS"][2:] == ["the same part of the run"]
    assert rows["SOLVER.CHECKPOINT_PERIOD"] == ["5000", "57", "half of the run"]


def test_the_table_has_the_epochs_that_a_file_states(caplog):
    cfg = config(R50, "SOLVER.EPOCHS", 3.0, "TEST.EVAL_EPOCHS", 1.0)  # as if in the file
    with caplog.at_level("INFO"):
        resolve_schedule(Settings(cfg), 1, 160)
    (table,) = caplog.messages
    assert re.search(r"SOLVER.MAX_ITER +3 epochs +30 +3 epochs of 160 images", table)
    assert re.search(r"TEST.EVAL_PERIOD +1 epochs +10 +1 epochs of 160 images", table)
