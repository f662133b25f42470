"""YOLO, Pascal VOC and LabelMe as COCO JSON, and back."""

import base64
import io
import json
import re
import shutil
import warnings

import numpy as np
import pytest
from helpers import SHARED_DATA, refusal, run_tool
from PIL import Image
from pycocotools import mask as mask_util

from gn_detect.data.coco import check_coco_json

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # supervision asks for OpenCV
    from supervision import DetectionDataset

TOOL = "convert_dataset.py"
WIDTH, HEIGHT = SIZE = 64, 48
TRIANGLE = [8, 6, 40, 6, 24, 38]


def convert(*args, images=None, masks=True):
    """The content of the JSON, which our own check takes, and what was lost or changed."""
    *_, output = args
    shown = run_tool(TOOL, *args[:-1], "--output", output).stdout
    written, lost = shown.splitlines()[-2:]
    root = images or written.rpartition("images in ")[2]
    check_coco_json(str(output), str(root), masks=masks, training=True, evaluation=True)
    content = json.loads(output.read_text())
    for key in ("images", "annotations"):
        assert [x["id"] for x in content[key]] == list(range(1, len(content[key]) + 1))
    return content, lost.removeprefix("lost or changed: ")


def write_images(folder, *names, size=SIZE):
    for name in names or ("a.png", "b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def objects(content) -> dict[str, list]:
    """File name -> name of the class, box, and mask of each object."""
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = {image["file_name"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if annotation["iscrowd"]:
            continue
        image = images[annotation["image_id"]]
        mask, size = annotation.get("segmentation"), (image["height"], image["width"])
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, *size))
        elif mask and isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *size)
        name = names[annotation["category_id"]]
        found[image["file_name"]].append((name, annotation["bbox"], mask))
    return found


def assert_same_objects(actual, expected, iou=0.98, pixels=0.02):
    actual, expected = objects(actual), objects(expected)
    for file_name, items in expected.items():
        assert len(actual[file_name]) == len(items)
        for (name, box, mask), (other, other_box, other_mask) in zip(
            actual[file_name], items, strict=True
        ):
            assert name == other
            np.testing.assert_allclose(box, other_box, atol=pixels)
            assert (mask is None) == (other_mask is None)
            assert mask is None or mask_util.iou([mask], [other_mask], [0])[0, 0] >= iou


@pytest.fixture
def scene(tmp_path):
    """A COCO dataset with a triangle, a mask in two parts, a ring as RLE, and a crowd."""
    write_images(tmp_path / "images", "a.png", "more/b.jpg", "none.png")
    ring = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    ring[10:30, 20:50], ring[15:25, 30:40] = 1, 0
    counts = mask_util.encode(ring)["counts"].decode()
    parts = [[2.25, 3, 12.5, 3, 12.5, 20, 2.25, 20], [30, 30, 60, 30.75, 45, 44]]
    masks = [[TRIANGLE], parts, {"size": [HEIGHT, WIDTH], "counts": counts}, [TRIANGLE]]
    boxes = [[8, 6, 32, 32], [2.25, 3, 57.75, 41], [20, 10, 30, 20], [8, 6, 32, 32]]
    content = {
        "images": [
            {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for i, name in ((5, "a.png"), (2, "more/b.jpg"), (9, "none.png"))
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            | {"area": 500, "segmentation": mask}
            for i, (image, category, crowd, box, mask) in enumerate(
                zip([5, 2, 2, 5], [7, 3, 7, 3], [0, 0, 0, 1], boxes, masks, strict=True)
            )
        ],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "a cat"}],
    }
    write(tmp_path / "scene.json", json.dumps(content))
    return content


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_there_and_back(scene, tmp_path, kind):
    arguments = [tmp_path / "scene.json", "--to", kind, "--output", tmp_path / kind]
    shown = run_tool(TOOL, *arguments).stdout
    assert "crowd regions, which are no objects, left out: 1 (the first: annotation 3" in shown
    images = tmp_path / "images"
    content, lost = convert(tmp_path / kind, "--images", images, tmp_path / "back.json")
    assert lost == "nothing"
    assert_same_objects(content, scene)
    # As supervision reads it, which looks into one folder.
    folders = {"yolo": ("labels",), "voc": ("Annotations",)}[kind]
    arguments = [str(images), str(tmp_path / kind / folders[0])]
    if kind == "yolo":
        dataset = DetectionDataset.from_yolo(*arguments, str(tmp_path / kind / "data.yaml"))
    else:
        dataset = DetectionDataset.from_pascal_voc(*arguments)
    found = dataset.annotations[str(images / "a.png")]
    np.testing.assert_allclose(found.xyxy, [[8, 6, 40, 38]], atol=1e-3)
    assert [dataset.classes[i] for i in found.class_id] == ["a cat"]


