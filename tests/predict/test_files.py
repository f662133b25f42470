"""``tools/predict.py``, and what it consists of."""

import json
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
from detectron2.structures import Boxes, Instances
from helpers import ROOT, TINY, CocoFiles, refusal, run_tool
from PIL import Image
from predict.saved import MASK_RCNN
from pycocotools import mask as mask_util

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.coco import check_coco_json, load_coco
from gn_detect.predict.inputs import find_inputs, open_video
from gn_detect.predict.outputs import (
    dataset_files,
    plan_outputs,
    to_results,
    video_file,
    written_as,
)
from gn_detect.predict.run import predict_files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return CocoFiles(tmp_path_factory.mktemp("files") / "data")


@pytest.fixture
def files(data, tmp_path):
    """A folder of three images, and of others below it."""
    root = tmp_path / "in"
    shutil.copytree(data.image_root, root)
    for name in ("sub/1.png", ".hidden/1.png", "notes.txt", "._1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "1.png", root / name)
    return root


def write_video(path, frames, size=(33, 47), fps=24):
    with video_file(path, size[1], size[0], fps) as write:
        for number in range(frames):
            write(np.tile(np.uint8([8 * number, 90, 20]), (size[1], size[0], 1)))


def names(given, output="nowhere"):
    root, inputs = find_inputs([str(name) for name in given], output)
    return root, [item.name for item in inputs]


def test_inputs(files, monkeypatch, caplog):
    everything = ["1.png", "2.png", "3.png", "sub/1.png"]
    assert names([files]) == (files, everything)
    assert f"{files}: files of other kinds are left out (1 .txt)" in caplog.text
    assert names([files / "sub", files / "1.png"]) == (files, ["sub/1.png", "1.png"])
    assert names([files / "?.png", files / "2.png"]) == (files, everything[:3])
    assert names([files / "**/1.png"]) == (files, ["1.png", "sub/1.png"])
    assert names([files], output=files / "sub") == (files, everything[:3])
    assert names([files / "notes.txt"])[1] == ["notes.txt"]  # named, so that it is looked at
    (files / "[1].png").write_bytes(b"")
    monkeypatch.chdir(files)
    assert names(["[1].png", "2.png"]) == (files, ["[1].png", "2.png"])
    monkeypatch.chdir(files / "sub")
    assert names(["../1.png", ".", "../sub/../1.png"]) == (files, ["1.png", "sub/1.png"])
    for nothing in ("absent.png", "*.jpg", ".hidden/*.txt"):
        with pytest.raises(DataError, match="there is no such file"):
            names([nothing])


def test_links_are_followed_once(files, tmp_path):
    """Also those that lead back, by which a pattern finds a file in 40 places."""
    shutil.copytree(files / "sub", tmp_path / "far")
    for name, target in (("sub/up", ".."), ("far", "../far"), ("far/1.link.png", "../in/2.png")):
        (files / name).symlink_to(target)
    found = ["1.png", "2.png", "3.png", "far/1.png", "sub/1.png"]
    assert names([files]) == (files, found)
    assert sorted(names([files / "**/*.png"])[1]) == found


def test_outputs_are_apart(files, tmp_path):
    for name in ("1.gif", "clip.avi", "clip.mp4", "clip.avi.mp4"):
        (files / name).write_bytes(b"")
    given = ["1.gif", "1.png", "sub/1.png", "clip.avi", "clip.mp4", "clip.avi.mp4"]
    _, inputs = find_inputs([str(files / name) for name in given], tmp_path)
    output = tmp_path / "out"
    targets = [str(t.relative_to(output)) for t in plan_outputs(inputs, output, False)]
    assert targets == [
        *("1.gif.png", "1.png", "sub/1.png"),
        *("clip.avi.mp4", "clip.mp4", "clip.avi.mp4.mp4"),
    ]
    with pytest.raises(ConfigError, match="in holds other files.*--overwrite"):
        plan_outputs(inputs, files, False)
    with pytest.raises(ConfigError, match="1.png, an input, which its own picture would replace"):
        plan_outputs(inputs, files, True)


def test_files_are_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), written_as(tmp_path / "a") as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/a cannot be written"):
        with written_as(tmp_path / "file/a"):
            pass


