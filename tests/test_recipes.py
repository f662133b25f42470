"""Every config that ships: its schedule is the one in its name, and its weights fit."""

import json
import re

import pytest
import timm
from detectron2.checkpoint.catalog import ModelCatalog
from helpers import CONFIGS, ROOT, as_shipped

from gn_detect.config import ConfigError
from gn_detect.engine.guards import check_recipe
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

PUBLISHED = json.loads((ROOT / "configs" / "published.json").read_text())
OF_COCO = [name for name in CONFIGS if not name.startswith("finetune/")]  # tests/test_finetune.py
every_config = pytest.mark.parametrize("name", OF_COCO)


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
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
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
    elif weights.startswith("tensorpack://"):
        assert weights == f"tensorpack://ImageNet-R{depth}-GroupNorm32-AlignPadding"
        assert name.startswith("tensorpack/")
    elif "_ws_" in name:
        file = f"{'X' if '_X_' in name else 'R'}-{depth}-GN-WS"
        end = ".pkl" if name.startswith("Detectron/") else ".pth.tar"
        assert weights.endswith(f"syqiao/WeightStandardization/{file}{end}")
    elif weights:
        assert weights == f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
    assert (
        f"_R_{cfg.MODEL.RESNETS.DEPTH}" in name
        or f"_X_{cfg.MODEL.RESNETS.DEPTH}" in name
        or (cfg.MODEL.RESNETS.DEPTH == 50 and "GN-paper" in name)
    )
    resolve_schedule(Settings(cfg), processes=1)
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
    of_detectron = {name for name in CONFIGS if name.startswith("Detectron/")}
    assert rgb == {name for name in CONFIGS if "_ws_" in name} - of_detectron | of_timm | a1h
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