@pytest.mark.parametrize("kind", ["yolo", "voc"])
@pytest.mark.parametrize("name", ["pennfudan", "coco_dev"])
def test_photos_there_and_back(tmp_path, name, kind):
    data = SHARED_DATA / name
    if not data.is_dir():
        pytest.skip("the shared photos are not here")
    run_tool(TOOL, data / "val.json", "--to", kind, "--output", tmp_path / kind)
    arguments = [tmp_path / kind, "--images", data / "images", tmp_path / "back.json"]
    content, _ = convert(*arguments)
    assert_same_objects(content, json.loads((data / "val.json").read_text()))


def test_file_names_stay_in_the_folder(scene, tmp_path):
    for name, sentence in (("../a.png", "must be a path below"), ("none.jpg", "would share")):
        scene["images"][0]["file_name"] = name
        write(tmp_path / "bad.json", json.dumps(scene))
        arguments = [tmp_path / "bad.json", "--to", "yolo", "--output", tmp_path / "out"]
        assert sentence in refusal(TOOL, *arguments)


BOX, POLYGON = "0 0.5 0.5 0.25 0.5", "1 0.125 0.125 0.625 0.125 0.375 0.8125"
# Where images and labels are, what holds the names, and the arguments.
YOLO_LAYOUTS = {
    "ultralytics": ("images/train", "labels/train", "data.yaml", ["data.yaml"]),
    "its folder": ("images/train", "labels/train", "data.yaml", ["", "--split", "train"]),
    "roboflow": ("valid/images", "valid/labels", "data.yaml", ["", "--split", "val"]),
    "flat": ("images", "labels", "classes.txt", [""]),
    "darknet": ("obj_train_data", "obj_train_data", "obj.names", ["obj_train_data"]),
    "apart": ("photos", "text", "text/classes.txt", ["text", "--images", "photos"]),
}


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path, layout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    images, labels, names_file, (source, *options) = YOLO_LAYOUTS[layout]
    write_images(root / images, "a.png", "deep/b.jpg", ".hidden/c.jpg")
    write(root / labels / "a.txt", f"{BOX}\n\n{POLYGON}\n")
    write(root / labels / "unused.txt", BOX)
    write(root / "README.roboflow.txt", "no labels")
    entry = {"val": "../valid/images"} if layout == "roboflow" else {"train": images}
    named = {"path": "../elsewhere", "names": ["cat", "dog"], **entry}
    write(root / names_file, json.dumps(named) if ".yaml" in names_file else "cat\ndog\n")
    options = [str(root / o) if o == "photos" else o for o in options]
    content, lost = convert(root / source, *options, tmp_path / "train.json")
    assert [(i["file_name"], i["width"], i["height"]) for i in content["images"]] == [
        *(("a.png", *SIZE), ("deep/b.jpg", *SIZE))
    ]
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    box, polygon = content["annotations"]
    assert (box["category_id"], polygon["category_id"]) == (1, 2)
    assert box["bbox"] == [24, 12, 16, 24] and box["area"] == 384
    assert polygon["segmentation"] == [[8, 6, 40, 6, 24, 39]]
    assert polygon["bbox"] == [8, 6, 32, 33] and polygon["area"] == pytest.approx(528, abs=20)
    assert box["segmentation"] == [[24, 12, 40, 12, 40, 36, 24, 36]]
    for part in (
        "images without a label file, kept as images without objects: 1 (the first: deep/b.jpg)",
        "label files without an image, left out: 1 (the first: ",
        "boxes alone among masks, whose rectangle is taken as the mask: 1 (the first: a.png)",
    ):
        assert part in lost


