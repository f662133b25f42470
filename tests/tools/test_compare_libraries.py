"""What is compared, and how it is scored; of the contestants those that are installed."""

import importlib.util
import json
import os
import runpy
import select
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, CocoFiles, coco_json, run_tool
from pycocotools import mask as mask_util

from gn_detect.benchmark.libraries import CONTESTANTS, Job, iterations_within, with_gn_detect
from gn_detect.benchmark.libraries.__main__ import main as run_job
from gn_detect.benchmark.libraries.with_torchvision import read_data
from gn_detect.benchmark.libraries.with_ultralytics import write_yolo

pytestmark = pytest.mark.slow

tool = runpy.run_path(str(ROOT / "tools/compare_libraries.py"))
compare, execute, score = tool["main"], tool["execute"], tool["score"]


def found(shift: int = 0) -> list[dict]:
    """The objects of ``coco_json``, as results, moved to the right."""
    results = []
    for annotation in coco_json()["annotations"]:
        mask = np.zeros((64, 64), np.uint8, order="F")
        mask[8:32, 8 + shift : 32 + shift] = 1
        rle = mask_util.encode(mask)
        rle["counts"] = rle["counts"].decode()
        where = {key: annotation[key] for key in ("image_id", "category_id")}
        box = [8 + shift, 8, 24, 24]
        results.append({**where, "bbox": box, "score": 1.0, "segmentation": rle})
    return results


@pytest.fixture
def data(tmp_path):
    """A folder as --data takes it."""
    files = CocoFiles(tmp_path / "photos")
    for split in ("train", "val"):
        (tmp_path / f"photos/{split}.json").write_text(files.json_file.read_text())
    return tmp_path / "photos"


def job(data: Path, package: str, **options) -> Job:
    folder = data.parent / package
    folder.mkdir()
    images, train, val = (str(data / name) for name in ("images", "train.json", "val.json"))
    where = {"train_json": train, "train_images": images, "val_json": val, "val_images": images}
    how = {"package": package, "options": options, "seconds": 0.1, "cores": 1, "device": "cpu"}
    return Job(**where, **how, folder=str(folder), seed=0)


def test_results_are_scored_as_coco_defines_it(data, tmp_path):
    for shift, ap in ((0, 100.0), (4, 50.0), (16, 0.0)):
        # Squares of 24 pixels, moved by 4: IoU 20/28, above 5 of the 10 thresholds.
        (tmp_path / "results.json").write_text(json.dumps(found(shift)))
        scores = score(str(data / "val.json"), str(tmp_path / "results.json"))
        assert scores["box AP"] == pytest.approx(ap) == scores["mask AP"], shift
    (tmp_path / "results.json").write_text("[]")
    assert set(score(str(data / "val.json"), str(tmp_path / "results.json")).values()) == {0.0}


def test_iterations_that_fit():
    # The first took 10 seconds, the others 2 each.
    assert iterations_within(60, [5.0, 15.0, 17.0, 19.0]) == 30
    assert iterations_within(1, [5.0, 15.0, 17.0, 19.0]) == 2


