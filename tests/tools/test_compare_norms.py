import importlib.util
import json

import pytest
from helpers import ROOT, TINY

OPTS = [*TINY, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NUM_CLASSES", 2]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def compare(output, coco_files, monkeypatch, capsys):
    """Run the tool for 4 images seen; what it prints."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    spec = importlib.util.spec_from_file_location("compare_norms", ROOT / "tools/compare_norms.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    data = [*coco_files.arguments("train"), *coco_files.arguments("val")]

    def run(*args):
        tool.main(["--output", str(output), "--images", "4", *data, *map(str, args)])
        return capsys.readouterr().out

    return run


def test_one_table_and_one_plot_and_no_run_twice(compare, output):
    args = ["--norms", "BN", "--images-per-step", 1, 2, "--", *OPTS]
    text = compare(*args)
    row = next(line for line in text.splitlines() if line.startswith("| BN"))
    # The same images: twice the iterations and half the rate for half the images.
    for column, (images, iterations, rate) in enumerate([(1, 4, 0.01), (2, 2, 0.02)]):
        result = json.loads((output / f"BN-{images}-seed0/result.json").read_text())
        cell = row.split("|")[2 + column].strip()
        assert cell == f"{result['box AP']:.1f} / {result['mask AP']:.1f}"
        config = (output / f"BN-{images}-seed0/config.yaml").read_text()
        assert f"MAX_ITER: {iterations}\n" in config and f"BASE_LR: {rate}\n" in config
        assert config.count("NORM: BN") == 4
    assert (output / "norms.png").stat().st_size > 0

    results = list(output.glob("*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in results}
    assert row in compare(*args)
    assert {path: path.stat().st_mtime_ns for path in results} == before


def test_a_run_that_diverges_is_a_result(compare, output):
    args = ["--norms", "FrozenBN", "--images-per-step", 1, "--", *OPTS, "SOLVER.BASE_LR", 1e9]
    text = compare(*args)
    assert json.loads((output / "FrozenBN-1-seed0/result.json").read_text())["diverged"] <= 4
    assert "0.0 / 0.0, diverged at iteration" in text