def test_results_of_a_folder_are_those_of_an_evaluation(weights, data, tmp_path):
    run_tool(
        *("train_net.py", "--eval-only", "--config-file", ROOT / "configs" / MASK_RCNN),
        *data.arguments("val"),
        *(*TINY, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "eval"),
    )
    expected = json.loads((tmp_path / "eval/inference/coco_instances_results.json").read_bytes())
    output = tmp_path / "out"
    arguments = ("predict.py", weights, data.image_root, "--output", output, "--device", "cpu")
    score = sorted(result["score"] for result in expected)[len(expected) // 2]
    shown = run_tool(*arguments, "--score", score).stdout
    found = json.loads((output / "predictions.json").read_bytes())
    ids = {1: 3, 2: 7}  # positions in the weights -> ids of the data
    assert [{**f, "category_id": ids[f["category_id"]]} for f in found] == expected
    above = [result for result in found if result["score"] >= score]
    assert 0 < len(above) < len(found)
    assert f"{len(found)} objects in 3 images, {len(above)} of score >= {score:g}" in shown
    for name in ("1.png", "2.png", "3.png"):
        with Image.open(output / name) as drawn, Image.open(data.image_root / name) as image:
            assert drawn.size == image.size
            changed = (np.asarray(drawn) != np.asarray(image.convert("RGB"))).any()
            assert changed == any(r["image_id"] == int(name[0]) for r in above)

    annotations = output / "annotations.json"
    run_tool("inspect_dataset.py", "--json", annotations, "--images", data.image_root)
    summary = check_coco_json(
        str(annotations), str(data.image_root), masks=True, training=True, evaluation=True
    )
    content = json.loads(annotations.read_bytes())
    masks = [result for result in above if mask_util.area(result["segmentation"])]
    assert summary.num_annotations == len(content["annotations"]) == len(masks)
    for annotation, result in zip(content["annotations"], masks, strict=True):
        for key in ("image_id", "category_id", "score"):
            assert annotation[key] == result[key]
    assert "holds other files" in refusal(*arguments)
    shown = run_tool(*arguments, "--overwrite", "--no-pictures", "--score", 1).stdout
    assert f"{len(found)} objects in 3 images, 0 of score >= 1: the highest score is" in shown


def test_what_cannot_be_used_is_named_and_the_others_go_on(weights, files, tmp_path):
    (files / "2.png").write_bytes((files / "2.png").read_bytes()[:2000])
    (files / "clip.mp4").write_bytes(b"no video")
    Image.new("RGB", (9000, 1)).save(files / "line.png")
    output = tmp_path / "out"
    arguments = (weights, files, "--output", output, "--device", "cpu", "--batch", 2)
    ended = run_tool("predict.py", *arguments, "--classes", "cat", check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert [line for line in lines if "2.png" in line and "cannot use the image" in line]
    assert [line for line in lines if "line.png: an image of 9000 x 1 pixels cannot be" in line]
    assert [line for line in lines if "clip.mp4 is no video" in line]
    assert lines[-1] == "error: 3 of 6 inputs failed, named above"
    content = json.loads((output / "annotations.json").read_bytes())
    assert [i["file_name"] for i in content["images"]] == ["1.png", "3.png", "sub/1.png"]
    results = json.loads((output / "predictions.json").read_bytes())
    assert {r["category_id"] for r in results} == {2}
    line = refusal("predict.py", *arguments, "--overwrite", "--classes", "cow")
    assert "no class 'cow'; it has dog, cat" in line


def test_video_of_the_same_frames_and_speed(weights, tmp_path):
    write_video(tmp_path / "clip.mp4", 12)
    arguments = ("--output", tmp_path / "out", "--device", "cpu", "--batch", 8)
    shown = run_tool("predict.py", weights, tmp_path / "clip.mp4", *arguments).stdout
    assert "objects in 12 frames, " in shown
    with av.open(tmp_path / "out/clip.mp4") as video:
        stream = video.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height) == (24, 34, 48)
        assert len(list(video.decode(video=0))) == 12
    results = json.loads((tmp_path / "out/clip.mp4.json").read_bytes())
    assert {r["image_id"] for r in results} <= set(range(12)) and results
    assert not (tmp_path / "out/annotations.json").exists()


def test_frames_in_order(tmp_path):
    write_video(tmp_path / "clip.mp4", 30)
    info, frames = open_video(tmp_path / "clip.mp4")
    colors = np.array([frame.mean(axis=(0, 1)) for frame in frames])
    assert (info.total_frames, info.fps) == (30, 24)
    assert np.abs(colors - [[8 * number, 90, 20] for number in range(30)]).max() < 6


def test_video_without_frames(tmp_path):
    with av.open(tmp_path / "empty.mkv", "w") as video:
        stream = video.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 32
        video.start_encoding()
    for name in ("empty.mkv", "absent.mp4"):
        with pytest.raises(DataError, match=f"{name} is (no video|a video without frames)"):
            open_video(tmp_path / name)


def one_object(images):
    for pixels in images:
        found = Instances(pixels.shape[:2])
        found.pred_boxes, found.scores = Boxes([[1.0, 1.0, 5.0, 5.0]]), np.array([0.9])
        found.pred_classes = np.array([0])
        yield found


def test_an_interrupted_run_leaves_what_it_has(files, tmp_path):
    def read(path):
        if path.name == "3.png":
            raise KeyboardInterrupt
        return np.zeros((8, 8, 3), np.uint8)

    _, inputs = find_inputs([str(files)], tmp_path)
    targets = plan_outputs(inputs, tmp_path / "out", False)
    names = {"class_names": ["thing"], "keypoint_names": []}
    predictor = SimpleNamespace(stream=one_object, read=read, **names)
    summary = predict_files(predictor, inputs, targets, tmp_path / "out", pictures=False)
    assert summary.interrupted and summary.images == 2 and "interrupted" in summary.failed[0]
    assert len(json.loads((tmp_path / "out/annotations.json").read_bytes())["annotations"]) == 2


def test_what_is_wrong_with_all_frames_is_said_once(tmp_path):
    def too_large(images):
        raise DataError("too large")

    write_video(tmp_path / "clip.mp4", 3)
    _, inputs = find_inputs([str(tmp_path)], tmp_path / "out")
    targets = plan_outputs(inputs, tmp_path / "out", False)
    predictor = SimpleNamespace(stream=too_large, class_names=["thing"])
    summary = predict_files(predictor, inputs, targets, tmp_path / "out")
    assert summary.failed == [f"{tmp_path / 'clip.mp4'}: too large"] and not summary.frames


def test_a_picture_that_cannot_be_written_leaves_the_results(files, tmp_path):
    _, inputs = find_inputs([str(files)], tmp_path)
    targets = plan_outputs(inputs, tmp_path / "out", False)
    targets[1].mkdir(parents=True)  # as a full disk
    names = {"class_names": ["thing"], "keypoint_names": []}
    read = {"read": lambda path: np.zeros((8, 8, 3), np.uint8)}
    predictor = SimpleNamespace(stream=one_object, **read, **names)
    with pytest.raises(ConfigError, match="2.png cannot be written.* until now is written"):
        predict_files(predictor, inputs, targets, tmp_path / "out")
    for name in ("predictions", "annotations"):
        content = json.loads((tmp_path / f"out/{name}.json").read_bytes())
        assert len(content if name == "predictions" else content["annotations"]) == 2


def test_a_video_that_cannot_be_written_leaves_the_results(tmp_path, capfd):
    rng, clip = np.random.default_rng(0), tmp_path / "in/clip.mp4"
    clip.parent.mkdir()
    with video_file(clip, 64, 64, 24) as write:
        for _ in range(60):
            write(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    _, inputs = find_inputs([str(clip)], tmp_path)
    targets = plan_outputs(inputs, tmp_path / "out", False)
    predictor = SimpleNamespace(stream=one_object, class_names=["thing"], keypoint_names=[])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))  # as a full disk
    try:
        with pytest.raises(ConfigError, match="clip.mp4 cannot be written.*now is written"):
            predict_files(predictor, inputs, targets, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "out") == ["clip.mp4.json"]
    results = json.loads((tmp_path / "out/clip.mp4.json").read_bytes())
    assert [r["image_id"] for r in results] == list(range(len(results))) and len(results) > 9
    assert "Traceback" not in capfd.readouterr().err