def yolo(root, lines=BOX, config='names: {0: cat, 3: "7"}'):
    write_images(root / "images")
    write(root / "labels/a.txt", lines)
    write(root / "labels/b.txt", BOX)
    write(root / "data.yaml", config)


def test_yolo_lines(tmp_path):
    """Boxes with confidences, class ids as floats, keypoints, an edge beyond the image."""
    lines = (
        "\ufeff3.0 0.5 0.5 0.5 0.5 0.9\r\n0 0.9 0.5 0.5 0.5\r\n0 0.5 0.5 0.5 0.5 1 1 2\n0 1 1 0 0"
    )
    yolo(tmp_path, lines, "{names: {0: cat, 3: '7'}, kpt_shape: [1, 3]}")
    content, lost = convert(tmp_path, tmp_path / "train.json", masks=False)
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 4, "name": "7"}]
    assert [a["category_id"] for a in content["annotations"]] == [4, 1, 1, 1]
    assert [a["bbox"] for a in content["annotations"][:3]] == [
        *([16, 12, 32, 24], [41.6, 12, 22.4, 24], [16, 12, 32, 24])
    ]
    assert all("segmentation" not in a for a in content["annotations"])
    for part in ("confidence", "keypoints are left out", "beyond their image, clipped", "a pixel"):
        assert part in lost
    assert lost.count("(the first: ") == 4


