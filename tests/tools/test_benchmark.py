"""The tool's tables are those that its samples make."""

import importlib.util
import json
import re
import shlex
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from helpers import ROOT, TINY

from gn_detect.benchmark import detectors, kernels

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    *("--device", "cpu", "--config-file"),
    ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml",
]
ROUNDS = ["--rounds", 3, "--warmup", 1]
STEP = [*SMALL, *ROUNDS, "--rois", 16]
# Without the keys that the benchmark sets.
NODES = ("MODEL.FPN", "MODEL.RPN", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD")
PAIRS = zip(TINY[::2], TINY[1::2], strict=True)
OPTS = [word for pair in PAIRS if pair[0].startswith(NODES) for word in pair]
PAIR = ["--variants", "detectron2-gn", "ours-lean"]


@pytest.fixture
def benchmark(tmp_path, capsys):
    """Run a question; its tables (a list of rows for each) and the content of its JSON."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools/benchmark.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(question, *args):
        command = [question, "--output", tmp_path / "results", *args, "--", *OPTS]
        tool.main(list(map(str, command)))
        printed = capsys.readouterr().out
        files = list(map(Path, printed.rpartition("Wrote ")[2].split()))
        assert [file.suffix for file in files] == [".json", ".md", ".png"]
        assert {file.parent for file in files} == {tmp_path / "results"}
        content = json.loads(files[0].read_text())
        assert content["benchmark"] == question and f"benchmark.py {question}" in content["command"]
        tables = _tables(printed)
        assert tables == _tables(files[1].read_text())
        assert plt.imread(files[2]).std() > 0
        return tables, content

    run.main, run.parse_args = tool.main, tool.parse_args
    return run


def _tables(text):
    tables = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("|"):
            head, _, *rows = [
                [cell.strip() for cell in line.strip("|").split("|")]
                for line in paragraph.strip().splitlines()
            ]
            tables.append([dict(zip(head, row, strict=True)) for row in rows])
    return tables


def _ratio(result, baseline):
    pairs = zip(result["seconds"], baseline["seconds"], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.3f}"


def test_step(benchmark):
    (table,), content = benchmark("step", *STEP, *PAIR, "--size", "64x96", "-n", 1)
    gn, lean = content["results"]
    assert [len(result["seconds"]) for result in (gn, lean)] == [3, 3]
    assert [row["variant"] for row in table] == ["detectron2-gn", "ours-lean"]
    for row, result in zip(table, (gn, lean), strict=True):
        assert row["s / detectron2-gn"].split()[0] == _ratio(result, gn)
        assert row["kept for backward, MiB"] == f"{result['saved_bytes'] / 2**20:.1f}"
        assert row["RoIs, with mask"] == "16, 4"
    assert lean["saved_bytes"] < gn["saved_bytes"]
    assert gn["peak_bytes"] is None  # on a CPU, where nobody counts
    assert content["settings"]["size"] == [64, 96]
    assert content["settings"]["kernel"] == "torch"


def test_scaling(benchmark):
    sizes = ["--sizes", "64", "64x96", "--images", 1, 2]
    (table,), content = benchmark("scaling", *STEP, *PAIR, *sizes)
    assert len(table) == len(content["results"]) == 2 * 2 * 2
    kept = {
        (result["variant"], *result["size"], result["images"]): result["saved_bytes"]
        for result in content["results"]
    }
    for variant in PAIR[1:]:  # what is kept grows with the pixels, less what RoIs keep
        assert kept[variant, 64, 64, 1] < kept[variant, 64, 96, 1] < kept[variant, 64, 96, 2]
    assert {row["images"] for row in table} == {
        f"{n} x {size}" for n in (1, 2) for size in ("64x64", "64x96")
    }


def test_inference(benchmark):
    (table,), content = benchmark("inference", *SMALL, *ROUNDS, "--size", 64)
    results = {result["variant"]: result for result in content["results"]}
    assert list(results) == ["detectron2-frozenbn", "detectron2-gn", "ours-fast"]
    for row in table:
        result, base = results[row["variant"]], results["detectron2-gn"]
        assert row["images/s / detectron2-gn"].split()[0] == _ratio(base, result)
        rate = statistics.median(1 / seconds for seconds in result["seconds"])
        assert float(row["images/s (quartiles)"].split()[0]) == pytest.approx(rate, rel=5e-3)
        assert result["detections"] > 0


def test_memory(benchmark):
    (table,), content = benchmark("memory", *SMALL, "--size", 64)
    kept = {result["variant"]: result["saved_bytes"] for result in content["results"]}
    order = ["ours-checkpoint", "ours-lean", "ours-balanced", "ours-fast"]
    assert sorted(kept[name] for name in order) == [kept[name] for name in order]
    assert kept["ours-fast"] == kept["detectron2-gn"] > kept["detectron2-frozenbn"]
    assert not {"rounds", "warmup"} & content["settings"].keys()
    for row in table:
        assert row["MiB"] == f"{kept[row['variant']] / 2**20:.1f}"
        share = kept[row["variant"]] / kept["detectron2-gn"]
        assert row["/ detectron2-gn"] == f"{share:.3f}"


def test_kernels(benchmark):
    settings = ["--size", 64, "--images", 1, "--dtypes", "bfloat16"]
    tables, content = benchmark("kernels", *STEP, *settings)
    forward, backward, totals = tables
    assert len(forward) == len(backward) == len(content["results"]) // 2
    for name in ("eager", "autocast", "ours"):
        expected = [0.0, 0.0, 0.0]
        for result in content["results"]:
            if result["pass"] == "forward":
                for number, seconds in enumerate(result["seconds"][name]):
                    expected[number] += len(result["modules"]) * seconds * 1e3
        (row,) = [r for r in totals if (r["variant"], r["pass"]) == (name, "forward")]
        total = statistics.median(expected)
        assert float(row["ms of all layers"].split()[0]) == pytest.approx(total, rel=5e-3)
    # A layer's row: the median, and the share of the copy's bandwidth that it is.
    first = next(result for result in content["results"] if result["pass"] == "forward")
    ours, copy = (statistics.median(first["seconds"][name]) for name in ("ours", "copy"))
    bandwidth = f"{first['minimum_bytes'] / ours / 1e9:.0f} GB/s"
    cell = f"{ours * 1e6:.1f} us, {bandwidth}, {100 * copy / ours:.0f} %"
    assert forward[0]["ours"] == cell


def _fail(monkeypatch, owner, function, when, *errors):
    """Let ``owner.function`` raise, in turn, where ``when(its arguments)``."""
    original, errors = getattr(owner, function), list(errors)

    def failing(*args, **kwargs):
        if errors and when(*args, **kwargs):
            raise errors.pop(0)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, function, failing)


def _exhausted():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_scaling_out_of_memory(benchmark, monkeypatch, tmp_path):
    """The baseline is, at the first point. At the third the program ends."""
    _fail(
        monkeypatch,
        detectors.Detector,
        "step",
        lambda d: _is_detectron2(d.model) and d.settings.size == (64, 96),
        _exhausted(),
    )
    _fail(
        monkeypatch,
        detectors.Detector,
        "use",
        lambda d, settings: settings.size == (96, 96),
        KeyboardInterrupt(),
    )
    sizes = ["--sizes", "64x96", "64", "96", "--images", 1]
    with pytest.raises(KeyboardInterrupt):
        benchmark("scaling", *STEP, *PAIR, *sizes)
    (path,) = (tmp_path / "results").glob("scaling-*.json")
    results = json.loads(path.read_text())["results"]
    found = [(r["variant"], r["size"], r.get("failure")) for r in results]
    assert found == [
        ("detectron2-gn", [64, 96], "out of memory"),
        ("ours-lean", [64, 96], None),
        ("detectron2-gn", [64, 64], None),
        ("ours-lean", [64, 64], None),
    ]
    ((failed, other, *_),) = _tables(path.with_suffix(".md").read_text())
    assert failed["s/iter (quartiles)"] == "out of memory" and failed["s / detectron2-gn"] == ""
    assert other["s/iter (quartiles)"] and other["s / detectron2-gn"] == ""


@pytest.mark.parametrize("question, where", [("step", "forward"), ("inference", "infer")])
def test_one_variant_out_of_memory(benchmark, monkeypatch, question, where):
    detector = detectors.Detector
    _fail(monkeypatch, detector, where, lambda d: _is_detectron2(d.model), _exhausted())
    options = [*SMALL, *ROUNDS, *PAIR, "--size", 64, "-n", 1]
    (table,), content = benchmark(question, *options)
    gn, ours = content["results"]
    assert gn == {"variant": "detectron2-gn", "failure": "out of memory"}
    assert len(ours["seconds"]) == 3
    assert [row["variant"] for row in table] == PAIR[1:]
    assert "out of memory" in table[0].values() and "out of memory" not in table[1].values()


def _is_detectron2(model):
    return not type(model.roi_heads.box_head).__module__.startswith("gn_detect")


def test_all_variants_out_of_memory(benchmark, monkeypatch):
    errors = [_exhausted(), _exhausted()]
    _fail(monkeypatch, detectors.Detector, "__init__", lambda *_: True, *errors)
    _, content = benchmark("step", *STEP, *PAIR, "--size", 64, "-n", 1)
    assert [result["failure"] for result in content["results"]] == ["out of memory"] * 2


def test_a_layer_out_of_memory(benchmark, monkeypatch):
    """In its first backward pass, as ours runs it."""
    maps = []

    def second_of_ours(*args, **kwargs):
        maps.append(args)
        return len(maps) == 6  # 1 + 3 forward passes before

    _fail(monkeypatch, kernels, "group_norm_act", second_of_ours, _exhausted())
    settings = ["--size", 64, "--images", 1, "--variants", "eager", "ours"]
    (forward, backward, totals), content = benchmark("kernels", *STEP, *settings)
    assert "us" in forward[0]["ours"] and backward[0]["ours"] == "out of memory"
    assert "us" in backward[0]["eager"] and "us" in backward[1]["ours"]
    cells = {(row["variant"], row["pass"]): row["ms of all layers"] for row in totals}
    assert cells.pop(("ours", "forward+backward")) == "out of memory"
    assert len(cells) == 3 and "out of memory" not in cells.values()
    (failed,) = [result for result in content["results"] if result["failures"]]
    assert failed["failures"] == {"ours": "out of memory"} and "ours" not in failed["seconds"]


@pytest.mark.parametrize(
    "command, message",
    [
        (["step", "--variants", "ours-tiny"], "invalid choice: 'ours-tiny' (choose from"),
        (["step", "--size", "800,1344"], "'800,1344' is no size; height x width in pixels"),
        (["step", "--rounds", "0"], "'0' is no positive number"),
        (
            ["kernels", "--variants", "ours", "--baselines", "eager"],
            "eager is not among --variants",
        ),
        (["speed"], "invalid choice: 'speed'"),
        (["step", "--device", "cuda"], "--device cuda, but PyTorch finds no CUDA device"),
        (["kernels", "--variants", "autocast", "--dtypes", "float32"], "not float32"),
        (["inference", "--rois", "8"], "unrecognized arguments: --rois"),
        (["step", "--device", "cpu", "SEED", "1"], "SEED is set by the benchmark itself"),
        (["step", "--config-file", "absent.yaml"], "error: absent.yaml: "),
        (["step", "--device", "cpu", "MODEL.GN.GROUPS", "32"], "Non-existent key: MODEL.GN.GROUPS"),
    ],
)
def test_a_typo_is_a_sentence(benchmark, tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    question, *options = command
    with pytest.raises(SystemExit) as exit:
        benchmark.main([question, "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err + str(exit.value)


def test_output_that_is_no_directory_is_a_sentence(benchmark, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit):
            benchmark.parse_args(["memory", "--output", str(output)])
        assert f"--output {output}: " in capsys.readouterr().err
    made = tmp_path / "new" / "directory"
    benchmark.parse_args(["memory", "--output", str(made)])
    assert made.is_dir()


def test_a_gpu_without_triton_is_a_sentence(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("gn_detect.layers.functional.triton_kernels", None)
    with pytest.raises(SystemExit):
        benchmark.parse_args(["step", "--output", str(tmp_path)])
    assert "triton is not installed" in capsys.readouterr().err


def test_files_are_called_after_the_settings(benchmark, tmp_path, monkeypatch):
    def name(command):
        words = [*command.split(), "--output", str(tmp_path)]
        return benchmark.parse_args(words).name

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert name("step") == "step-cuda-float32-2x800x1344"
    assert name("step --amp none --device cuda --rounds 50 --warmup 3") == name("step")
    amp = "step --amp bfloat16 --channels-last"
    assert name(amp) == "step-cuda-bfloat16-channels_last-2x800x1344"
    ours = "step --amp bfloat16 --channels-last ours"
    assert name(ours) == "step-cuda-bfloat16-channels_last_ours-2x800x1344"
    assert (
        name("memory --device cpu --size 64 --threads 2") == "memory-cpu-float32-1x64x64-2threads"
    )
    assert name("scaling --sizes 64 64x96") == "scaling-cuda-float32-1+2x64x64+64x96"
    kernels = "kernels --dtypes float32 --layouts nchw channels_last"
    assert name(kernels) == "kernels-cuda-float32-nchw+channels_last-1+2x800x1344"
    others = ["--rounds 3", "--rois 16", "--freeze-at 2", "--variants ours-fast", "--warmup 5"]
    others += ["--config-file other.yaml", "--rounds 4", "MODEL.FPN.OUT_CHANNELS 128"]
    names = {name(f"step {other}") for other in others}
    assert len(names) == len(others)
    pattern = "step-cuda-float32-2x800x1344-[0-9a-f]{8}"
    assert [n for n in names if not re.fullmatch(pattern, n)] == []


def test_commands_of_the_documentation(benchmark, tmp_path):
    text = (ROOT / "docs/benchmarks.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"tools/benchmark\.py ([^`\n#]+)", text)
    questions = {
        benchmark.parse_args([*shlex.split(c), "--output", str(tmp_path)]).question
        for c in commands
    }
    assert questions == {"memory", "step", "inference", "scaling", "kernels"}
