"""What --recipe auto derives, by hand and by what it promises."""

import logging
import math
import re
import runpy
import sys

import numpy as np
import pytest
from helpers import ROOT, TINY, as_shipped, config

from gn_detect import get_config_file
from gn_detect.config import ConfigError, load_config, locate
from gn_detect.data.anchors import best_iou, fit_sizes
from gn_detect.data.coco import load_coco, register_coco_json
from gn_detect.data.model_input import ModelInput
from gn_detect.data.summary import DataSummary, summarize
from gn_detect.engine import prepare_run
from gn_detect.engine.describe_data import model_input
from gn_detect.engine.recipe import apply_recipe, derive_recipe, num_epochs
from gn_detect.settings import Settings

PHOTOS = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
C4, RETINANET = (
    f"COCO-Detection/{n}_gn_1x.yaml" for n in ("faster_rcnn_R_50_C4", "retinanet_R_50_FPN")
)
STRIDES = [4, 8, 16, 32, 64]


def data(side=50.0, num_images=200, per_image=2, size=(256, 320), class_images=(200,)):
    """``per_image`` squares of ``side`` pixels in each image, or the boxes ``side``, (N, 2)."""
    boxes = np.asarray(side, dtype=float)
    if boxes.ndim == 0:
        boxes = np.full((num_images * per_image, 2), side)
    counts = np.full(num_images, per_image)
    return DataSummary(
        json_file="own.json",
        classes=[str(i) for i in range(len(class_images))],
        class_objects=np.array(class_images),
        class_images=np.array(class_images),
        image_sizes=np.tile(size, (num_images, 1)),
        image_objects=counts,
        num_crowds=0,
        object_image=np.repeat(np.arange(num_images), counts)[: len(boxes)],
        boxes=boxes,
        areas={},
        resizing={},
        best_iou=None,
        warnings=(),
    )


def derived(summary, *typed, name=PHOTOS, strides=STRIDES, **kwargs):
    """The settings of a run with its recipe, and the keys that the recipe has a row of."""
    cfg = as_shipped(name).clone()
    cfg.merge_from_list(list(typed))
    cfg.DATASETS.TEST = ("own_val",)
    run = Settings(cfg, typed[::2])
    rows = derive_recipe(run, summary, strides, **kwargs)
    apply_recipe(run, rows)
    return run, [run.keys[row.name] for row in rows]


def recipe(summary, *typed, **kwargs):
    """Key -> value of the run, for what the recipe has a row of."""
    run, keys = derived(summary, *typed, **kwargs)
    return {key: value_of(run, key) for key in keys}


def value_of(run, key):
    node, last = locate(run.cfg, key)
    return node[last]


@pytest.mark.parametrize("side", [2, 5, 9, 14.3, 20, 60, 199])
@pytest.mark.parametrize("shorter", [200, 333, 480, 1200])
def test_small_objects_get_16_pixels_or_twice_the_config(side, shorter):
    found = recipe(data(side, 50, size=(shorter, 2 * shorter)))
    tested = found["INPUT.MIN_SIZE_TEST"]
    assert 224 <= tested <= 448
    assert side * tested / shorter >= 16 or tested == 448
    if tested > 224:  # and no more than needed, but for the rounding
        assert side * (tested - 32) / shorter < 16
        sizes = found["INPUT.MIN_SIZE_TRAIN"]
        assert np.mean(sizes) == pytest.approx(tested, abs=8)
        assert found["INPUT.MAX_SIZE_TRAIN"] / tested == pytest.approx(384 / 224, abs=0.15)
        assert found["INPUT.MAX_SIZE_TEST"] == found["INPUT.MAX_SIZE_TRAIN"]
    else:
        assert "INPUT.MIN_SIZE_TRAIN" not in found


def test_the_small_object_is_the_lower_quartile():
    sides = np.repeat([8.0, 10, 100], [40, 60, 300])[:, None] * [1, 1]
    assert recipe(data(sides))["INPUT.MIN_SIZE_TEST"] == 224
    assert recipe(data(sides[:200]))["INPUT.MIN_SIZE_TEST"] == 416  # 16 / 10 of 256, up to 32