def voc_object(name, box=(9, 7, 40, 38), more=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    text = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    return f"<object><name>{name}</name><bndbox>{text}</bndbox>{more}</object>"


def voc(root, *elements, header="<filename>a.png</filename>"):
    write_images(root / "JPEGImages")
    elements = elements or (voc_object("dog"),)
    write(root / "Annotations/a.xml", f"<annotation>{header}{''.join(elements)}</annotation>")


@pytest.mark.parametrize("mode", ["P", "RGB", "partly", "boxes"])
def test_voc(tmp_path, mode):
    """Boxes are counted from 1, with the last pixel within; the pixels of object i are i."""
    difficult = "<difficult>1</difficult>"
    voc(tmp_path, voc_object("dog"), voc_object("cat", (50, 2, 60, 20.5), difficult))
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[6:38, 8:40], numbers[2:20, 50:60] = 1, 2
    numbers[6, 8:40] = 255  # no class
    if mode == "partly":
        numbers[numbers == 2] = 0
    picture = Image.fromarray(numbers, "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, *[0] * 756, 224, 224, 192])
    kind = "SegmentationClass" if mode == "boxes" else "SegmentationObject"
    (tmp_path / kind).mkdir()
    picture.convert("RGB" if mode == "RGB" else "P").save(tmp_path / kind / "a.png")
    content, lost = convert(tmp_path, tmp_path / "train.json", masks=mode in ("P", "RGB"))
    assert "marked as difficult, taken as any other: 1" in lost
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [a["bbox"] for a in content["annotations"]] == [[8, 6, 32, 32], [49, 1, 11, 19.5]]
    masks = [mask for _, _, mask in objects(content)["a.png"]]
    if mode == "boxes":
        assert masks == [None, None] and "masks of classes alone" in lost
    elif mode == "partly":
        assert masks[0] and masks[1] is None and "without a pixel in SegmentationObject" in lost
    else:
        for number, mask in enumerate(masks, 1):
            np.testing.assert_array_equal(mask_util.decode(mask), numbers == number)


def test_voc_splits_and_classes(tmp_path):
    voc(tmp_path)
    write(tmp_path / "ImageSets/Main/val.txt", "a\n")
    arguments = ["--split", "val", "--classes", "cat, dog", tmp_path / "val.json"]
    content, lost = convert(tmp_path, *arguments, masks=False)
    assert [i["file_name"] for i in content["images"]] == ["a.png"] and lost == "nothing"
    assert content["annotations"][0]["category_id"] == 2
    (tmp_path / "Annotations").rename(tmp_path / "annotations")
    arguments = ["--split", "train", "--output", tmp_path / "x.json"]
    assert "(there are: Main/val)" in refusal(TOOL, tmp_path, *arguments)
    arguments = ["--classes", "cat", "--output", tmp_path / "x.json"]
    sentence = "a.xml, object 1 has the class 'dog', which is none of cat; correct it, or add"
    assert sentence in refusal(TOOL, tmp_path, *arguments)


def test_masks_of_cvat(tmp_path):
    """Without XML; the colours of the classes are in ``labelmap.txt``."""
    write_images(tmp_path / "JPEGImages", "a.png")
    colors = np.zeros((2, HEIGHT, WIDTH, 3), np.uint8)
    colors[:, 5:20, 6:30] = [[[[128, 0, 0]]], [[[10, 20, 30]]]]
    colors[1, 5, 6] = 1  # most of the pixels decide
    for kind, pixels in zip(("SegmentationObject", "SegmentationClass"), colors, strict=True):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "a.png")
    label_map = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:10,20,30::\n"
    write(tmp_path / "labelmap.txt", label_map)
    content, _ = convert(tmp_path, tmp_path / "train.json")
    ((name, box, mask),) = objects(content)["a.png"]
    assert (name, box) == ("cat", [6, 5, 24, 15]) and mask_util.area(mask) == 24 * 15


def labelme(root, *shapes, **changes):
    write_images(root)
    shapes = shapes or (shape("rectangle", [[40, 38], [8, 6]]),)
    content = {"shapes": shapes, "imagePath": "..\\data\\a.png", "imageData": "x" * 99}
    content |= {"imageWidth": WIDTH, "imageHeight": HEIGHT} | changes
    write(root / "a.json", json.dumps({k: v for k, v in content.items() if v is not None}))


def shape(kind, points, label="dog", **more):
    return {"label": label, "shape_type": kind, "points": points, **more}


def test_labelme(tmp_path):
    png = io.BytesIO()
    Image.fromarray(np.full((3, 5), True)).save(png, "PNG")
    triangle = np.reshape(TRIANGLE, (-1, 2)).tolist()
    labelme(
        tmp_path,
        shape("rectangle", [[40, 38], [8, 6]], label="cat"),
        shape("polygon", triangle, group_id=1),
        shape("circle", [[50, 20], [50, 30]]),
        shape("polygon", [[50, 40], [60, 40], [60, 46]], group_id=1),
        shape("mask", [[4, 5], [8, 7]], mask=base64.b64encode(png.getvalue()).decode()),
        shape("line", [[0, 0], [9, 9]]),
        shape("polygon", triangle, label="__ignore__"),
    )
    content, lost = convert(tmp_path, tmp_path / "train.json")
    assert "shapes without an area (points, lines), left out: 1" in lost
    assert "shapes that are no objects by their label, left out: 1" in lost
    assert "whose rectangle is taken as the mask: 1" in lost
    cat, parts, circle, mask = objects(content)["a.png"]
    assert cat[:2] == ("cat", [8, 6, 32, 32]) and mask_util.area(cat[2]) == 1024
    assert parts[:2] == ("dog", [8, 6, 52, 40])
    assert [len(p) for p in content["annotations"][1]["segmentation"]] == [6, 6]
    assert circle[1] == pytest.approx([40, 10, 20, 20])
    assert content["annotations"][2]["area"] == pytest.approx(np.pi * 100, rel=0.03)
    expected = np.zeros((HEIGHT, WIDTH))
    expected[5:8, 4:9] = 1
    np.testing.assert_array_equal(mask_util.decode(mask[2]), expected)
    assert mask[1] == [4, 5, 5, 3]
    # As it is found again, with the result in the folder.
    assert convert(tmp_path, tmp_path / "train.json") == (content, lost)


def test_a_turned_photo(tmp_path):
    """Labels are of the photo as it is shown, as Detectron2 reads it."""
    yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(tmp_path / "images/b.jpg", exif=exif)
    content, _ = convert(tmp_path, tmp_path / "train.json", masks=False)
    assert [(i["width"], i["height"]) for i in content["images"]] == [SIZE, SIZE[::-1]]
    assert content["annotations"][1]["bbox"] == [18, 16, 12, 32]


# What makes a dataset; what is then put into a file (None: the file or folder is taken away); and
# the sentence.
BROKEN = [
    (yolo, "labels/a.txt", "0 0.5 0.5 0.5", "a.txt, line 1 is '0 0.5 0.5 0.5': .* 5 tokens"),
    (yolo, "labels/a.txt", f"{BOX}\nHELLO", "a.txt, line 2 is 'HELLO'"),
    (yolo, "labels/a.txt", "cat 0.5 0.5 0.5 0.5", "class id 'cat'"),
    (yolo, "labels/a.txt", "0 x 0.5 0.5 0.5", "could not convert string to float: 'x'"),
    (yolo, "labels/a.txt", "0 0.5 nan 0.5 0.5", "line 1 .*'nan'"),
    (yolo, "labels/a.txt", "0 0.5 0.5 -0.5 0.5", "line 1 .*'-0.5'"),
    (yolo, "labels/a.txt", "9e999 0.5 0.5 0.5 0.5", "line 1 "),
    (yolo, "labels/a.txt", f"{POLYGON} 0.5", "line 1 .*7 coordinates, but x and y come in pairs"),
    (yolo, "labels/a.txt", "0 24 12 16 24", "line 1 has the value 24; .*width, 64.*from 0 to 1"),
    (
        yolo,
        "labels/a.txt",
        f"\n1{BOX[1:]}",
        "line 2 has the class 1, which is none of 0, 3; .*data",
    ),
    (yolo, "labels/a.txt", b"\xff\xfe0", "a.txt is not text in UTF-8"),
    (yolo, "labels", None, "no image in .*images has a label file .*--images"),
    (yolo, "images", None, "there is no image in"),
    (yolo, "images/b.png", "", "b.jpg and b.png share one label file"),
    (yolo, "images/a.png", "<html>", "a.png cannot be read as an image"),
    (yolo, "data.yaml", "names: [cat, no]", "data.yaml names class 1 False.*quotes"),
    (yolo, "data.yaml", "names: cat", "data.yaml has the names 'cat'"),
    (yolo, "data.yaml", "{names", "data.yaml is not valid YAML"),
    (yolo, "data.yaml", "{names: [a], kpt_shape: 3}", "data.yaml has the kpt_shape 3"),
    (yolo, "data.yaml", None, "has no data.yaml with the names"),
    (yolo, "x.xml", "<annotation/>", "could be voc or yolo; name the format with --format"),
    (voc, "Annotations/a.xml", "<annotation><object>", "a.xml cannot be read as XML"),
    (voc, "Annotations/a.xml", "<!DOCTYPE x [<!ENTITY e 'e'>]><x>&e;</x>", "a.xml .*as XML"),
    (
        voc,
        "Annotations/a.xml",
        "<annotation/>",
        "there is no object in the label files of the 2 images",
    ),
    (
        voc,
        "Annotations/b.xml",
        "<a><filename>a.png</filename></a>",
        "b.xml names the image 'a.png'",
    ),
    (voc, "Annotations/b.xml", f"<a>{voc_object('x', (1, 2, 3, 'y'))}</a>", "object 1 .*'y'"),
    (voc, "Annotations/b.xml", f"<a>{voc_object('x', (90, 2, 95, 9))}</a>", "object 1 .*outside"),
    (
        voc,
        "Annotations/b.xml",
        f"<a>{voc_object('x', more='<polygon><x1>1</x1></polygon>')}</a>",
        "b.xml, object 1 cannot be read",
    ),
    (
        *(voc, "Annotations/b.xml", "<a><size><width>48</width><height>64</height></size></a>"),
        "b.xml is for an image of 48 x 64 pixels, but its image has 64 x 48 .*EXIF",
    ),
    (voc, "Annotations/a.xml", None, "holds no label files that are known; name the format"),
    (voc, "JPEGImages", None, "there is no image in .*JPEGImages; name the folder .*--images"),
    (voc, "SegmentationObject/a.png", np.eye(9), "a.png has 9 x 9 pixels, its image 64 x 48"),
    (voc, "SegmentationObject/a.png", np.full((48, 64), 2), "object 2, but the XML has 1 objects"),
    (
        voc,
        "SegmentationObject/a.png",
        np.eye(48, 64, 45),
        "object 1 has no pixel of its mask in its",
    ),
    (labelme, "a.json", '{"shapes": []}', "a.json is no file of LabelMe: .*imagePath"),
    (labelme, "a.json", '{"shapes": [', "a.json is no file of LabelMe"),
    (labelme, "b.json", '{"shapes": [{}], "imagePath": "b.jpg"}', r"b.json .*label.*shapes\[0\]"),
    (labelme, "b.json", '{"shapes": [], "imagePath": "a.png"}', "are both of .*a.png"),
    (
        labelme,
        "b.json",
        '{"shapes": [], "imagePath": "b.jpg", "imageWidth": 5, "imageHeight": 4}',
        "b.json is for an image of 5 x 4 pixels, but its image has 64 x 48 .*resized",
    ),
    *(
        (labelme, "b.json", json.dumps({"shapes": [bad], "imagePath": "b.jpg"}), sentence)
        for bad, sentence in (
            (shape("polygon", [[0, 0], [1, 1]]), r"b.json, shapes\[0\] \(dog\) is a polygon of 2"),
            (shape("mask", [[0, 0], [1, 1]], mask="AAAA"), "has a damaged mask"),
            (shape("polygon", [[0, 0], [1, "x"], [1, 1]]), "b.json .*float"),
        )
    ),
    (labelme, "a.png", None, "no object .*left out: 1 .*a.json"),
    (yolo, "data.yaml", "{names: [cat], train: [images]}", "has a list of images for train; name"),
]


@pytest.mark.parametrize("make, name, change, sentence", BROKEN)
def test_what_cannot_be_used_is_refused(tmp_path, make, name, change, sentence):
    root = tmp_path / "data"
    make(root)
    path = root / name
    path.parent.mkdir(exist_ok=True)
    if change is None and path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
    elif change is None:
        path.unlink()
    elif isinstance(change, np.ndarray):
        Image.fromarray(change.astype(np.uint8)).save(path)
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    message = refusal(TOOL, root, "--output", tmp_path / "train.json")
    assert re.search(sentence, message), message
    assert not (tmp_path / "train.json").exists()


def test_arguments(tmp_path):
    arguments = ["--output", tmp_path / "x.json"]
    assert "there is no nowhere" in refusal(TOOL, "nowhere", *arguments)
    write(tmp_path / "x.json", "{}")
    assert "needs --to yolo or voc" in refusal(TOOL, tmp_path / "x.json", *arguments)
    for split in ("train", "val"):
        write_images(tmp_path / "images" / split)
    write(tmp_path / "data.yaml", "names: [cat]")
    for folder, kind in ((tmp_path, "yolo"), (tmp_path / "images", "voc")):
        message = refusal(TOOL, folder, "--format", kind, *arguments)
        assert "has the splits train, val; choose one with --split" in message
    assert "no folder of images of the split 'test'" in refusal(
        TOOL, tmp_path, "--split", "test", *arguments
    )
    options = ["--to", "yolo", "--split", "train"]
    assert run_tool(TOOL, tmp_path / "x.json", *options, *arguments, check=False).returncode == 2
