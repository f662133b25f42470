"""The tool's table is the one that its samples make."""

import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark.conftest import OPTS
from helpers import ROOT

from gn_detect.benchmark import detectors, kernels
from gn_detect.benchmark.questions import quartiles, ratio

pytestmark = pytest.mark.slow

tool = runpy.run_path(str(ROOT / "tools/benchmark.py"))
ROUNDS = ["--rounds", 3]
STEP = [*ROUNDS, "--rois", 16]
PAIR = ["detectron2-gn", "ours-lean"]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Run a question as without a GPU; the rows of its table, and its results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(question, *args):
        command = [question, "--output", tmp_path / "results", *args, "--", *OPTS]
        try:
            tool["main"](list(map(str, command)))
        finally:
            (table,) = (tmp_path / "results").glob(f"{question}-*.md")
            text = table.read_text()
            lines = [line.strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
            head, _, *rows = [[cell.strip() for cell in line] for line in lines]
            content = json.loads(table.with_suffix(".json").read_text())
            run.results = content["results"]
        assert f"benchmark.py {question}" in content["command"] and content["command"] in text
        assert torch.__version__ in content["environment"]
        return [dict(zip(head, row, strict=True)) for row in rows], content["results"]

    return run


def test_step(benchmark):
    options = ["--variants", *PAIR, "--size", "64x96", "-n", 1]
    rows, (result,) = benchmark("step", *STEP, *options)
    gn, lean = result["variants"].values()
    for row, name, measures in zip(rows, PAIR, (gn, lean), strict=True):
        where = {"images": "1", "size": "64x96", "kernel": "torch", "variant": name}
        assert row.items() >= where.items()
        assert len(measures["s/iter"]) == 3 and "peak MiB" not in measures
        assert row["s/iter"] == quartiles(measures["s/iter"])
        assert row["s/iter / detectron2-gn"] == ratio(measures["s/iter"], gn["s/iter"])
        assert row["kept MiB"] == quartiles(measures["kept MiB"])
    assert lean["kept MiB"] < gn["kept MiB"]


@pytest.mark.parametrize("question", ["step", "scaling", "estimate"])
def test_padding_is_masked_where_there_is_any_or_it_is_asked_for(question):
    def variants(*options):
        return tool["parse_args"]([question, "--output", "results", *options]).variants

    assert "ours-masked" not in variants() and "ours-lean" in variants()
    assert variants("--variants", "ours-masked") == ["ours-masked"]
    if question != "estimate":
        assert "ours-masked" in variants("--mixed")
        assert variants("--mixed", "--variants", "ours-fast") == ["ours-fast"]


def test_inference(benchmark, monkeypatch):
    ticks = iter(range(0, 1000, 4))  # 4 s from call to call
    monkeypatch.setattr("gn_detect.benchmark.timing.timer", lambda: next(ticks))
    rows, _ = benchmark("inference", *ROUNDS, "--size", "64x64", "-n", 2)
    assert [row["variant"] for row in rows] == ["detectron2-frozenbn", "detectron2-gn", "ours-fast"]
    for row in rows:
        assert row["images/s"] == "0.5 (0.5-0.5)"
        assert row["images/s / detectron2-gn"] == "1.000 (1.000-1.000)"
        assert int(row["detections"]) > 0


def test_memory(benchmark):
    rows, (result,) = benchmark("memory", "--size", "64x64", "--device", "cuda")
    kept = {name: measures["MiB"] for name, measures in result["variants"].items()}
    assert list(kept) == list(detectors.VARIANTS[:-1])
    assert kept["ours-fast"] == kept["detectron2-gn"] > kept["ours-lean"]
    for row in rows:
        assert row["MiB / detectron2-gn"] == ratio(kept[row["variant"]], kept["detectron2-gn"])


def test_estimate(benchmark):
    """Of what a process of its own measures, in which the model of the tests is a small part."""
    options = ["--size", "64x96", "--rois", 16, "--variants", "ours-fast"]
    (row,), (result,) = benchmark("estimate", *options)
    (measures,) = result["variants"].values()
    (estimate,), (peak,) = measures["estimate MiB"], measures["peak MiB"]
    assert row["estimate / peak"] == quartiles([estimate / peak])
    assert 1 < estimate < peak < estimate + 150


def test_kernels(benchmark, capsys):
    options = ["--size", "64x64", "-n", 1, "--dtypes", "bfloat16", "--variants", "autocast", "copy"]
    rows, results = benchmark("kernels", *STEP, *options)
    for kind in kernels.PASSES:
        *layers, total = [r for r in results if r["pass"] == kind]
        assert (total["layer"], total["layers"]) == ("all", 36)
        for variant, measures in total["variants"].items():
            of_layers = [np.array(r["variants"][variant]["ms"]) * r["layers"] for r in layers]
            assert measures["ms"] == pytest.approx(sum(of_layers))
        row = next(r for r in rows if (r["pass"], r["layer"]) == (kind, "all"))
        ms = [total["variants"][name]["ms"] for name in ("autocast", "copy")]
        assert (row["variant"], row["ms / copy"]) == ("autocast", ratio(*ms))
    printed = capsys.readouterr().out
    assert printed.count("| all ") == 4 and "GN+relu" not in printed


def test_what_is_measured_outlives_a_failure(benchmark, monkeypatch):
    """The baseline is out of memory at the first size. At the second the program ends."""
    step, forward = detectors.Detector.step, detectors.Detector.forward

    def exhausted(detector):
        if not type(detector.model.roi_heads.box_head).__module__.startswith("gn_detect"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        step(detector)

    def interrupted(detector):
        if detector.settings.size == (96, 96):
            raise KeyboardInterrupt
        return forward(detector)

    monkeypatch.setattr(detectors.Detector, "step", exhausted)
    monkeypatch.setattr(detectors.Detector, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        options = ["--variants", *PAIR, "--sizes", "64x96", "96x96", "-n", 1]
        benchmark("scaling", *STEP, *options)
    (result,) = benchmark.results
    failed, other = result.pop("variants").values()
    assert result == {"images": 1, "size": "64x96", "kernel": "torch"}
    assert failed == "out of memory" and len(other["s/iter"]) == 3


@pytest.mark.parametrize(
    "command, message",
    [
        ("step --variants ours-tiny", "invalid choice: 'ours-tiny' (choose from"),
        ("step --size 800,1344", "'800,1344' is no positive number"),
        ("step --size 800", "invalid size value: '800'"),
        ("step --rounds 0", "'0' is no positive number"),
        ("speed", "invalid choice: 'speed'"),
        ("inference --rois 8", "unrecognized arguments: --rois"),
        ("memory -- MODEL.DEVICE cpu", "MODEL.DEVICE is set by the benchmark itself"),
        ("memory -- MODEL.GROUPS 32", "error: the command line: Non-existent key: MODEL.GROUPS"),
    ],
)
def test_a_typo_is_a_sentence(tmp_path, capsys, command, message):
    question, *options = command.split()
    with pytest.raises(SystemExit) as exit:
        tool["main"]([question, "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err + str(exit.value)


def test_output_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: --output .*file: .*; give a directory to"):
        tool["main"](["memory", "--output", str(tmp_path / "file")])

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "touch", refuse)  # what a mode of the directory does to other users
    with pytest.raises(SystemExit, match="error: --output .*: Permission denied; give a directory"):
        tool["main"](["memory", "--output", str(tmp_path)])


def test_defaults(monkeypatch):
    def parse(command):
        return vars(tool["parse_args"]([*command.split(), "--output", "results"]))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = {"device": "cuda", "size": [(800, 1344)], "images": [2], "rois": 512, "rounds": 50}
    assert parse("step").items() >= gpu.items()
    layers = {"dtype": ["float32", "bfloat16"], "layout": ["nchw", "channels_last"]}
    assert parse("kernels").items() >= layers.items()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = {"device": "cpu", "size": [(256, 320)], "images": [2], "rois": 64, "rounds": 7}
    assert parse("step").items() >= cpu.items()
    assert parse("kernels").items() >= {"dtype": ["float32"], "layout": ["nchw"]}.items()
    assert parse("memory").items() >= {"size": [(512, 512)], "images": [1]}.items()
    assert parse("step --channels-last")["channels_last"] == "all"
    assert parse("inference --amp bfloat16 --channels-last ours")["channels_last"] == "ours"


def test_commands_of_the_documentation():
    text = (ROOT / "docs/benchmarks.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"tools/benchmark\.py ([^`\n#]+)", text)
    parsed = [tool["parse_args"]([*shlex.split(c), "--output", "results"]) for c in commands]
    assert {args.question for args in parsed} == set(tool["QUESTIONS"])
