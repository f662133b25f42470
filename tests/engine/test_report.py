"""When a run writes its report, from what, and what is said where something is in the way."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from helpers import config

from gn_detect.data.coco import register_coco_json
from gn_detect.engine.report import RESULTS, Report, report_run
from gn_detect.evaluation import report as page
from gn_detect.settings import Settings

FOUND = [
    {"image_id": 1, "category_id": 3, "bbox": [8, 8, 24, 24], "score": 0.9},  # right
    {"image_id": 2, "category_id": 3, "bbox": [8, 8, 24, 24], "score": 0.8},  # it is a cat
]


@pytest.fixture
def run(coco_files, tmp_path):
    """The settings of an evaluated run on ``own``, three images."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    results = tmp_path / "run/inference" / RESULTS
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps(FOUND))
    name = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
    cfg = config(name, "OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.TEST", ("own",))
    (tmp_path / "run/config.yaml").write_text(cfg.dump())
    (tmp_path / "run/log.txt").write_text("")
    (tmp_path / "run/metrics.json").write_text('{"iteration": 0, "total_loss": 1.0}\n')
    return Settings(cfg)


@pytest.fixture
def report(run, tmp_path, caplog):
    """``report(**options)``: the page, or None, and what is warned of."""

    def write(**options):
        caplog.clear()
        with caplog.at_level("INFO"):
            report_run(run, **options)
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        path = tmp_path / "run/report.html"
        return path.read_text() if path.is_file() else None, warnings

    return write


def test_page_has_analysis_and_pictures_of_the_test_set(report, caplog):
    text, warnings = report()
    assert warnings == []
    assert "report of the run: " in caplog.text
    assert "Where it errs: own" in text and "3 images, 3 objects, 2 detections" in text
    assert "1 right, 1 wrong" in text
    assert text.count('src="data:image/webp;base64,') == 3
    assert "<h1>run</h1>" in text and "test_report" not in text.partition("<main>")[0]


def test_an_evaluation_leaves_the_page_of_the_training(report, tmp_path):
    (tmp_path / "run/report.html").write_text("of the training")
    text, warnings = report(training=False)
    assert text == "of the training" and warnings == []
    evaluated = (tmp_path / "run/inference/report.html").read_text()
    assert "Where it errs: own" in evaluated and 'id="training"' not in evaluated
    assert "box AP50" in evaluated


def test_several_test_sets_of_which_one_is_no_coco_json(run, report, tmp_path):
    for name in ("again", "dicts"):
        DatasetCatalog.register(name, list)
    try:
        MetadataCatalog.get("again").set(**MetadataCatalog.get("own").as_dict() | {"name": "again"})
        run["test_data"] = ("own", "again", "dicts")
        inference = tmp_path / "run/inference"
        (inference / "own").mkdir()
        shutil.move(inference / RESULTS, inference / "own")
        text, warnings = report()
        assert "Where it errs: own" in text and "Where it errs: again" not in text
        missing, other = warnings
        assert missing.endswith(f"No analysis of again: there is no {inference}/again/{RESULTS}.")
        assert other.endswith("No analysis of dicts: it is no COCO JSON.")
        assert "No analysis of dicts" in text
    finally:
        for name in ("again", "dicts"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_the_best_is_that_which_the_run_keeps(report, tmp_path):
    rows = [{"segm/AP": 3.0, "bbox/AP": 9.0}, {"segm/AP": math.nan, "ema/segm/AP": 5.0}]
    rows += [{"segm/AP": 4.0, "ema/segm/AP": 4.5}]
    lines = (json.dumps({"iteration": 2 * i + 1, **row}) for i, row in enumerate(rows))
    (tmp_path / "run/metrics.json").write_text("\n".join(lines))
    text, _ = report()
    assert "<b>4</b><span>iteration of the best of 3 evaluations, by mask AP (EMA)" in text


def test_no_test_data(run, report):
    run["test_data"] = ()
    text, warnings = report()
    assert warnings == [] and "Where it errs" not in text and ">Loss</h3>" in text


def test_results_of_other_data_are_named_and_the_rest_is_written(report, tmp_path):
    found = [FOUND[0] | {"image_id": 4}]
    (tmp_path / "run/inference" / RESULTS).write_text(json.dumps(found))
    text, (warning,) = report()
    assert ">Loss</h3>" in text and "Where it errs" not in text
    assert "No analysis of own: " in warning and "image_id 4" in warning


def test_an_image_that_is_gone_costs_the_pictures_alone(report, coco_files):
    (coco_files.image_root / "2.png").unlink()
    text, (warning,) = report()
    assert "Where it errs: own" in text and "<img" not in text
    assert "No pictures of own: " in warning and "2.png" in warning


def test_nothing_fails_a_finished_run(report, monkeypatch):
    def fails(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_report", fails)
    text, (warning,) = report()
    assert text is None
    assert warning.endswith(
        "report.html was not written: OSError: [Errno 28] No space left on device"
    )


def test_without_a_report(run, report, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(comm, "is_main_process", lambda: False)
        assert report() == (None, [])
    run["report"] = False
    assert report() == (None, [])


@pytest.mark.parametrize(
    "done, of, written",
    [(6, 6, True), (5, 6, False)],  # the last iteration failed, or was stopped, at 5
)
def test_report_comes_after_the_last_iteration(run, tmp_path, done, of, written):
    run["test_data"] = ()
    hook = Report(run)
    hook.trainer = SimpleNamespace(iter=done, max_iter=of)
    hook.after_train()
    assert (tmp_path / "run/report.html").is_file() == written
