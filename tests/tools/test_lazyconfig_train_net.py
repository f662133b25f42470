"""The command line of lazy configs, end to end."""

import json
import re

import pytest
import safetensors
import torch
from dataset_commands import lazy_config
from detectron2.config import LazyConfig, instantiate
from helpers import refusal, run_tool

import gn_detect
from gn_detect.engine.lazy_config import load_lazy_config

pytestmark = pytest.mark.slow

QUICK = gn_detect.get_config_file("lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py")

# A config of the user's own, for data of the user's own.
OWN = """
model.roi_heads.box_predictor.test_score_thresh = 0.0
train.log_period = 1
train.checkpointer.period = 1
train.checkpointer.max_to_keep = 2
"""


@pytest.fixture
def own_config(coco_files, tmp_path):
    path = lazy_config(tmp_path / "own.py", coco_files, coco_files)
    path.write_text(path.read_text() + OWN)
    return str(path)


def train_net(*args, **kwargs):
    return run_tool("lazyconfig_train_net.py", *args, **kwargs)


def metrics(output) -> dict[int, dict]:
    """Iteration -> its metrics."""
    rows = [json.loads(line) for line in (output / "metrics.json").open()]
    out = {}
    for row in rows:
        out.setdefault(row["iteration"], {}).update(row)
    return out


def test_trains_resumes_and_evaluates(own_config, tmp_path):
    run = tmp_path / "run"
    start = ("--config-file", own_config, f"train.output_dir={run}", "train.max_iter=3")
    first = train_net(*start, "train.report=True")
    assert "Starting training from iteration 0" in first.stdout
    final = {f"model_{n}.{kind}" for n in ("final", "best") for kind in ("pth", "safetensors")}
    assert {p.name for p in run.glob("model_*")} == {
        *("model_0000001.pth", "model_0000002.pth", *final)
    }
    with safetensors.safe_open(run / "model_final.safetensors", "pt") as file:
        assert file.metadata()["gn_detect.config"] == (run / "config.yaml").read_text()
    cfg = load_lazy_config(own_config)
    multiplier = instantiate(cfg.lr_multiplier)
    trained = metrics(run)
    assert {0, 1, 2} <= set(trained)
    for iteration in range(3):
        expected = cfg.optimizer.lr * multiplier(iteration / 3)
        assert trained[iteration]["lr"] == pytest.approx(expected)
    assert {"bbox/AP", "segm/AP", "bbox/AP50"} <= set(max(trained.items())[1])
    report = (run / "report.html").read_text()
    assert f"<b>{max(trained.items())[1]['segm/AP']:.1f}</b><span>mask AP</span>" in report
    for text in (
        *("Where it errs: lazy_val", "lazy_train</h3>"),
        *("<dt>iterations</dt><dd>3</dd>", "max_iter: 3"),
    ):
        assert text in report
    saved = LazyConfig.load(str(run / "config.yaml"))
    assert saved.train.max_iter == 3
    assert isinstance(instantiate(saved.model), torch.nn.Module)

    again = train_net(
        *("--resume", "--config-file", own_config),
        *(f"train.output_dir={run}", "train.max_iter=5"),
    )
    assert "Starting training from iteration 3" in again.stdout
    assert {p.name for p in run.glob("model_*")} == {
        *("model_0000003.pth", "model_0000004.pth", *final)
    }
    resumed = metrics(run)
    assert {3, 4} <= set(resumed)
    assert resumed[3]["lr"] == pytest.approx(cfg.optimizer.lr * multiplier(3 / 5))

    output = train_net(
        *("--eval-only", "--config-file", own_config, f"train.output_dir={tmp_path / 'eval'}"),
        f"train.init_checkpoint={run / 'model_final.pth'}",
    ).stdout
    (values, _) = [
        line.split(": ")[-1].split(",")
        for line in output.splitlines()
        if re.search(r"copypaste: [\d.]+,", line)
    ]
    ap = max(resumed.items())[1]
    assert [float(v) for v in values[:3]] == [
        round(ap[f"bbox/{name}"], 4) for name in ("AP", "AP50", "AP75")
    ]
    results = "inference/coco_instances_results.json"
    assert (run / results).read_bytes() == (tmp_path / "eval" / results).read_bytes()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--config-file: name a lazy config"),
        (["--config-file", "absent.py"], "absent.py"),
        (
            ["--config-file", QUICK, "train.max_itr=3"],
            "no key train.max_itr; similar: train.max_it",
        ),
        (["--config-file", QUICK, "SOLVER.MAX_ITER", "3"], "not of the form key=value"),
        (["--config-file", QUICK, "train.amp.dtype=fp16"], "train.amp.dtype is 'fp16'; known: "),
    ],
)
def test_errors_are_sentences(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if message.startswith("train."):
        args = [*args, f"train.output_dir={tmp_path}"]
    assert message in refusal("lazyconfig_train_net.py", *args)


def test_undecodable_image_is_named(own_config, coco_files, tmp_path):
    coco_files.damage("2.png")
    options = ("train.max_iter=9", f"train.output_dir={tmp_path / 'run'}")
    line = refusal("lazyconfig_train_net.py", "--config-file", own_config, *options)
    assert line.startswith("error: cannot use the image") and "2.png" in line
