"""The command line, end to end."""

import contextlib
import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from helpers import ROOT, TINY, refusal, run_tool

from gn_detect.config import load_config
from gn_detect.data.coco import register_coco_json

pytestmark = pytest.mark.slow

QUICK = ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
OWN = ("--train-json", "a", "--train-images", "b")
PHOTOS = ("train_net.py", "--config-file", QUICK)


def train_net(*args, **kwargs):
    return run_tool("train_net.py", *args, **kwargs)


def metrics(output) -> dict:
    """The last value of each metric."""
    rows = [json.loads(line) for line in (output / "metrics.json").open()]
    return {key: value for row in rows for key, value in row.items()}


def ten_images(source, target) -> dict:
    """Write ``target``, the first ten images of ``source``, and return its content."""
    content = json.loads(source.read_text())
    content["images"] = content["images"][:10]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    target.write_text(json.dumps(content))
    return content


def test_typed_datasets_hold(coco_files, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "detectron2.engine.default_setup", lambda cfg, _: seen.append(cfg.DATASETS) or sys.exit(0)
    )
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    data, options = coco_files.arguments(), [*TINY, "OUTPUT_DIR", tmp_path / "run"]
    typed = [*options, "DATASETS.TEST", "('own',)"]
    train_net(*PHOTOS[1:], *data, *typed)
    train_net(*PHOTOS[1:], *data, *options)
    assert [datasets.TEST for datasets in seen] == [("own",), ()]
    assert {datasets.TRAIN for datasets in seen} == {("custom_train",)}
    message = refusal(*PHOTOS, *data, *coco_files.arguments("val"), *typed)
    assert "DATASETS.TEST is ('own',) on the command line, but --val-json is custom_val" in message


@pytest.fixture
def coco(shared_data, tmp_path):
    """Ten photos, for training and for validation, in the place of COCO 2017."""
    names = ("coco_2017_train", "coco_2017_val")
    before = {name: (DatasetCatalog[name], MetadataCatalog.get(name)) for name in names}
    content = ten_images(shared_data / "coco_dev/val.json", tmp_path / "coco.json")
    for name in names:
        register_coco_json(name, str(tmp_path / "coco.json"), str(shared_data / "coco_dev/images"))
    yield {category["id"] for category in content["categories"]}
    for name, (function, metadata) in before.items():
        DatasetCatalog[name], MetadataCatalog[name] = function, metadata


