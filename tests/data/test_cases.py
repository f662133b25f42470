"""Defects of annotation files that people export: right, or the same sentence wherever a file is
read: for training, validation, --eval-only, --resume, analysis, and in the lazy tool."""

import json
import re

import pytest
import torch
from dataset_commands import exactly_the_truth, steps, train_both
from helpers import refusal, run_tool
from image_files import with_orientation
from PIL import Image

from gn_detect.modeling import GNGeneralizedRCNN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return train_both(tmp_path_factory.mktemp("good"))


def put(value, *place):
    """A defect at one place of the content."""

    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


def each(key, value):
    """A defect of all annotations; ``value`` may follow from what is there."""

    def change(content):
        for item in content["annotations"]:
            item[key] = value(item[key]) if callable(value) else value

    return change


FIRST = ("annotations", 0)


def rle(counts):
    return put({"size": [64, 64], "counts": counts}, *FIRST, "segmentation")


NAME = "annotation 10 (image 1.png) has "
NO_MASK = NAME + "no segmentation; add it, or train boxes alone with {masks} False"
BOXES = "the boxes of 3 of 3 objects reach beyond their image or disagree with their mask"
PASS = "({boxes} False lets them pass)"
KEYS = {"masks": "MODEL.MASK_ON", "boxes": "GUARDS.BOX_FORMAT"}
LAZY_KEYS = {
    "masks": "dataloader.train.mapper.use_instance_mask",
    "boxes": "train.guards.box_format",
}
REFUSED = {  # row of the table of cases, then the defect
    "01 runs": (
        rle([9, 1000]),
        NAME + "an RLE of 1009 pixels, its image has 4096 (64 x 64); export the mask again",
    ),
    "01 no mask": (put(None, *FIRST, "segmentation"), NO_MASK),
    "09 text": (each("iscrowd", "0"), NAME + "the iscrowd '0' (text); it must be 0 or 1"),
    "12 corners": (
        each("bbox", lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]),
        f"{BOXES}.*these seem to be x1, y1, x2, y2: convert them {PASS}",
    ),
    "12 normalized": (
        each("bbox", lambda box: [x / 64 for x in box]),
        f"{BOXES}.*these seem to be x, y, width, height, divided by the size of the image.*{PASS}",
    ),
    "12 outside": (each("bbox", [99, 99, 24, 24]), f"{BOXES}.*annotation 10 (image 1.png).*{PASS}"),
    "15 garbage": (
        rle("! ~"),
        NAME + "an RLE with damaged counts, '! ~'",
    ),
    "15 cut off": (
        rle("X`0h0X1"),
        NAME + "an RLE of .* pixels, its image has 4096 (64 x 64); export the mask again",
    ),
    "15 null": (
        rle(None),
        NAME + "a segmentation that is neither a list of polygons .*null",
    ),
    "17 file name": (
        put(123, "images", 0, "file_name"),
        "image 1 (123) has the file_name 123 (a number); it must be text",
    ),
    "17 no file name": (
        put(None, "images", 0, "file_name"),
        "image 1 (None) has the file_name null; it must be text",
    ),
    "17 name": (put(7, "categories", 0, "name"), "category 7 has the name 7 (a number)"),
    "17 no name": (put(None, "categories", 0, "name"), "category 7 has the name null"),
    "17 category": (put([3], *FIRST, "category_id"), NAME + "the category_id [3] (a list)"),
    "17 image": (put([1], *FIRST, "image_id"), "annotation 10 .* has the image_id [1] (a list)"),
    "17 mixed": (
        put("2", "images", 1, "id"),
        "some image ids are numbers (3) and some text ('2'); make them all numbers",
    ),
    "18 category": (
        each("category_id", str),
        NAME + "the category_id '3' (text), which 'categories' does not declare (it declares 3, 7)",
    ),
    "18 image": (
        each("image_id", str),
        "no annotation of an object that could be used: of its 3 annotations 3 are of no image "
        "that the file lists (annotation 10, with the image_id '1' (text))",
    ),
    "18 crowd": (
        each("iscrowd", 1),
        "no annotation of an object that could be used: of its 3 annotations 3 have iscrowd 1; if "
        "they are objects, set 0",
    ),
}