@pytest.fixture
def runs(monkeypatch):
    """The jobs that were run, in order, in place of their processes; all find everything, but for
    YOLO26, which is killed."""
    runs = []

    def train(command, env, output):
        assert command[1:3] == ["-m", "gn_detect.benchmark.libraries"]
        run = msgspec.json.decode(Path(command[3]).read_bytes(), type=Job)
        assert env["OMP_NUM_THREADS"] == str(run.cores)
        runs.append(run)
        if run.options.get("model") == "yolo26n-seg.yaml":
            return -9
        content = {"predictions": found(4 * run.seed), "run": {"iterations": 9, "seconds": 66}}
        for name, value in content.items():
            Path(run.folder, f"{name}.json").write_text(json.dumps(value))
        return 0

    monkeypatch.setitem(compare.__globals__, "execute", train)
    installed = {"torchvision", "gn_detect", "ultralytics"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    return runs


def test_one_table_and_one_plot_and_no_run_twice(runs, data, tmp_path, capsys):
    args = ["--data", str(data), "--output", str(tmp_path / "out"), "--minutes", "1", "2"]
    args += ["--seeds", "0", "1", "--contestants", "gn_detect", "torchvision", "mayaku-n-seg"]
    compare(args)
    text = capsys.readouterr().out
    assert "mayaku is left out: not installed (pip install -e '.[compare]')" in text
    assert len({run.folder for run in runs}) == len(runs) == 2 * 2 * 2
    assert [run.seconds for run in runs] == [60] * 4 + [120] * 4
    for name in ("gn_detect", "torchvision"):
        for minutes in (1, 2):
            expected = "75.0 / 75.0 (50.0-100.0 of 2), 9 iterations in 1.1 min"
            assert f"| photos | {name} | {minutes} | {expected} |" in " ".join(text.split())
    assert "mayaku-n-seg |" not in text
    result = json.loads(Path(runs[0].folder, "result.json").read_text())
    assert result["box AP50"] == 100 and result["job"]["options"] == CONTESTANTS["gn_detect"][1]
    assert (tmp_path / "out/libraries.png").stat().st_size > 0
    compare(args)
    assert len(runs) == 8
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        compare([*args, "--cores", "1"])


def test_a_run_that_fails_leaves_the_others(runs, data, tmp_path, capsys):
    args = ["--data", str(data), "--output", str(tmp_path / "out"), "--contestants"]
    args += ["yolo26n-seg", "yolo11n-seg"]
    for count in (2, 3):  # only what failed is repeated
        with pytest.raises(SystemExit, match="error: 1 of the runs failed"):
            compare(args)
        text = capsys.readouterr().out
        assert "error: photos, yolo26n-seg-10min-seed0 was killed (signal 9;" in text
        assert ("photos, yolo11n-seg-10min-seed0: 100.0 / 100.0" in text) == (count == 2)
        assert "| photos | yolo26n-seg | 10 | 1 of 1 runs without a result |" in " ".join(
            text.split()
        )
        assert len(runs) == count


def test_what_a_run_that_was_stopped_has_left_is_not_used(runs, data, tmp_path):
    args = ["--data", str(data), "--output", str(tmp_path / "out"), "--contestants", "gn_detect"]
    compare(args)
    folder = Path(runs[0].folder)
    (folder / "result.json").unlink()
    (folder / "train").mkdir()
    compare(args)
    assert len(runs) == 2 and (folder / "result.json").exists() and not (folder / "train").exists()


def test_nothing_starts_without_its_data(runs, data, tmp_path):
    args = ["--output", str(tmp_path / "out"), "--data", str(data)]
    with pytest.raises(SystemExit, match="error: --data .*nowhere has no train.json"):
        compare([*args, str(tmp_path / "nowhere")])
    (data / "val.json").unlink()
    with pytest.raises(SystemExit, match="error: --data .*photos has no val.json"):
        compare(args)
    with pytest.raises(SystemExit, match="error: .*out has no runs of these"):
        compare([*args, "--report"])
    assert not runs


def test_what_a_process_has_started_ends_with_it(tmp_path):
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    # The child of the child keeps the pipe open while it lives.
    script = f"sleep 60 > {tmp_path}/alive & echo > {tmp_path}/alive; kill -9 $$"
    with open(tmp_path / "output.txt", "w") as output:
        assert execute(["sh", "-c", script], dict(os.environ), output) == -9
    assert os.read(reader, 9) == b"\n"
    assert select.select([reader], [], [], 30)[0] and os.read(reader, 9) == b""
    os.close(reader)


def test_crowd_regions_are_no_objects(data):
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": [0, 640, 3456]}
    (data / "train.json").write_text(json.dumps(content))
    images = read_data(job(data, "torchvision"))
    assert len(images) == len(content["images"]) - 1  # it was all that one of them had
    assert sum(len(target["boxes"]) for _, target in images) == len(content["annotations"]) - 1


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run here, with a small model of gn_detect, and leave this process as it is."""
    cores = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, some: cores.append(some))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def train(command, check):
        assert Path(command[1]).samefile(ROOT / "tools/train_net.py")
        run_tool("train_net.py", *command[2:], *TINY[2:], "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)

    monkeypatch.setattr(with_gn_detect, "subprocess", SimpleNamespace(run=train))
    return cores


SMALL = {"min_size": 64, "max_size": 64, "box_batch_size_per_image": 8}
OPTIONS = {
    "gn_detect": CONTESTANTS["gn_detect"][1],
    "torchvision": SMALL,
    "ultralytics": {"model": "yolo11n-seg.yaml", "imgsz": 64},
    "mayaku": {"size_budget": 128},
}


@pytest.mark.parametrize("package", OPTIONS)
def test_a_contestant_trains_and_predicts(package, data, in_process):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: pip install -e '.[compare]'")
    task = job(data, package, **OPTIONS[package])
    (Path(task.folder) / "job.json").write_bytes(msgspec.json.encode(task))
    run_job(f"{task.folder}/job.json")
    assert [len(cores) for cores in in_process] == [1]
    run = json.loads(Path(task.folder, "run.json").read_text())
    assert {"torch", "torchvision", package} == set(run["versions"]) and run["iterations"] >= 1
    assert run["images_per_iteration"] >= 1 and run["seconds"] >= 0
    results = json.loads(Path(task.folder, "predictions.json").read_text())
    assert {r["category_id"] for r in results} == {3, 7} or package != "gn_detect"
    for result in results:
        assert result["image_id"] in (1, 2, 3) and result["segmentation"]["size"] == [64, 64]
    assert score(task.val_json, f"{task.folder}/predictions.json")["mask AP"] < 100


def test_yolo_gets_the_same_objects(data):
    task = job(data, "ultralytics")
    config, category_ids = write_yolo(task), task.category_ids()
    assert category_ids == [3, 7] and "- dog\n- cat\n" in Path(config).read_text()
    labels = sorted(Path(config).parent.glob("train/labels/*.txt"))
    assert [path.stem for path in labels] == ["1", "2", "3"]
    for path in labels:
        number, *outline = path.read_text().split()
        assert category_ids[int(number)] == (3 if int(path.stem) % 2 else 7)
        assert (np.array(outline, float) * 64).tolist() == [8, 8, 32, 8, 32, 32, 8, 32]
        image = path.parents[1] / f"images/{path.stem}.png"
        assert image.read_bytes() == (data / f"images/{path.stem}.png").read_bytes()
