"""The runs that are compared, without their training."""

import functools
import json
import math
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import ResNet
from detectron2.utils.events import EventStorage
from helpers import ROOT, TINY, run_tool
from torch import nn

from gn_detect.config import load_config
from gn_detect.data.shapes import write_shapes
from gn_detect.engine import Trainer
from gn_detect.engine.launch import argument_parser, parse_args
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

pytestmark = pytest.mark.slow

compare_norms = runpy.run_path(str(ROOT / "tools/compare_norms.py"))["main"]
parse_train_args = runpy.run_path(str(ROOT / "tools/train_net.py"))["parse_arguments"]

KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@pytest.fixture
def runs(monkeypatch):
    """The configs of the runs, in order. The box AP is ten times the images of a pass, plus the
    seed; the mask AP is NaN, as where nothing was predicted, or with seed 1 -1, as where nothing is
    asked. At a high rate runs diverge."""
    runs = []

    def train(command, **_):
        assert Path(command[1]).samefile(ROOT / "tools/train_net.py")
        monkeypatch.setattr("sys.argv", command[1:])
        args = parse_train_args()
        assert args.resume
        cfg = load_config(args.config_file, args.opts)
        resolve_schedule(Settings(cfg, args.opts[::2]), processes=args.num_gpus)
        runs.append(cfg)
        if cfg.SOLVER.BASE_LR > 9:
            return subprocess.CompletedProcess(command, 1, "training diverged at iteration 3 (a)")
        ap = {
            "bbox/AP": 10.0 * cfg.SOLVER.IMS_PER_GPU + cfg.SEED,
            "segm/AP": (math.nan, -1.0)[cfg.SEED],
        }
        rows = [{"iteration": 3, "bbox/AP": 1.0}, {"iteration": 5, **ap}, {"iteration": 5, "lr": 1}]
        Path(cfg.OUTPUT_DIR, "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", train)
    return runs