def assert_refused(good, files, path, sentence):
    """``sentence`` has places for the keys of the config; ".*" stands for other words."""
    for step, (tool, *arguments) in steps(good, files, path).items():
        if step == "analysis" and "False" in sentence:
            continue  # it shows what is wrong with boxes, and needs no masks
        expected = sentence.format(**(LAZY_KEYS if "lazy" in step else KEYS))
        message = refusal(tool, *arguments)
        assert re.search(".*".join(map(re.escape, expected.split(".*"))), message), step
        assert str(files.json_file) in message, step


@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_refused_wherever_it_is_read(good, coco_files, tmp_path, change, sentence):
    change(coco_files.content)
    coco_files.write()
    assert_refused(good, coco_files, tmp_path, sentence)


@pytest.mark.parametrize("codec, name", [("latin-1", "UTF-8"), ("utf-16", "UTF-16 or UTF-32")])
def test_row_18_encodings(good, coco_files, tmp_path, codec, name):
    coco_files.content["categories"][0]["name"] = "é"
    coco_files.json_file.write_text(json.dumps(coco_files.content, ensure_ascii=False), codec)
    assert_refused(good, coco_files, tmp_path, f"text in {name}.*; save it as UTF-8")


def turned(path, orientation=6):
    Image.new("RGB", (64, 48)).save(path, "JPEG", exif=with_orientation(orientation))


DAMAGED = {
    "13 empty": (lambda path: path.write_text(""), "1 image: an empty file (1.png)"),
    "13 page": (lambda path: path.write_text("<html>"), "1 image: a web page .*(1.png)"),
    "13 directory": (lambda path: (path.unlink(), path.mkdir()), "1 image: a directory (1.png)"),
    "13 link": (
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        "1 image: a link to a file that does not exist (1.png)",
    ),
    "13 size": (
        lambda path: Image.new("L", (32, 64)).save(path),
        "1 image: another size than declared .*(1.png is 32 x 64, declared 64 x 48)",
    ),
    "14 quarter turn": (
        turned,
        "1 image: declared with the size before their EXIF orientation is applied .*(1.png is 48 "
        "x 64, declared 64 x 48)",
    ),
}


@pytest.fixture
def wide_files(coco_files):
    """Image 1 is 64 pixels wide and 48 high."""
    coco_files.content["images"][0]["height"] = 48
    coco_files.write()
    Image.new("RGB", (64, 48)).save(coco_files.image_root / "1.png")
    return coco_files


@pytest.mark.parametrize("damage, sentence", DAMAGED.values(), ids=DAMAGED)
def test_images_are_refused_wherever_they_are_read(good, wide_files, tmp_path, damage, sentence):
    damage(wide_files.image_root / "1.png")
    assert_refused(good, wide_files, tmp_path, sentence)


def test_row_14_half_turn_is_said(good, wide_files, tmp_path):
    turned(wide_files.image_root / "1.png", 3)
    for step in ("train", "eval", "lazy train"):
        tool, *arguments = steps(good, wide_files, tmp_path / step)[step]
        shown = run_tool(tool, *arguments).stdout
        assert "1 image: an EXIF orientation, which is applied (1.png)" in shown, step


IDS = "ids that are absent, 0, no whole number, or not unique are renumbered"
AREA = "an area that is no number above 0 is taken from the mask, or the box (3 annotations)"
ISCROWD = "an iscrowd of null is taken as 0 (3 annotations)"
MENDED = {  # rows of the table of cases, whose defects a file may have together
    "04, 07 null": ([put(0, *FIRST, "id"), each("area", None)], [f"{IDS} (1 annotations)", AREA]),
    "04 twice, 07 text": (
        [each("id", 5), each("area", "576")],
        [f"{IDS} (2 annotations)", AREA],
    ),
    "06, 07 zero, 09": (
        [each("id", lambda id_: f"b1c6-{id_}"), each("area", 0), each("iscrowd", None)],
        [f"{IDS} (3 annotations)", AREA, ISCROWD],
    ),
    "06 float, 18 BOM": (
        [each("id", lambda id_: id_ + 0.5), lambda content: content.update(info="é")],
        [f"{IDS} (3 annotations)"],
    ),
}


