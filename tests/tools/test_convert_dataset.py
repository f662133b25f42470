"""YOLO, Pascal VOC and LabelMe as COCO JSON, and back."""

import base64
import io
import json
import re

import numpy as np
import pytest
from helpers import SHARED_DATA, refusal, run_tool
from image_files import with_orientation
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from gn_detect.data.coco import check_coco_json

TOOL = "convert_dataset.py"
WIDTH, HEIGHT = SIZE = 64, 48


def convert(kind, source, images, *options, masks=True):
    """The content of the JSON, which our own check takes, and what was lost or changed."""
    output = images.parent / "train.json"
    shown = run_tool(TOOL, "--from", kind, source, *options, "--output", output).stdout
    check_coco_json(str(output), str(images), masks=masks, training=True, evaluation=True)
    return json.loads(output.read_text()), shown.splitlines()[-1].removeprefix("lost or changed: ")


def write_images(folder, *names):
    for name in names or ("a.png", "b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(folder / name)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def objects(content) -> dict[str, list]:
    """File name -> name of the class, box, and mask of each object."""
    coco, found = COCO(), {}
    coco.dataset = content
    coco.createIndex()
    for image in content["images"]:
        items = [a for a in coco.imgToAnns[image["id"]] if not a["iscrowd"]]
        masks = ["segmentation" in a and coco.annToRLE(a) or None for a in items]
        kinds = [(coco.cats[a["category_id"]]["name"], a["bbox"]) for a in items]
        found[image["file_name"]] = [(*k, m) for k, m in zip(kinds, masks, strict=True)]
    return found


def assert_same_objects(actual, expected):
    actual = objects(actual)
    for file_name, items in objects(expected).items():
        for item, other in zip(actual[file_name], items, strict=True):
            assert item[0] == other[0]
            np.testing.assert_allclose(item[1], other[1], atol=0.02)
            assert mask_util.iou([item[2]], [other[2]], [0])[0, 0] >= 0.98


@pytest.fixture
def scene(tmp_path):
    """A COCO dataset with a triangle, a mask in three parts, a ring as RLE, and a crowd."""
    write_images(tmp_path / "images", "a.png", "more/b.jpg", "none.png")
    ring = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    ring[10:30, 20:50], ring[15:25, 30:40] = 1, 0
    rle = {"size": [HEIGHT, WIDTH], "counts": mask_util.encode(ring)["counts"].decode()}
    parts = [[2.25, 3, 12.5, 3, 12.5, 20], [30, 30, 60, 30.75, 45, 44], [3, 40, 9, 40, 9, 47]]
    triangle = [[8, 6, 40, 6, 24, 38]]
    annotations = [
        {"image_id": 5, "category_id": 7, "bbox": [8, 6, 32, 32], "segmentation": triangle},
        {"image_id": 2, "category_id": 3, "bbox": [2.25, 3, 57.75, 44], "segmentation": parts},
        {"image_id": 2, "category_id": 7, "bbox": [20, 10, 30, 20], "segmentation": rle},
        {"image_id": 5, "category_id": 3, "bbox": [8, 6, 32, 32], "segmentation": triangle},
    ]
    for index, item in enumerate(annotations):
        item.update(id=index, iscrowd=int(index == 3), area=500)
    images = [
        {"id": id_, "file_name": name, "height": HEIGHT, "width": WIDTH}
        for id_, name in ((5, "a.png"), (2, "more/b.jpg"), (9, "none.png"))
    ]
    categories = [{"id": 3, "name": "dog"}, {"id": 7, "name": "a cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write(tmp_path / "scene.json", json.dumps(content))
    return content


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_there_and_back(scene, tmp_path, kind):
    images, out = tmp_path / "images", tmp_path / kind
    shown = run_tool(TOOL, "--to", kind, tmp_path / "scene.json", "--output", out).stdout
    assert "crowd regions, which are no objects, left out: 1 (the first: annotation 3" in shown
    content, lost = convert(kind, out, images, "--images", images)
    assert lost == "nothing"
    assert_same_objects(content, scene)
    from supervision import DetectionDataset  # not earlier: it warns, and the tool silences it

    reader = DetectionDataset.from_yolo if kind == "yolo" else DetectionDataset.from_pascal_voc
    names = ["labels", "data.yaml"] if kind == "yolo" else ["Annotations"]
    dataset = reader(str(images), *(str(out / name) for name in names))
    found = dataset.annotations[str(images / "a.png")]
    np.testing.assert_allclose(found.xyxy, [[8, 6, 40, 38]], atol=1e-3)
    assert [dataset.classes[i] for i in found.class_id] == ["a cat"]


@pytest.mark.parametrize("kind", ["yolo", "voc"])
@pytest.mark.parametrize("name", ["pennfudan", "coco_dev"])
def test_photos_there_and_back(tmp_path, name, kind):
    data = SHARED_DATA / name
    if not data.is_dir():
        pytest.skip("the shared photos are not here")
    (tmp_path / "images").symlink_to(data / "images")
    run_tool(TOOL, "--to", kind, data / "val.json", "--output", tmp_path)
    content, _ = convert(kind, tmp_path, tmp_path / "images", "--images", tmp_path / "images")
    assert_same_objects(content, json.loads((data / "val.json").read_text()))


def test_file_names_stay_in_the_folder(scene, tmp_path):
    for name in ("../a.png", "none.jpg"):  # outside; that of another image
        scene["images"][0]["file_name"] = name
        write(tmp_path / "bad.json", json.dumps(scene))
        arguments = ["--to", "yolo", tmp_path / "bad.json", "--output", tmp_path / "out"]
        assert "must be a path below" in refusal(TOOL, *arguments)


BOX, POLYGON = "0 0.5 0.5 0.25 0.5", "1 0.125 0.125 0.625 0.125 0.375 0.8125"
# Images, labels, data.yaml, arguments: Ultralytics, Roboflow, a split; folders that nothing names.
YOLO_LAYOUTS = [
    ("images/train", "labels/train", {"train": "images/train"}, "data.yaml"),
    ("valid/images", "valid/labels", {"val": "../valid/images"}, ""),
    ("val/images", "val/labels", {"train": "x", "val": "val/images"}, " --split val"),
    ("photos", "text", {}, "text --images photos --classes cat,dog"),
]


@pytest.mark.parametrize("images, labels, config, arguments", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path, monkeypatch, images, labels, config, arguments):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / images, "a.png", "deep/b.jpg", ".hidden/c.jpg")
    write(tmp_path / labels / "a.txt", f"{BOX}\n\n{POLYGON}\n")
    write(tmp_path / labels / "unused.txt", BOX)
    config = {"path": "../elsewhere", "names": ["cat", "dog"], **config}
    write(tmp_path / "data.yaml", json.dumps(config))
    source, *options = arguments.split(" ")
    content, lost = convert("yolo", source, tmp_path / images, *options, masks=False)
    assert list(objects(content)) == ["a.png", "deep/b.jpg"]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert content["annotations"][1]["segmentation"] == [[8, 6, 40, 6, 24, 39]]
    box, polygon = objects(content)["a.png"]
    assert box == ("cat", [24, 12, 16, 24], None) and polygon[:2] == ("dog", [8, 6, 32, 33])
    assert "kept as images without objects: 1 (the first: deep/b.jpg)" in lost
    assert "label files without an image, left out: 1 (the first: " in lost
    assert "objects without a mask among others with one, boxes alone: 1 (the first: " in lost


def yolo(root, lines=BOX):
    write_images(root / "images")
    write(root / "labels/a.txt", lines)
    write(root / "labels/b.txt", BOX)
    write(root / "data.yaml", 'names: {0: cat, 3: "7"}')


def test_yolo_lines(tmp_path):
    """A confidence, a class id as float, an edge beyond the image, no size; a turned photo, whose
    labels are those of the photo as it is shown, as Detectron2 reads it."""
    yolo(tmp_path, "\ufeff3.0 0.5 0.5 0.5 0.5 0.9\r\n0 0.9 0.5 0.5 0.5\r\n0 1 1 0 0")
    Image.new("RGB", SIZE).save(tmp_path / "images/b.jpg", exif=with_orientation(6))
    content, lost = convert("yolo", tmp_path, tmp_path / "images", masks=False)
    assert [(i["width"], i["height"]) for i in content["images"]] == [SIZE, SIZE[::-1]]
    expected = [("7", [16, 12, 32, 24], None), ("cat", [41.6, 12, 22.4, 24], None)]
    assert objects(content) == {"a.png": expected, "b.jpg": [("cat", [18, 16, 12, 32], None)]}
    for part in ("confidence", "beyond their image, clipped: 1", "without a pixel of their image"):
        assert part in lost


def voc_object(name, box=(9, 7, 40, 38), more=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    text = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    return f"<object><name>{name}</name><bndbox>{text}</bndbox>{more}</object>"


def voc(root, more=""):
    write_images(root / "JPEGImages")
    text = f"<filename>a.png</filename>{voc_object('dog')}{more}"
    write(root / "Annotations/a.xml", f"<annotation>{text}</annotation>")


def test_voc(tmp_path):
    """Boxes are counted from 1, with the last pixel within; the pixels of object i are i."""
    voc(tmp_path, voc_object("cat", (50, 2, 60, 20.5), "<difficult>1</difficult>"))
    write(tmp_path / "Annotations/b.xml", f"<a>{voc_object('dog')}</a>")
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[7:38, 8:40], numbers[6, 8:40] = 1, 255  # the border, of no class
    picture = Image.fromarray(numbers, "P")
    picture.putpalette(np.random.default_rng(0).integers(256, size=768).tolist())
    for name in ("SegmentationObject/a.png", "SegmentationClass/b.png"):
        (tmp_path / name).parent.mkdir()
        picture.save(tmp_path / name)
    content, lost = convert("voc", tmp_path, tmp_path / "JPEGImages", masks=False)
    (dog, box, mask), cat = objects(content)["a.png"]
    assert (dog, box) == ("dog", [8, 6, 32, 32]) and cat == ("cat", [49, 1, 11, 19.5], None)
    np.testing.assert_array_equal(mask_util.decode(mask), numbers == 1)
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert "marked as difficult, taken as any other: 1" in lost
    assert "masks of classes alone, which tell no objects apart, left out: 1" in lost
    assert "boxes alone: 2 (the first: " in lost


def test_voc_split_and_classes(tmp_path):
    voc(tmp_path)
    write(tmp_path / "ImageSets/Main/val.txt", "a\n")
    options = ["--split", "Main/val", "--classes", "cat, dog"]
    content, lost = convert("voc", tmp_path, tmp_path / "JPEGImages", *options, masks=False)
    assert list(objects(content)) == ["a.png"] and lost == "nothing"
    assert content["annotations"][0]["category_id"] == 2
    arguments = ["--from", "voc", tmp_path, "--output", tmp_path / "x.json"]
    assert "ImageSets/train.txt cannot be read" in refusal(TOOL, *arguments, "--split", "train")
    sentence = "a.xml, object 1 has the class 'dog', which is none of 'cat'; correct it, or add"
    assert sentence in refusal(TOOL, *arguments, "--classes", "cat")


def labelme(root, *shapes):
    write_images(root)
    content = {"shapes": shapes, "imagePath": "..\\data\\a.png", "imageData": "x" * 99}
    write(root / "a.json", json.dumps(content | {"imageWidth": WIDTH, "imageHeight": HEIGHT}))


def test_labelme(tmp_path):
    png = io.BytesIO()
    Image.fromarray(np.full((3, 5), True)).save(png, "PNG")
    mask = {"mask": base64.b64encode(png.getvalue()).decode()}
    shapes = [
        {"label": "cat", "shape_type": "rectangle", "points": [[40, 38], [8, 6]]},
        {"label": "dog", "points": [[8, 6], [40, 6], [24, 38]], "group_id": 1},
        {"label": "dog", "shape_type": "circle", "points": [[50, 20], [50, 30]]},
        {"label": "dog", "points": [[50, 40], [60, 40], [60, 46]], "group_id": 1},
        {"label": "dog", "shape_type": "mask", "points": [[4, 5], [8, 7]], **mask},
        {"label": "dog", "shape_type": "line", "points": [[0, 0], [9, 9]]},
    ]
    labelme(tmp_path, *shapes)
    content, lost = convert("labelme", tmp_path, tmp_path)
    assert "shapes that are no polygon, rectangle, circle or mask, left out: 1" in lost
    assert "rectangles, taken as masks, too: 1" in lost
    names, boxes, masks = zip(*objects(content)["a.png"], strict=True)
    assert names == ("cat", "dog", "dog", "dog")
    assert boxes == ([8, 6, 32, 32], [8, 6, 52, 40], pytest.approx([40, 10, 20, 20]), [4, 5, 5, 3])
    assert [len(p) for p in content["annotations"][1]["segmentation"]] == [6, 6]
    areas = [mask_util.area(mask) for mask in (masks[0], *masks[2:])]
    assert areas == [1024, pytest.approx(np.pi * 100, rel=0.03), 15]
    write_images(tmp_path, "train/a.png", "val/b.png")  # are not mixed
    arguments = ["--from", "labelme", tmp_path, "--output", tmp_path / "x.json"]
    assert "has the splits train, val; name the folder" in refusal(TOOL, *arguments)
    assert "LabelMe has no splits" in refusal(TOOL, *arguments, "--split", "train")


# What makes a dataset; what is then put into a file (None: it is taken away); and the sentence.
BROKEN = [
    (yolo, "labels/a.txt", f"{BOX}\nHELLO", "a.txt, line 2 is 'HELLO'"),
    (yolo, "labels/a.txt", "1 0.1 0.1 nan 0.1 0.3 0.8", "line 1 .*finite"),
    (yolo, "labels/a.txt", f"{POLYGON} 0.5", "line 1 .*7 coordinates, but x and y come in pairs"),
    (yolo, "labels/a.txt", "0 24 12 16 24", "line 1 .*the value 24 is not from 0 to 1"),
    (yolo, "labels/a.txt", f"\n1{BOX[1:]}", "line 2 has the class 1, which is none of 0, 3; "),
    (yolo, "labels/a.txt", b"\xff\xfe0", "a.txt cannot be read as text in UTF-8"),
    (yolo, "images/b.png", "", "share one label file"),
    (yolo, "images/a.png", "<html>", "cannot use the image .*a.png"),
    (yolo, "data.yaml", "names: [cat, no]", r"data.yaml .*bool.*names\[1\].*quote"),
    (yolo, "data.yaml", "{names: [a], kpt_shape: [3, 2]}", "data.yaml .*no keypoints"),
    (yolo, "data.yaml", "{names: [a], train: a, val: b}", "has the splits train, val; .*--split"),
    (yolo, "data.yaml", None, "data.yaml cannot be read"),
    (voc, "Annotations/a.xml", "<a>", "a.xml cannot be read as XML"),
    (voc, "Annotations/a.xml", "<a/>", "no label file of its 2 images has an object"),
    (voc, "Annotations/a.xml", None, "no image in .*JPEGImages has a label file .*--images"),
    (voc, "Annotations/b.xml", "<a><filename>a.png</filename></a>", "b.xml is of 'a.png'"),
    (voc, "Annotations/b.xml", f"<a>{voc_object('x', (1, 2, 3, 'y'))}</a>", "object 1 .*'y'"),
    (voc, "SegmentationObject/a.png", np.zeros((48, 64, 3)), "a.png .*RGB.*palette and 64 x 48"),
    (voc, "SegmentationObject/a.png", np.full((48, 64), 2), "an object 2, the XML has 1"),
    (voc, "SegmentationObject/a.png", np.eye(48, 64, 45), "object 1 has no pixel of its mask"),
    (labelme, "a.json", '{"shapes": [], "imageWidth": 48, "imageHeight": 64}', "48 x 64.*EXIF"),
    (labelme, "b.json", '{"shapes": [{}]}', r"b.json .*label.*shapes\[0\]"),
    (labelme, "b.json", '{"shapes": [{"label": "x", "points": []}]}', r"\(x\) .*3 points"),
]


@pytest.mark.parametrize("make, name, change, sentence", BROKEN)
def test_what_cannot_be_used_is_refused(tmp_path, make, name, change, sentence):
    make(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if change is None:
        path.unlink()
    elif isinstance(change, np.ndarray):
        Image.fromarray(change.astype(np.uint8)).save(path)
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    arguments = ["--from", make.__name__, tmp_path, "--output", tmp_path / "train.json"]
    message = refusal(TOOL, *arguments)
    assert re.search(sentence, message), message
