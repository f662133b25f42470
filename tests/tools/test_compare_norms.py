"""The runs that are compared, without their training."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

from gn_detect.config import load_config
from gn_detect.settings import Settings
from gn_detect.solver import resolve_schedule

pytestmark = pytest.mark.slow

compare_norms = runpy.run_path(str(ROOT / "tools/compare_norms.py"))["main"]
parse_train_args = runpy.run_path(str(ROOT / "tools/train_net.py"))["parse_arguments"]


@pytest.fixture
def runs(monkeypatch):
    """The configs of the runs, in order. The box AP is ten times the images of a step, plus the
    seed; the mask AP is NaN, as where nothing was predicted. At a high rate runs diverge."""
    runs = []

    def train(command, **_):
        assert Path(command[1]).samefile(ROOT / "tools/train_net.py")
        monkeypatch.setattr("sys.argv", command[1:])
        args = parse_train_args()
        assert args.resume
        cfg = load_config(args.config_file, args.opts)
        resolve_schedule(Settings(cfg), processes=1)
        runs.append(cfg)
        if cfg.SOLVER.BASE_LR > 9:
            return subprocess.CompletedProcess(command, 1, "training diverged at iteration 3 (a)")
        ap = {"bbox/AP": 10.0 * cfg.SOLVER.IMS_PER_BATCH + cfg.SEED, "segm/AP": float("nan")}
        rows = [{"iteration": 3, "bbox/AP": 1.0}, {"iteration": 5, **ap}, {"iteration": 5, "lr": 1}]
        Path(cfg.OUTPUT_DIR, "metrics.json").write_text("\n".join(map(json.dumps, rows)))
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(subprocess, "run", train)
    return runs


def test_one_table_and_one_plot_and_no_run_twice(runs, tmp_path, capsys):
    args = ["--output", str(tmp_path), "--images", "32", "--seeds", "2", "--norms", "BN", "GN+WS"]
    args += ["--images-per-step", "1", "2", "--", "MODEL.FPN.OUT_CHANNELS", "32"]
    compare_norms(args)
    assert len({cfg.OUTPUT_DIR for cfg in runs}) == len(runs) == 2 * 2 * 2
    for cfg in runs:
        norms = {cfg.MODEL[key].NORM for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
        ws = cfg.MODEL.GN.WEIGHT_STANDARDIZATION
        assert (norms, ws) in (({"BN"}, ""), ({"GN"}, "authors"))
        assert cfg.MODEL.FPN.OUT_CHANNELS == 32  # of the command line
        # The same images, and the linear rule.
        assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 32
        assert cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH == pytest.approx(0.01)
    text = capsys.readouterr().out
    cells = "10.5 / 0.0 (10.0-11.0 / 0.0-0.0)", "20.5 / 0.0 (20.0-21.0 / 0.0-0.0)"
    for norm in ("BN", "GN+WS"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {norm} ")]
        assert tuple(cell.strip() for cell in row.split("|")[2:4]) == cells
    assert (tmp_path / "norms.png").stat().st_size > 0
    compare_norms(args)
    assert len(runs) == 8 and capsys.readouterr().out in text  # the table alone
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        compare_norms([*args, "SOLVER.GAMMA", "0.5"])


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_an_error(
    runs, tmp_path, capsys, monkeypatch
):
    args = ["--output", str(tmp_path), "--norms", "FrozenBN", "--images-per-step", "1"]
    compare_norms([*args, "--", "SOLVER.BASE_LR", "1e3"])
    assert runs[0].GUARDS.SCRATCH_FROZEN_BN is False
    assert "0.0 / 0.0, diverged at iteration 3" in capsys.readouterr().out
    failed = subprocess.CompletedProcess([], 1, "no space left")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="error: a run failed.*\nno space left"):
        compare_norms([*args, "--images-per-step", "2"])