@pytest.mark.parametrize("changes, warnings", MENDED.values(), ids=MENDED)
def test_mended_wherever_it_is_read(good, coco_files, tmp_path, monkeypatch, changes, warnings):
    for change in changes:
        change(coco_files.content)
    codec = "utf-8-sig" if "info" in coco_files.content else "utf-8"
    coco_files.json_file.write_text(json.dumps(coco_files.content, ensure_ascii=False), codec)
    monkeypatch.setattr(GNGeneralizedRCNN, "inference", exactly_the_truth)
    for step, (tool, *arguments) in steps(good, coco_files, tmp_path).items():
        if step in ("val", "lazy val"):
            continue  # reads what the evaluation reads
        shown = run_tool(tool, *arguments)
        if step == "analysis":
            continue  # of warnings, pytest has the handler
        for warning in warnings:
            assert f"annotations.json: {warning}" in shown.stdout, step
        assert re.findall(r"copypaste: ([\d.]+),", shown.stdout) == ["100.0000"] * 2, step


@pytest.mark.parametrize(
    "classes",
    [{3: "dog", 7: "cat", 8: "star"}, {7: "cat"}, {3: "cat", 7: "dog"}],
    ids=["more", "fewer", "exchanged"],
)
def test_other_classes_than_those_of_the_weights(good, coco_files, tmp_path, classes):
    """Rows 02 and 03."""
    put([{"id": k, "name": v} for k, v in classes.items()], "categories")(coco_files.content)
    if 3 not in classes:
        each("category_id", 7)(coco_files.content)
    coco_files.write()
    count = len(classes)
    for step, (tool, *arguments) in steps(good, coco_files, tmp_path, coco_files).items():
        if step not in ("resume", "lazy resume", "eval", "lazy eval"):
            continue
        lazy = [f"model.roi_heads.num_classes={count}"] if "lazy" in step else []
        message = refusal(tool, *arguments, *lazy)
        if "resume" in step:
            path = tmp_path / f"{'' if lazy else 'yaml '}{step}" / "model_final.pth"
            for part in (
                f"--resume: {path} is of another model than this run's: it has 2 classes (dog, "
                f"cat), the data {count} ({', '.join(classes.values())})",
                f"start a new OUTPUT_DIR with MODEL.WEIGHTS {path}",
            ):
                assert part in message, step
            continue
        path = (good.lazy if lazy else good.yaml) / "model_final.pth"
        assert str(path) in message, step
        if count == 2:
            assert "class 1 of 2 is 'dog' in the weights, 'cat' in the data" in message, step
        else:
            assert "not in the shape of this model" in message, step
            assert f"It has 2 classes, the model has {count}" in message, step


def test_weights_of_a_backbone_alone(good, coco_files, tmp_path):
    """Row 03."""
    state = torch.load(good.yaml / "model_final.pth", weights_only=True)["model"]
    state = {name: value for name, value in state.items() if "bottom_up" in name}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    tool, *arguments = steps(good, coco_files, tmp_path)["eval"]
    message = refusal(tool, *arguments, "MODEL.WEIGHTS", tmp_path / "backbone.pth")
    assert re.search("backbone.pth does not .* this model: FPN; RPN; box head; mask head", message)


def test_row_20_most_objects_are_crowds(good, coco_files, tmp_path):
    each("iscrowd", 1)(coco_files.content)
    put(0, *FIRST, "iscrowd")(coco_files.content)
    coco_files.write()
    found = steps(good, coco_files, tmp_path)
    for step in ("train", "resume", "eval", "lazy train"):
        tool, *arguments = found[step]
        warning = "2 of 3 annotations have iscrowd 1 and are not trained on; if they are objects"
        assert warning in run_tool(tool, *arguments).stdout, step
