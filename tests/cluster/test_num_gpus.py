"""Two processes of ``--num-gpus``, with each tool, where there is no CUDA."""

import json

from cluster.processes import WITHOUT_CUDA
from dataset_commands import lazy_config
from helpers import ROOT

pytestmark = WITHOUT_CUDA
OPTIONS = ("--num-gpus", 2, "--dist-url", "auto")


def metrics(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").open()]


def test_without_cuda(runs):
    options = (*OPTIONS, "--val-fraction", 0.34, "TEST.REPORT", True)
    output = runs.train("run", *options, iterations=2).succeeds()
    assert "Rank of current process: 0. World size: 2" in output
    assert "total_loss" in output
    run = runs.directory / "run"
    assert metrics(run)[-1]["iteration"] == 2
    assert any("bbox/AP" in row for row in metrics(run))
    assert output.count("report of the run: ") == 1  # the other process waits for it
    assert "Where it errs: custom_val" in (run / "report.html").read_text()
    assert (run / "model_final.pth").is_file()


def test_of_a_lazy_config_without_cuda(runs):
    config = lazy_config(runs.directory / "own.py", runs.files, runs.files)
    output = runs.start(
        *(ROOT / "tools/lazyconfig_train_net.py", "--config-file", config, *OPTIONS),
        *("train.max_iter=2", "train.log_period=1", f"train.output_dir={runs.directory / 'run'}"),
    ).succeeds()
    assert "no CUDA device is available: train.device = cpu" in output
    assert "Rank of current process: 0. World size: 2" in output
    assert {0, 1} <= {row["iteration"] for row in metrics(runs.directory / "run")}
    assert (runs.directory / "run/model_final.pth").is_file()
