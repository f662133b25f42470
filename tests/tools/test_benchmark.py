"""The tool's table is the one that its samples make."""

import errno
import importlib.util
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from helpers import ROOT

from gn_detect.benchmark import detectors, kernels

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = ["--rounds", 3, "--warmup", 1]
STEP = [*ROUNDS, "--rois", 16]
PAIR = ["--variants", "detectron2-gn", "ours-lean"]
OPTS = [
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 32),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools/benchmark.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def benchmark(tool, tmp_path, monkeypatch):
    """Run a question as on a machine without a GPU; the rows of its table, and its results."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(question, *args):
        command = [question, "--output", tmp_path / "results", *args, "--", *OPTS]
        try:
            tool.main(list(map(str, command)))
        finally:
            (table,) = (tmp_path / "results").glob(f"{question}-*.md")
            rows, text = [], table.read_text()
            head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
            for line in lines:
                cells = zip(_cells(head), _cells(line), strict=True)
                rows.append({name: cell for name, cell in cells if cell})
            content = json.loads(table.with_suffix(".json").read_text())
            run.results = content["results"]
        assert f"benchmark.py {question}" in content["command"] and content["command"] in text
        assert torch.__version__ in content["environment"]
        return rows, content["results"]

    return run


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def _median(samples):
    return f"{float(f'{statistics.median(samples):.3g}'):g}"


def _ratio(samples, baseline):
    return f"{statistics.median(a / b for a, b in zip(samples, baseline, strict=True)):.3f}"


def test_step(benchmark):
    rows, results = benchmark("step", *STEP, *PAIR, "--size", "64x96", "-n", 1)
    gn, lean = (result["measures"] for result in results)
    for row, name, measures in zip(rows, PAIR[1:], (gn, lean), strict=True):
        where = {"images": "1", "size": "64x96", "kernel": "torch", "variant": name}
        assert row.items() >= where.items()
        assert len(measures["s/iter"]) == 3 and "peak MiB" not in measures
        assert row["s/iter"].split()[0] == _median(measures["s/iter"])
        assert row["s/iter / detectron2-gn"].split()[0] == _ratio(measures["s/iter"], gn["s/iter"])
        assert row["kept MiB"] == _median(measures["kept MiB"])
    assert lean["kept MiB"] < gn["kept MiB"]


def test_inference(benchmark, monkeypatch):
    ticks = iter(range(0, 1000, 4))  # 4 s from call to call
    monkeypatch.setattr("gn_detect.benchmark.timing.timer", lambda: next(ticks))
    rows, _ = benchmark("inference", *ROUNDS, "--size", 64, "-n", 2)
    assert [row["variant"] for row in rows] == ["detectron2-frozenbn", "detectron2-gn", "ours-fast"]
    for row in rows:
        assert row["images/s"] == "0.5 (0.5-0.5)"
        assert row["images/s / detectron2-gn"] == "1.000 (1.000-1.000)"
        assert int(row["detections"]) > 0


def test_memory(benchmark):
    rows, results = benchmark("memory", "--size", 64, "--device", "cuda")
    kept = {result["variant"]: result["measures"]["MiB"] for result in results}
    assert list(kept) == list(detectors.VARIANTS)
    order = ["checkpoint", "lean", "balanced", "fast"]
    assert sorted(kept.values())[0] == kept["ours-checkpoint"]
    assert sorted(kept[f"ours-{name}"] for name in order) == [kept[f"ours-{n}"] for n in order]
    assert kept["ours-fast"] == kept["detectron2-gn"] > kept["detectron2-frozenbn"]
    for row in rows:
        assert row["MiB / detectron2-gn"] == _ratio(kept[row["variant"]], kept["detectron2-gn"])


def test_kernels(benchmark, capsys):
    options = ["--size", 64, "-n", 1, "--dtypes", "bfloat16", "--variants", "autocast", "copy"]
    rows, results = benchmark("kernels", *STEP, *options)
    for kind in kernels.PASSES:
        of_pass = [r for r in zip(rows, results, strict=True) if r[0]["pass"] == kind]
        *layers, total = [r for r in of_pass if r[0]["variant"] == "autocast"]
        assert (total[0]["layer"], total[0]["layers"]) == ("all", "36")
        expected = [0.0] * 3
        for row, result in layers:
            for number, ms in enumerate(result["measures"]["ms"]):
                expected[number] += int(row["layers"]) * ms
        samples = total[1]["measures"]["ms"]
        assert samples == pytest.approx(expected)
        copy = of_pass[-1][1]["measures"]["ms"]
        assert total[0]["ms / copy"].split()[0] == _ratio(samples, copy)
    printed = capsys.readouterr().out
    assert printed.count("| all ") == 4 and "GN+relu" not in printed


def _fail(monkeypatch, owner, function, when, error):
    """Let ``owner.function`` raise where ``when(its arguments)``."""
    original = getattr(owner, function)

    def failing(*args, **kwargs):
        if when(*args, **kwargs):
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, failing)


EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _is_detectron2(detector):
    return not type(detector.model.roi_heads.box_head).__module__.startswith("gn_detect")


def test_what_is_measured_outlives_a_failure(benchmark, monkeypatch):
    """The baseline is out of memory at the first size. At the second the program ends."""
    detector = detectors.Detector
    theirs = lambda d: type(d.model.roi_heads.box_head) is FastRCNNConvFCHead  # noqa: E731
    _fail(monkeypatch, detector, "step", theirs, EXHAUSTED)
    second = lambda d: d.settings.size == (96, 96)  # noqa: E731
    _fail(monkeypatch, detector, "forward", second, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        benchmark("scaling", *STEP, *PAIR, "--sizes", "64x96", 96, "--images", 1)
    failed, other = benchmark.results
    assert failed == {
        **{"images": 1, "size": "64x96", "kernel": "torch", "variant": "detectron2-gn"},
        "failure": "out of memory",
    }
    assert len(other["measures"]["s/iter"]) == 3


def test_a_layer_out_of_memory(benchmark, monkeypatch):
    """In its first backward pass, as ours runs it: after 1 + 3 forward passes."""
    maps = []
    fifth = lambda *args, **_: maps.append(args) or len(maps) == 5  # noqa: E731
    _fail(monkeypatch, kernels, "group_norm_act", fifth, EXHAUSTED)
    rows, _ = benchmark("kernels", *STEP, "--size", 64, "-n", 1, "--variants", "eager", "ours")
    failed = [(r["pass"], r["layer"], r["variant"]) for r in rows if "failure" in r]
    of_first = ("forward+backward", rows[0]["layer"], "ours")
    assert failed == [of_first, ("forward+backward", "all", "ours")]


@pytest.mark.parametrize(
    "command, message",
    [
        ("step --variants ours-tiny", "invalid choice: 'ours-tiny' (choose from"),
        ("step --size 800,1344", "'800,1344' is no size; height x width in pixels"),
        ("step --rounds 0", "'0' is no positive number"),
        ("speed", "invalid choice: 'speed'"),
        ("inference --rois 8", "unrecognized arguments: --rois"),
        ("memory --size 64 -- MODEL.DEVICE cpu", "MODEL.DEVICE is set by the benchmark itself"),
        ("memory -- MODEL.GROUPS 32", "error: the command line: Non-existent key: MODEL.GROUPS"),
    ],
)
def test_a_typo_is_a_sentence(tool, tmp_path, capsys, command, message):
    question, *options = command.split()
    with pytest.raises(SystemExit) as exit:
        tool.main([question, "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err + str(exit.value)


def test_output_that_cannot_be_written_is_a_sentence(tool, tmp_path, monkeypatch):
    def sentence(output):
        return pytest.raises(SystemExit, match=f"error: --output {output}: .*; give a directory")

    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with sentence(output):
            tool.main(["memory", "--output", str(output)])

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(Path, "touch", refuse)  # what a mode of the directory does to other users
    with sentence(tmp_path):
        tool.main(["memory", "--output", str(tmp_path)])


def test_defaults(tool, monkeypatch):
    def parse(command):
        return vars(tool.parse_args([*command.split(), "--output", "results"]))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = {"device": "cuda", "size": [(800, 1344)], "images": [2], "rois": 512, "rounds": 50}
    assert parse("step").items() >= gpu.items()
    layers = {"dtype": ["float32", "bfloat16"], "layout": ["nchw", "channels_last"]}
    assert parse("kernels").items() >= layers.items()
    assert parse("kernels")["variants"] == list(kernels.VARIANTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = {"device": "cpu", "size": [(256, 320)], "images": [2], "rois": 64, "rounds": 7}
    assert parse("step").items() >= cpu.items()
    assert "compiled" not in parse("kernels")["variants"]
    assert parse("memory").items() >= {"size": [(512, 512)], "images": [1]}.items()
    assert parse("step --channels-last")["channels_last"] == "all"
    assert parse("inference --amp bfloat16 --channels-last ours")["channels_last"] == "ours"


def test_commands_of_the_documentation(tool):
    text = (ROOT / "docs/benchmarks.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"tools/benchmark\.py ([^`\n#]+)", text)
    questions = {
        tool.parse_args([*shlex.split(command), "--output", "results"]).question
        for command in commands
    }
    assert questions == {"memory", "step", "inference", "scaling", "kernels"}