def instances(masks, scores, keypoints=None):
    found = Instances(masks[0].shape)
    found.pred_boxes = Boxes([[2.0, 2.0, 20.0, 20.0]] * len(masks))
    found.scores, found.pred_classes = np.array(scores), np.zeros(len(masks), int)
    found.pred_masks = masks
    if keypoints is not None:
        found.pred_keypoints = keypoints
    return found


def test_annotations_are_the_masks(tmp_path, caplog):
    y, x = np.mgrid[:24, :24]
    disc = (x - 11) ** 2 + (y - 11) ** 2 < 80
    ring = disc & ((x - 11) ** 2 + (y - 11) ** 2 > 20)
    parts = disc & (abs(x - 11) > 2)
    masks = [disc, ring, parts, np.zeros_like(disc), disc]
    found = instances(masks, [0.9, 0.8, 0.7, 0.6, 0.1])
    with dataset_files(tmp_path, ["thing"]) as add:
        add("a.png", (24, 24), to_results(found))
        add("b.png", (24, 24), [])
    content = json.loads((tmp_path / "annotations.json").read_bytes())
    kinds = [type(annotation["segmentation"]) for annotation in content["annotations"]]
    assert kinds == [list, dict, list]  # a ring is no polygon; the other two are none, or too low
    assert "lacks 1 objects whose masks have no pixel, such as one in a.png" in caplog.text
    read = load_coco(str(tmp_path / "annotations.json"))
    for i, mask in enumerate([disc, ring, parts]):
        rle = read.segmentation(i)
        rle = rle if isinstance(rle, dict) else mask_util.merge(mask_util.frPyObjects(rle, 24, 24))
        assert (mask_util.decode(rle) == mask).all()
        assert content["annotations"][i]["area"] == mask.sum()
    assert len(json.loads((tmp_path / "predictions.json").read_bytes())) == 5
    assert sorted(os.listdir(tmp_path)) == ["annotations.json", "predictions.json"]


def test_keypoints_can_be_trained_on(files, tmp_path):
    points = np.array([[[3.5, 4.5, 0.2], [10.5, 11.5, 0.9]]], np.float32)
    found = instances([np.ones((64, 64), bool)], [0.9], points.copy())
    with dataset_files(tmp_path, ["person"], ["left_eye", "right_eye"]) as add:
        add("1.png", (64, 64), to_results(found))
    content = json.loads((tmp_path / "annotations.json").read_bytes())
    assert content["annotations"][0]["keypoints"] == [3, 4, 2, 10, 11, 2]
    json_file = str(tmp_path / "annotations.json")
    options = {"masks": True, "keypoints": True, "training": True, "evaluation": True}
    summary = check_coco_json(json_file, str(files), **options)
    assert summary.keypoints == ["left_eye", "right_eye"]


def test_the_terminal_shows_nothing_of_the_parts():
    """PyTorch has words for the authors of Detectron2, and supervision for those of OpenCV."""
    code = """if True:
        import gn_detect.predict.inputs, torch.fx._symbolic_trace
        torch.meshgrid(torch.zeros(1), torch.zeros(1))
        torch.fx._symbolic_trace.is_fx_tracing()
        """
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