def test_coco_with_official_ids_trains_evaluates_and_resumes(coco, tmp_path):
    """The R50-FPN config on the built-in datasets; small images, so that a CPU can do it."""
    config = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_gn_3x.yaml"
    options = [*TINY, "SOLVER.IMS_PER_BATCH", 1, "OUTPUT_DIR", tmp_path / "run"]
    options += ["SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    first = train_net("--config-file", config, *options, "SOLVER.MAX_ITER", 3).stdout
    assert "NUM_CLASSES = 80, from the dataset coco_2017_train: person, bicycle" in first
    assert "coco_2017_val: 10 images" in first
    assert "Starting training from iteration 0" in first
    assert re.search(r"\|\s*AP\s*\|\s*AP50\s*\|", first)  # the table
    again = ("--resume", "--config-file", config, *options, "SOLVER.MAX_ITER", 5)
    assert "Starting training from iteration 3" in train_net(*again).stdout
    assert metrics(tmp_path / "run")["iteration"] == 5
    results = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    assert max(coco) == 90 and {r["category_id"] for r in results} <= coco


def test_own_data_then_eval_only_gives_the_same_ap_and_reports(shared_data, tmp_path):
    data = shared_data / "pennfudan"
    ten_images(data / "val.json", tmp_path / "val.json")
    arguments = [
        *("--config-file", QUICK, "--val-json", tmp_path / "val.json"),
        *("--val-images", data / "images"),
    ]
    training = [
        *arguments,
        *("--train-json", data / "train.json", "--train-images", data / "images"),
        *(*TINY, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 4),
        *("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 2, "TEST.REPORT", True),
        *("OUTPUT_DIR", tmp_path / "run", "TEST.EVAL_PERIOD", 0),
    ]
    train_net(*training)
    assert {p.name for p in (tmp_path / "run").glob("model_*")} == {
        *("model_0000002.pth", "model_0000003.pth", "model_final.pth", "model_final.safetensors"),
        *("model_best.pth", "model_best.safetensors"),
    }
    trained = metrics(tmp_path / "run")
    output = train_net(
        "--eval-only",
        *arguments,
        *(*TINY, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.REPORT", True),
        *("MODEL.WEIGHTS", tmp_path / "run/model_final.pth", "OUTPUT_DIR", tmp_path / "eval"),
    ).stdout
    values = [
        [float(v) for v in line.split(": ")[-1].split(",")]
        for line in output.splitlines()
        if re.search(r"copypaste: [\d.]+,", line)
    ]
    expected = [
        [trained[f"{task}/{name}"] for name in ("AP", "AP50", "AP75")] for task in ("bbox", "segm")
    ]
    assert [v[:3] for v in values] == [[round(x, 4) for x in row] for row in expected]
    same = "inference/coco_instances_results.json"
    assert (tmp_path / "run" / same).read_bytes() == (tmp_path / "eval" / same).read_bytes()

    report = (tmp_path / "run/report.html").read_text()
    for key, name in (("segm/AP", "mask AP"), ("segm/AP50", "mask AP50"), ("bbox/AP", "box AP")):
        assert f"<b>{trained[key]:.1f}</b><span>{name}</span>" in report
    assert "Where it errs: custom_val" in report and report.count("<img ") == 10
    for text in (
        "custom_train</h3>",
        "<dd>0.02</dd>",
        "PyTorch</dt>",
        "train_net.py",
        "MAX_ITER: 4",
    ):
        assert text in report
    # As a run that was killed before it came to the report.
    (tmp_path / "run/report.html").unlink()
    train_net("--resume", *training)
    again = (tmp_path / "run/report.html").read_text()
    assert "Where it errs: custom_val" in again and ">Loss</h3>" in again
    evaluated = (tmp_path / "eval/inference/report.html").read_text()
    assert f"<b>{trained['segm/AP']:.1f}</b><span>mask AP</span>" in evaluated


def test_a_recipe_is_that_of_the_run(coco_files, tmp_path):
    data = ("--train-json", coco_files.json_file, "--train-images", coco_files.image_root)
    options = [*TINY, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "run", "SOLVER.BASE_LR", 0.001]
    output = train_net("--config-file", QUICK, *data, "--recipe", "auto", *options).stdout
    assert output.count("recipe from the data (--recipe none leaves the config's)") == 1
    assert "best IoU" in output and "Starting training from iteration 0" in output
    data = ("--val-json", coco_files.json_file, "--val-images", coco_files.image_root)
    (tmp_path / "finetune").mkdir()
    config = (tmp_path / "run/config.yaml").rename(tmp_path / "finetune/config.yaml")
    weights = ("MODEL.WEIGHTS", tmp_path / "run/model_final.pth", "OUTPUT_DIR", tmp_path / "eval")
    output = train_net("--eval-only", "--config-file", config, *data, *weights).stdout
    assert "recipe from the data" not in output
    assert output.count("give the config.yaml of its OUTPUT_DIR as --config-file") == 1


def test_keypoints_of_own_data_train_and_are_evaluated(coco_files, tmp_path):
    for annotation in coco_files.content["annotations"]:
        annotation["keypoints"] = [8, 8, 2, 31, 31, 2]
    for category in coco_files.content["categories"]:
        category["keypoints"] = ["top_left", "bottom_right"]
    coco_files.write()
    config = ROOT / "configs/COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_gn_3x.yaml"
    options = [*TINY, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "SOLVER.MAX_ITER", 2]
    options += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)", "SOLVER.IMS_PER_BATCH", 1]
    evaluated = ("--config-file", config, *coco_files.arguments("val"), *options)
    run = train_net(*coco_files.arguments(), *evaluated, "OUTPUT_DIR", tmp_path / "run").stdout
    assert "NUM_KEYPOINTS = 2, from the dataset custom_train: top_left, bottom_right" in run
    trained = metrics(tmp_path / "run")
    assert {"loss_keypoint", "keypoints/AP", "bbox/AP"} <= trained.keys()
    weights = ("MODEL.WEIGHTS", tmp_path / "run/model_final.pth", "OUTPUT_DIR", tmp_path / "eval")
    train_net("--eval-only", *evaluated, *weights)
    results = "inference/coco_instances_results.json"
    written = (tmp_path / "eval" / results).read_bytes()
    assert written == (tmp_path / "run" / results).read_bytes()
    assert {len(result["keypoints"]) for result in json.loads(written)} == {6}


def test_progress_bar_on_a_terminal(coco_files, tmp_path):
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # 40 x 200
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/train_net.py", "--config-file", QUICK]
        + [*coco_files.arguments(), *TINY, "SOLVER.MAX_ITER", "5"]
        + ["OUTPUT_DIR", tmp_path / "run"],
        stdin=child,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # raised at the end of the output
        while chunk := os.read(parent, 65536):
            shown += chunk
    os.close(parent)
    assert process.wait() == 0, shown.decode()
    shown = shown.decode()
    assert re.search(r"5/5 \[.*total_loss=", shown)
    assert "total_loss: " not in shown  # the bar has taken the place of these lines
    assert "total_loss: " in (tmp_path / "run/log.txt").read_text()


def test_bad_data_is_one_sentence(coco_files, tmp_path):
    coco_files.content["annotations"][0]["category_id"] = 5
    coco_files.write()
    line = refusal(*PHOTOS, *coco_files.arguments(), "OUTPUT_DIR", tmp_path / "run")
    assert str(coco_files.json_file) in line and "annotation 10 (image 1.png)" in line


def test_evaluation_of_weights_of_fewer_classes_is_refused(coco_files, tmp_path):
    cfg = load_config(QUICK, [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "weights.pth")
    coco_files.content["categories"].append({"id": 9, "name": "cow"})
    coco_files.write()
    arguments = [*coco_files.arguments("val"), *TINY, "OUTPUT_DIR", tmp_path / "run"]
    arguments += ["MODEL.WEIGHTS", tmp_path / "weights.pth"]
    line = refusal(*PHOTOS, "--eval-only", *arguments)
    assert "roi_heads.box_predictor.cls_score" in line
    assert "It has 2 classes, the model has 3" in line
    assert not (tmp_path / "run/inference").exists()


def test_one_file_is_split_and_the_split_is_kept(coco_files, tmp_path):
    arguments = [*PHOTOS, *coco_files.arguments(), "--val-fraction"]
    options = [*TINY, "OUTPUT_DIR", tmp_path / "run", "SOLVER.MAX_ITER"]
    first = run_tool(*arguments, 0.34, *options, 1).stdout
    assert "train.json with 2 images, 2 objects and" in first and "custom_val: 1 images" in first
    assert "bbox/AP" in metrics(tmp_path / "run")
    parts = {path.name: path.read_bytes() for path in (tmp_path / "run/split").iterdir()}
    assert parts.keys() == {"train.json", "val.json"}
    coco_files.content["images"][0]["id"] = 77  # would be split otherwise
    coco_files.write()
    assert "holds a run already" in refusal(*arguments, 0.6, *options, 2)
    again = run_tool(*arguments, 0.6, "--resume", *options, 2).stdout
    assert "is split as it was before" in again and "custom_val: 1 images" in again
    for name, content in parts.items():
        assert (tmp_path / "run/split" / name).read_bytes() == content


def test_bad_key_is_one_sentence(coco_files, tmp_path):
    line = refusal(*PHOTOS, *coco_files.arguments(), "MODEL.NOTHING", "1")
    assert line == "error: the command line: Non-existent key: MODEL.NOTHING"


def test_groups_that_do_not_fit_are_one_sentence(coco_files, tmp_path):
    options = [*TINY, "MODEL.FPN.OUT_CHANNELS", 40, "MODEL.GN.NUM_GROUPS", 32]
    options += ["OUTPUT_DIR", tmp_path / "run"]
    line = refusal(*PHOTOS, *coco_files.arguments(), *options)
    assert "backbone.fpn_lateral2.norm: 40 channels" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_image_is_named_at_first_use(coco_files, tmp_path, workers):
    coco_files.damage("2.png")
    options = [*TINY, "SOLVER.MAX_ITER", 9, "DATALOADER.NUM_WORKERS", workers]
    options += ["OUTPUT_DIR", tmp_path / "run"]
    line = refusal(*PHOTOS, *coco_files.arguments(), *options)
    assert line.startswith("error: cannot use the image") and "2.png" in line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train-json", "a"], "--train-json and --train-images go together"),
        (["--val-fraction", "0.2"], "splits --train-json: no --val-json, no --eval-only"),
        ([*OWN, "--val-fraction", "0"], "--val-fraction is 0; it must be between 0 and 1"),
        ([*OWN, "--val-fraction", "0.2", "--eval-only"], "no --val-json, no --eval-only"),
        (
            [*OWN, "--val-fraction", "0.2", "--val-json", "a", "--val-images", "b"],
            "no --val-json, no --eval-only",
        ),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    result = train_net(*arguments, check=False)
    assert result.returncode == 2 and message in result.stderr