def table(capsys) -> dict[str, list[str]]:
    """The rows that were printed, by the norm."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    return {norm: row for norm, *row in ([c.strip() for c in li.split("|")[1:-1]] for li in lines)}


def test_one_table_and_one_plot_and_no_run_twice(runs, tmp_path, capsys):
    study = ["--output", str(tmp_path), "--images", "66", "--total-batch", "4"]
    study += ["--images-per-pass", "1", "2", "4"]
    opts = ["--", "MODEL.FPN.OUT_CHANNELS", "32"]
    args = [*study, "--norms", "BN", "GN+WS", "--seeds", "2", *opts]
    compare_norms(args)
    assert len({cfg.OUTPUT_DIR for cfg in runs}) == len(runs) == 2 * 3 * 2
    for cfg in runs:
        norms, ws = {cfg.MODEL[key].NORM for key in KEYS}, cfg.MODEL.GN.WEIGHT_STANDARDIZATION
        assert (norms, ws) in (({"BN"}, ""), ({"GN"}, "authors"))
        assert cfg.MODEL.FPN.OUT_CHANNELS == 32  # of the command line
        # The linear rule, from 0.02 for 2 images; and 16 whole steps.
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (pytest.approx(0.04), 4)
        assert cfg.SOLVER.MAX_ITER == 16
        assert cfg.SOLVER.IMS_PER_GPU * cfg.SOLVER.ACCUMULATE_STEPS == 4
    # Nothing else depends on the images of a pass.
    for cfg in runs:
        cfg.SOLVER.pop("IMS_PER_GPU"), cfg.SOLVER.pop("ACCUMULATE_STEPS"), cfg.pop("OUTPUT_DIR")
    assert len({cfg.dump() for cfg in runs}) == 2 * 2  # norms and seeds

    rows = table(capsys)
    cells = [f"{n}0.5 / 0.0 ({n}0.0-{n}1.0 / 0.0-0.0)" for n in (1, 2, 4)]
    assert rows == {"BN": cells, "GN+WS": cells}
    assert (tmp_path / "norms.png").stat().st_size > 0
    # Another call adds to it, and one that is repeated runs nothing.
    rows["LN2d"] = [f"{n}0.0 / 0.0" for n in (1, 2, 4)]
    for _ in range(2):
        compare_norms([*study, "--norms", "LN2d", *opts])
        assert len(runs) == 12 + 3 and runs[-1].MODEL.FPN.NORM == "LN2d"
        assert table(capsys) == rows
    # The runs of other settings, here of more steps, are no part of a table.
    more = [*study, "--norms", "GN", "--images", "88", *opts]
    compare_norms(more)
    assert table(capsys) == {"GN": rows["LN2d"]} and len(runs) == 15 + 3
    compare_norms(["--report", *more])
    said = capsys.readouterr().out
    assert "GN-1of4" not in said and f"{tmp_path / 'BN-1of4-seed1'} is left out" in said
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        compare_norms([*args, "SOLVER.GAMMA", "0.5"])


def test_classification(tmp_path, capsys, monkeypatch):
    """The error is ten times the images of a pass; without BN, it is NaN."""
    runs = []

    def train(command, **_):
        assert Path(command[1]).samefile(ROOT / "tools/lazyconfig_train_net.py")
        monkeypatch.setattr("sys.argv", command[1:])
        args = parse_args(argument_parser())
        assert args.resume
        cfg = load_lazy_config(args.config_file, args.opts)
        resolve_schedule(Settings(cfg, [o.split("=")[0] for o in args.opts]), args.num_gpus, 5000)
        runs.append(cfg)
        error = 10.0 * cfg.train.ims_per_gpu if cfg.model.stem.norm == "BN" else math.nan
        row = {"iteration": 5, "classification/top1_error": error}
        Path(cfg.train.output_dir, "metrics.json").write_text(json.dumps(row))
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", train)
    study = ["--task", "classification", "--output", str(tmp_path), "--images", "130"]
    norms = ["--norms", "GN", "GN+WS", "LN", "IN", "BN"]
    compare_norms([*study, *norms, "--images-per-pass", "2", "8", "--", "optimizer.momentum=0.5"])
    assert table(capsys) == {**dict.fromkeys(norms[1:5], ["100.0"] * 2), "BN": ["20.0", "80.0"]}
    for cfg in runs:
        assert cfg.dataloader.train.total_batch_size == 32 and cfg.train.max_iter == 4
        assert cfg.train.ims_per_gpu * cfg.train.accumulate_steps == 32
        assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.1, 0.5)
        assert cfg.dataloader.train.num_workers == 0  # several would augment otherwise
        cfg.train.update(ims_per_gpu=0, accumulate_steps=0, output_dir="")
    assert runs[::2] == runs[1::2]
    images = torch.zeros(2, 3, 32, 32)
    layers = [ResNet(instantiate(c.model.stem), instantiate(c.model.stages)) for c in runs[::2]]
    counts = [
        [m.num_channels // m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)]
        for net in layers
    ]
    gn, ws, ln, instance, bn = (sorted(set(c)) for c in counts)
    assert gn == ws == [4, 8, 16, 32] and ln == [16, 32, 64, 128] and instance == [1] and not bn
    assert isinstance(layers[-1].stem.conv1.norm, nn.BatchNorm2d)
    assert [c.model.weight_standardization for c in runs[::2]] == ["", "authors", "", "", ""]
    assert all(net(images)["res5"].shape == (2, 128, 1, 1) for net in layers)


def test_masked_padding(runs, tmp_path):
    compare_norms(["--output", str(tmp_path), "--norms", "GN", "GN+mask", "--images-per-pass", "1"])
    assert [(cfg.MODEL.FPN.NORM, cfg.MODEL.GN.MASK_PADDING) for cfg in runs] == [
        *(("GN", False), ("GN", True))
    ]


def test_several_processes(runs, tmp_path):
    args = ["--output", str(tmp_path), "--norms", "SyncBN", "--images-per-pass", "1", "2"]
    compare_norms([*args, "--num-gpus", "4"])
    solvers = [cfg.SOLVER for cfg in runs]
    assert [(s.IMS_PER_BATCH, s.ACCUMULATE_STEPS) for s in solvers] == [(8, 2), (8, 1)]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--norms", "SyncBN"], "SyncBN in one process is BN: give --num-gpus"),
        (["--total-batch", "6"], "--total-batch is 6, no multiple of 4"),
        (["--num-gpus", "2"], "--total-batch is 8, no multiple of 8 (--images-per-pass) x 2"),
        (["--images-per-pass", "2", "0"], "--images-per-pass and --seeds must be at least 1"),
        (["--total-batch", "0"], "--images-per-pass and --seeds must be at least 1"),
        (["--images", "0"], "--images is 0, less than --total-batch 8"),
        (["--images", "7"], "--images is 7, less than --total-batch 8"),
        (["--train-json", "a.json"], "--train-json needs --val-json"),
        (["--val-images", "images"], "--train-json needs --val-json"),
        (["--task", "classification", "--mixed"], "--mixed: of detection; give dataloader"),
        (["--task", "classification", "--val-json", "a.json"], "--val-json: of detection"),
        (["--task", "classification", "--norms", "LN2d"], "LN2d is compared in detection alone"),
        (["--train-json", "a.json", "--val-json", "b.json", "--mixed"], "excludes --mixed"),
    ],
)
def test_what_cannot_be_compared(args, message, runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_norms(["--output", str(tmp_path), *args])
    assert message in capsys.readouterr().err and not runs


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_an_error(
    runs, tmp_path, capsys, monkeypatch
):
    args = ["--output", str(tmp_path), "--norms", "FrozenBN", "--images-per-pass", "1"]
    compare_norms([*args, "--", "SOLVER.BASE_LR", "1e3"])
    assert runs[0].GUARDS.SCRATCH_FROZEN_BN is False
    assert table(capsys) == {"FrozenBN": ["0.0 / 0.0, diverged at iteration 3"]}
    failed = subprocess.CompletedProcess([], 1, "no space left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="error: a run failed.*\nno space left"):
        compare_norms([*args, "--images-per-pass", "2"])


def test_a_run_that_was_not_evaluated_has_no_result(runs, tmp_path, monkeypatch):
    def train(command, **_):
        Path(command[-1], "metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}')
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", train)
    with pytest.raises(SystemExit, match="metrics.json has no bbox/AP: the run did not evaluate"):
        compare_norms(["--output", str(tmp_path), "--norms", "GN"])
    assert not list(tmp_path.glob("*/result.json"))


def test_each_step_is_on_the_same_images(tmp_path, monkeypatch):
    """Two steps of each run, from its command on: the same weights at first, and the images in the
    same order, scaled and flipped the same, however many pass together and whatever the norm."""
    seen, starts = {}, []

    def two_steps(trainer):
        loop, steps = trainer._trainer, []
        per_pass = trainer.cfg.SOLVER.IMS_PER_GPU
        starts.append(trainer.model.roi_heads.box_predictor.cls_score.weight.clone())
        with EventStorage():
            for _ in range(2):
                loop.run_step()
                assert [len(batch) for batch in loop.batches] == [per_pass] * (4 // per_pass)
                steps += [image for batch in loop.batches for image in batch]
        seen[Path(trainer.cfg.OUTPUT_DIR).name] = steps
        Path(trainer.cfg.OUTPUT_DIR, "metrics.json").write_text('{"iteration": 1, "bbox/AP": 1.0}')

    monkeypatch.setattr(Trainer, "train", two_steps)
    train = SimpleNamespace(
        run=lambda command, **_: run_tool("train_net.py", *command[2:]), PIPE=None, STDOUT=None
    )
    monkeypatch.setitem(compare_norms.__globals__, "subprocess", train)
    few = functools.partial(write_shapes, num_train=12, num_val=1, image_size=64)
    monkeypatch.setitem(compare_norms.__globals__, "write_shapes", few)
    tiny = dict(zip(TINY[::2], TINY[1::2], strict=True))
    tiny = {key: value for key, value in tiny.items() if key.startswith(("MODEL.", "INPUT."))}
    tiny["INPUT.MIN_SIZE_TRAIN"] = "(48, 56, 64)"
    opts = [word for pair in tiny.items() for word in pair]
    args = ["--output", str(tmp_path), "--mixed", "--images", "8", "--total-batch", "4"]
    compare_norms([*args, "--norms", "GN", "--images-per-pass", "1", "2", "4", "--", *opts])
    compare_norms([*args, "--norms", "BN", "--images-per-pass", "2", "--", *opts])

    assert seen.keys() == {"GN-1of4-seed0", "GN-2of4-seed0", "GN-4of4-seed0", "BN-2of4-seed0"}
    assert all(torch.equal(start, starts[0]) for start in starts)
    first, *others = seen.values()
    assert len({image["file_name"] for image in first}) == 8
    assert len({image["image"].shape for image in first}) > 2  # of both orientations, and scaled
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            assert mine["file_name"] == theirs["file_name"]
            assert torch.equal(mine["image"], theirs["image"])
            assert torch.equal(
                mine["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor
            )