def test_full_images_are_cut_in_training_at_the_scale_of_the_evaluation():
    found = recipe(data(10, per_image=40))
    assert found["INPUT.MIN_SIZE_TEST"] == 416 and "INPUT.MIN_SIZE_TRAIN" not in found
    assert found["INPUT.CROP.ENABLED"] and found["INPUT.CROP.TYPE"] == "relative"
    assert found["INPUT.CROP.SIZE"] == pytest.approx([224 / 416] * 2, abs=1e-3)
    assert "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE" not in found  # 64 for 12 objects of a crop
    assert "INPUT.CROP.SIZE" not in recipe(data(10, per_image=13))  # 4 objects of a crop
    assert "INPUT.CROP.SIZE" not in recipe(data(40, per_image=40))
    assert "INPUT.CROP.ENABLED" not in recipe(
        data(10, per_image=40), "INPUT.CROP.SIZE", "[0.9, 0.9]"
    )
    typed = recipe(data(10, per_image=40), "INPUT.CROP.ENABLED", "False")
    assert np.mean(typed["INPUT.MIN_SIZE_TRAIN"]) == 416
    assert typed["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 256


def test_anchors_are_fitted_at_the_scale_of_crops():
    thin = np.random.default_rng(0).uniform(4, 8, (8000, 1)) * [[1, 6]]
    key = "MODEL.ANCHOR_GENERATOR.SIZES"
    cut = recipe(data(thin, per_image=40))
    assert cut["INPUT.CROP.ENABLED"]
    whole = recipe(data(thin, per_image=40), "INPUT.CROP.ENABLED", "False")
    assert "INPUT.CROP.SIZE" not in whole
    np.testing.assert_allclose(np.concatenate(cut[key]), np.concatenate(whole[key]), rtol=0.05)


def test_images_are_not_enlarged_for_nothing():
    found = recipe(data(50, size=(128, 128)), name=R50)
    assert found["INPUT.MIN_SIZE_TEST"] == 256 and max(found["INPUT.MIN_SIZE_TRAIN"]) == 256
    assert found["INPUT.MAX_SIZE_TEST"] == 448
    assert recipe(data(6, size=(128, 128)), name=R50)["INPUT.MIN_SIZE_TEST"] == 704  # 32 pixels
    assert recipe(data(50, size=(480, 640)), name=R50)["INPUT.MIN_SIZE_TEST"] == 800


def test_sizes_follow_the_one_that_was_typed():
    small = data(10)
    assert recipe(small, "INPUT.MIN_SIZE_TEST", "320") == recipe(small) | {
        "INPUT.MIN_SIZE_TEST": 320,
        "INPUT.MIN_SIZE_TRAIN": (272, 296, 320, 344, 368),
        "INPUT.MAX_SIZE_TRAIN": 576,
        "INPUT.MAX_SIZE_TEST": 576,
    }
    found = recipe(small, "INPUT.MIN_SIZE_TRAIN", "(300, 340)")
    assert found["INPUT.MIN_SIZE_TEST"] == 320 and "INPUT.MIN_SIZE_TRAIN" not in found
    assert "INPUT.MIN_SIZE_TEST" not in recipe(small, "INPUT.LSJ.ENABLED", "True")


def test_anchors_that_cover_stay_and_others_are_fitted():
    key, ratios = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    found = recipe(data(40))
    assert found[key] == [[16], [32], [64], [128], [256]] and ratios not in found
    sizes = np.random.default_rng(0).uniform(8, 30, (400, 1))
    thin = np.concatenate([sizes, 6 * sizes], axis=1)
    found = recipe(data(thin))
    (shapes,) = found[ratios]
    fitted = best_iou(thin * 224 / 256, found[key], shapes)
    assert np.mean(fitted) > 0.6 and np.mean(fitted < 0.5) < 0.1
    assert np.mean(best_iou(thin * 224 / 256, [[16], [32], [64], [128], [256]], [0.5, 1, 2])) < 0.5
    assert all(len(row) == 1 for row in found[key]) and len(shapes) == 3
    assert all(2 * s <= a <= 16 * s for s, (a,) in zip(STRIDES, found[key], strict=True))
    typed = recipe(data(thin), key, "[[10], [20], [40], [80], [160]]")
    assert typed[key] == [[10], [20], [40], [80], [160]]


def test_anchors_follow_sizes_that_were_typed():
    thin = np.random.default_rng(0).uniform(4, 8, (400, 1)) * [[1, 6]]
    found = recipe(data(thin, size=(256, 512)), "INPUT.MAX_SIZE_TRAIN", "384")
    assert min(found["INPUT.MIN_SIZE_TRAIN"]) > 192  # half of 384, which holds
    assert found["MODEL.ANCHOR_GENERATOR.SIZES"] == fit_sizes(thin * 384 / 512, STRIDES, 1)


def test_anchors_are_fitted_to_the_half_of_them_that_was_typed():
    thin = data(np.tile([[10.0, 60]], (400, 1)))
    for key, name, typed in (
        ("MODEL.ANCHOR_GENERATOR.SIZES", "anchor_sizes", [[32], [48], [64], [96], [128]]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "aspect_ratios", [[0.4, 1.0, 2.5]]),
    ):
        run, _ = derived(thin, key, typed)
        rows = {row.name: row for row in derive_recipe(run, thin, STRIDES)}
        assert rows[name].value == typed
        boxes = np.array([[10.0, 60]]) * 224 / 256
        pair = rows["anchor_sizes"].value, rows["aspect_ratios"].value[0]
        iou = best_iou(boxes, *pair)[0]  # which the reason tells
        assert f"of these the best IoU is {iou:.2f}" in rows["anchor_sizes"].reason


def test_anchors_of_a_c4_and_of_a_retinanet_keep_their_number():
    thin = np.random.default_rng(0).uniform(20, 60, (400, 1)) * [[1, 8]]
    key = "MODEL.ANCHOR_GENERATOR.SIZES"
    for name in (C4, RETINANET):
        cfg = config(name)
        strides = model_input(cfg).anchors.strides
        stated = cfg.MODEL.ANCHOR_GENERATOR.SIZES
        found = recipe(data(thin, size=(500, 600)), name=name, strides=strides)
        assert np.shape(found[key]) == (len(strides), len(stated[0])) and found[key] != stated


def test_full_images_get_room():
    found = recipe(data(40, 100, per_image=130))
    assert found["TEST.DETECTIONS_PER_IMAGE"] == 200
    for use in ("TRAIN", "TEST"):
        assert found[f"MODEL.RPN.POST_NMS_TOPK_{use}"] == 400
    assert found["MODEL.RPN.PRE_NMS_TOPK_TEST"] == 400  # 500 in training
    assert found["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 512
    retinanet = recipe(data(40, 100, per_image=130), name=RETINANET)
    assert [key for key in retinanet if "PER_IMAGE" in key] == ["TEST.DETECTIONS_PER_IMAGE"]
    few = recipe(data(40, 100, per_image=3))
    assert not [key for key in few if "TOPK" in key or "PER_IMAGE" in key]


@pytest.mark.parametrize(
    "class_images",
    [
        [200],
        [120, 90, 40],
        [200, 12],
        [160, 150, 140, 1],
        [100, 24, 23, 22, 21],
        [80, 4, 3, 2, 2, 2],
    ],
)
def test_rare_classes_come_up_to_four_times(class_images):
    found = recipe(data(class_images=class_images))
    share = np.sort(class_images) / 200
    assert ("DATALOADER.SAMPLER_TRAIN" in found) == (share[0] * 4 <= np.median(share))
    if threshold := found.get("DATALOADER.REPEAT_THRESHOLD"):
        assert found["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
        assert 1.9 < math.sqrt(threshold / share[0]) < 4.1
        assert threshold <= np.median(share) + 1e-4


def test_a_step_from_scratch_on_a_cpu_has_one_image():
    key, cpu = "SOLVER.IMS_PER_GPU", ("MODEL.DEVICE", "cpu")
    assert recipe(data(), *cpu)[key] == 1
    for other in (
        ("MODEL.DEVICE", "cuda"),  # where a step of one image is hardly faster
        (*cpu, "SOLVER.IMS_PER_BATCH", 2),
        (*cpu, "SOLVER.ACCUMULATE_STEPS", 2),
        (*cpu, "MODEL.WEIGHTS", "detectron2://a.pkl"),
        (*cpu, "MODEL.RESNETS.NORM", "BN"),
        (*cpu, "SOLVER.REFERENCE_WORLD_SIZE", 1),  # Detectron2 scales, and refuses to do it twice
    ):
        assert key not in recipe(data(), *other)
    assert key not in recipe(data(), *cpu, processes=2)
    run, _ = derived(data(), *cpu, "SOLVER.IMS_PER_GPU", 2)
    assert run["ims_per_gpu"] == 2


def test_the_length_of_a_run():
    assert num_epochs(100, scratch=False) == 50  # small data
    assert num_epochs(118_000, scratch=False) == 12  # 1x of COCO
    assert num_epochs(3, scratch=False) == 100
    counts = [num_epochs(n, scratch=False) * n for n in (10, 100, 1000, 10_000, 100_000)]
    assert counts == sorted(counts)  # more images are never seen less in all
    found = recipe(data(40, 100))
    assert found["SOLVER.EPOCHS"] == 100  # from scratch
    assert found["TEST.EVAL_EPOCHS"] == 10 and found["SOLVER.EARLY_STOP"] == 0
    steps = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS")
    assert recipe(data(40, 100), *steps, "(900,)")["SOLVER.EARLY_STOP"] == 0
    assert recipe(data(40, 100), *steps, "()")["SOLVER.EARLY_STOP"] == 5  # a constant rate
    assert recipe(data(40, 100), "MODEL.WEIGHTS", "some.pth")["SOLVER.EPOCHS"] == 50


def test_a_typed_length_stays_and_the_rest_follows_it():
    found = recipe(data(40, 100), "SOLVER.MAX_ITER", "1000")  # 20 epochs of 2 images
    assert "SOLVER.EPOCHS" not in found and found["TEST.EVAL_EPOCHS"] == 2
    found = recipe(data(40, 100), "SOLVER.MAX_ITER", "1000", "SOLVER.IMS_PER_GPU", "1", processes=3)
    assert found["TEST.EVAL_EPOCHS"] == 3
    passes = ("SOLVER.IMS_PER_GPU", "1", "SOLVER.ACCUMULATE_STEPS", "4")
    assert recipe(data(40, 100), "SOLVER.MAX_ITER", "1000", *passes)["TEST.EVAL_EPOCHS"] == 4
    found = recipe(data(40, 100), "SOLVER.EPOCHS", "30.0", "TEST.EVAL_PERIOD", "7")
    assert "SOLVER.EPOCHS" not in found and "TEST.EVAL_EPOCHS" not in found


def test_a_warm_up_takes_no_more_than_a_tenth():
    run, _ = derived(data(40, 100))
    run.cfg.SOLVER.WARMUP_EPOCHS = 20.0
    rows = derive_recipe(run, data(40, 100), STRIDES)
    assert {row.name: row.value for row in rows}["warmup_epochs"] == 10
    run.cfg.SOLVER.WARMUP_EPOCHS = 9.0
    assert "warmup_epochs" not in [row.name for row in derive_recipe(run, data(40, 100), STRIDES)]


def test_a_recipe_is_the_same_each_time_and_changes_nothing_by_itself():
    cfg = as_shipped(PHOTOS).clone()
    before, summary = cfg.dump(), data(np.random.default_rng(0).uniform(3, 40, (400, 2)))
    first, second = (derive_recipe(Settings(cfg), summary, STRIDES) for _ in range(2))
    assert first == second and cfg.dump() == before


def another(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(another, value))
    if isinstance(value, bool):
        return not value
    return {"relative": "absolute"}.get(value, "Own") if isinstance(value, str) else value + 1


def test_what_was_typed_stays():
    """Of all keys that the recipe derives, each typed in turn."""
    summary = data(8, 200, per_image=130, class_images=(200, 4))
    short = ("SOLVER.EPOCHS", "9.0", "INPUT.CROP.ENABLED", "False")
    thin = recipe(data(np.tile([[10.0, 60]], (400, 1))), *short)
    keys = recipe(summary) | thin | recipe(summary, *short)
    assert len(keys) == 20
    for key, value in keys.items():
        run, _ = derived(summary, key, another(value))
        assert value_of(run, key) == another(value), key


def test_the_recipes_of_real_data(shared_data):
    def of(name):
        summary = summarize(load_coco(str(shared_data / name / "train.json")), ModelInput())
        return recipe(summary)

    persons, nuclei = of("pennfudan"), of("nuclei_dsb2018")
    assert persons["INPUT.MIN_SIZE_TEST"] == 224 and "TEST.DETECTIONS_PER_IMAGE" not in persons
    assert nuclei["INPUT.MIN_SIZE_TEST"] == 416 and nuclei["INPUT.CROP.ENABLED"]
    assert "INPUT.CROP.ENABLED" not in persons and nuclei["TEST.DETECTIONS_PER_IMAGE"] == 400
    assert persons["SOLVER.EPOCHS"] == 96 and nuclei["SOLVER.EPOCHS"] == 104


def test_a_run_takes_its_recipe_and_prints_it(coco_files, caplog):
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    output = str(coco_files.json_file.parent / "output")
    typed = ["DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",), "OUTPUT_DIR", output]
    typed += ["SOLVER.EPOCHS", 6.0, *TINY]
    cfg = load_config(get_config_file(PHOTOS), typed)
    with caplog.at_level(logging.INFO, "gn_detect"):
        prepare_run(cfg, typed=typed[::2], recipe=True)
    assert cfg.TEST.EVAL_EPOCHS == 1 and cfg.TEST.EVAL_PERIOD == 3  # images, one by one
    (table,) = (r.message for r in caplog.records if r.message.startswith("recipe from the data"))
    row = next(line for line in table.splitlines() if line.startswith("TEST.EVAL_EPOCHS"))
    assert re.fullmatch(r"TEST.EVAL_EPOCHS +1.0 +0.0 +10 evaluations of the run, an epoch .*", row)
    cfg = load_config(get_config_file(PHOTOS), typed)
    prepare_run(cfg, typed=typed[::2])
    assert cfg.TEST.EVAL_EPOCHS == 0


def test_a_config_that_fits_its_data_stays(shared_data):
    """So that at the length that is typed, both are one run."""
    summary = summarize(load_coco(str(shared_data / "pennfudan/train.json")), ModelInput())
    run, _ = derived(summary, "SOLVER.MAX_ITER", "400", "TEST.EVAL_PERIOD", "0")
    cfg = as_shipped(PHOTOS).clone()
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.DATASETS.TEST = 400, 0, ("own_val",)
    assert run.cfg.dump() == cfg.dump()


def test_data_without_objects_have_no_recipe(caplog):
    derived(data(np.zeros((0, 2))))
    assert "--recipe auto: the training data have no objects" in caplog.text


def test_a_recipe_follows_one_training_set(coco_files):
    for name in ("own", "own_too"):
        register_coco_json(name, str(coco_files.json_file), str(coco_files.image_root))
    typed = ["DATASETS.TRAIN", ("own", "own_too"), "DATASETS.TEST", ("own",)]
    typed += ["OUTPUT_DIR", str(coco_files.json_file.parent / "output"), *TINY]
    cfg = load_config(get_config_file(PHOTOS), typed)
    with pytest.raises(ConfigError, match="DATASETS.TRAIN is own, own_too; give --train-json, or"):
        prepare_run(cfg, typed=typed[::2], recipe=True)


@pytest.mark.parametrize(
    "folder, options, expected",
    [
        ("finetune", ["--train-json", "a", "--train-images", "b"], "auto"),
        ("finetune", ["--train-json", "a", "--train-images", "b", "--recipe", "none"], "none"),
        ("finetune", [], "none"),
        ("finetune", ["--eval-only", "--val-json", "a", "--val-images", "b"], "none"),
        ("quickstart", ["--train-json", "a", "--train-images", "b"], "none"),
        ("quickstart", ["--recipe", "auto"], "auto"),
    ],
)
def test_the_recipe_of_the_command_line(monkeypatch, folder, options, expected):
    parse = runpy.run_path(str(ROOT / "tools/train_net.py"))["parse_arguments"]
    config_file = str(ROOT / "configs" / folder / "some.yaml")
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", config_file, *options])
    assert parse().recipe == expected


def test_no_recipe_is_derived_to_evaluate(monkeypatch, capsys):
    parse = runpy.run_path(str(ROOT / "tools/train_net.py"))["parse_arguments"]
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--recipe", "auto", "--eval-only"])
    with pytest.raises(SystemExit):
        parse()
    assert "evaluate with that as --config-file" in capsys.readouterr().err
