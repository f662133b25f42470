"""A valid dataset with one random defect is read and scored, or refused in a sentence that names
it: no traceback, no hang. ``FUZZ_EXAMPLES=10000`` tries more, and other ones each time."""

import contextlib
import copy
import datetime
import io
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
from helpers import SQUARE_RLE, CocoFiles, config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import with_orientation
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect.data.coco import DataError, check_coco_json, load_coco
from gn_detect.data.loader import NamingDatasetMapper

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
# Messages that name no item, but files.
FILE = "nested too deeply|no visible keypoints|not text in UTF-8|cannot use the image|images?: "
DEEP = "nested"  # stands for lists in lists, which json.dumps cannot write

numbers = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 10, 63, 64, 65, 10**6, 2**31, 2**63, 2**64, 10**400]
    + [-0.0, 0.5, 1.5, 64.0, 1e-300, 1e9, 1e300, -1e300, float("nan"), float("inf")]
)
texts = st.sampled_from(
    ["", "1", "1.png", "x" * 300, "é\n", "\0", "\ud800", "$x_{", "../1.png", "/"]
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts | st.text(max_size=3))
values = st.one_of(
    scalars,
    st.just(DEEP),
    st.lists(scalars, max_size=5),
    st.lists(st.lists(numbers, max_size=8), max_size=3),
    st.dictionaries(st.sampled_from(["size", "counts", "id"]), scalars | st.lists(numbers)),
)


def base(root) -> dict:
    """Polygons, RLE of both kinds, a crowd, keypoints; three images on disk."""
    files = CocoFiles(root)
    content = files.content
    square = mask_util.frPyObjects(SQUARE_RLE, 64, 64)
    square = {"size": [64, 64], "counts": square["counts"].decode()}
    first = content["annotations"][0]
    content["annotations"] += [
        {**first, "id": 40, "segmentation": SQUARE_RLE},
        {**first, "id": 50, "segmentation": square},
        {**first, "id": 60, "segmentation": square, "iscrowd": 1},
    ]
    for annotation in content["annotations"]:
        annotation.update(keypoints=[8, 8, 2, 31, 31, 1], num_keypoints=2)
    for category in content["categories"]:
        category.update(supercategory="", keypoints=["a", "b"], skeleton=[[1, 2]])
    return content


KINDS = {  # of changes; some more often
    "images": ["key", "key", "exchange", "twice", "item", "list", "file"],
    "categories": ["key", "key", "exchange", "twice", "item", "list"],
    "annotations": [*["key"] * 4, *["mask"] * 3, "box", "exchange", "twice", "item", "list"],
}
BOXES = [
    lambda x, y, w, h: [x, y, x + w, y + h],
    lambda x, y, w, h: [x / 64, y / 64, w / 64, h / 64],
    lambda x, y, w, h: [y, x, h, w],
    lambda x, y, w, h: [x + 100, y + 100, w, h],
    lambda x, y, w, h: [x + w, y + h, -w, -h],
    lambda x, y, w, h: [x, y, 0, h],
]


@st.composite
def masks(draw):
    """A segmentation that is nearly right."""
    if draw(st.booleans()):
        polygon = [8, 8, 32, 8, 32, 32, 8, 32]
        kind = draw(st.integers(0, 3))
        if kind == 0:
            polygon = polygon[: draw(st.integers(0, 7))]
        elif kind == 1:
            polygon[draw(st.integers(0, 7))] = draw(numbers)
        elif kind == 2:
            polygon = [x * draw(st.sampled_from([1 / 64, -1, 10, 1e5, 1e12])) for x in polygon]
        return [polygon] if kind < 3 else [[8, 8], [32, 8], [32, 32]]
    counts = list(SQUARE_RLE["counts"])
    size = draw(st.sampled_from([[64, 64]] * 5 + [[64.0, 64], [63, 64], [0, 0], [-64, -64], [64]]))
    place = draw(st.integers(0, len(counts) - 1))
    if draw(st.booleans()):
        counts[place : place + draw(st.integers(0, 2))] = draw(st.lists(numbers, max_size=2))
        return {"size": size, "counts": counts}
    text = mask_util.frPyObjects(SQUARE_RLE, 64, 64)["counts"].decode()
    place = draw(st.integers(0, len(text)))
    more = draw(st.text(st.characters(min_codepoint=32, max_codepoint=130), max_size=3))
    return {"size": size, "counts": text[:place] + more + text[place + draw(st.integers(0, 3)) :]}


@st.composite
def changes(draw, content):
    """Change ``content`` in one place. Returns it, and how a message may name the place."""
    content = copy.deepcopy(content)
    group = draw(st.sampled_from(["images", "categories", *["annotations"] * 4]))
    items = content[group]
    index = draw(st.integers(0, len(items) - 1))
    item, before = items[index], copy.deepcopy(items[index])
    kind, every = draw(st.sampled_from(KINDS[group])), draw(st.booleans())
    if kind == "key":
        key = draw(st.sampled_from([*item, "ignore", "other"]))
        value = draw(st.just("deleted") | values)
        for changed in items if every else [item]:
            changed[key] = value
            if value == "deleted":
                del changed[key]
    elif kind == "box":
        transform = draw(st.sampled_from(BOXES))
        for changed in items if every else [item]:
            changed["bbox"] = transform(*changed["bbox"])
    elif kind == "mask":
        item["segmentation"] = draw(masks())
    elif kind == "exchange":
        key = draw(st.sampled_from([k for k in item if "id" in k]))
        other = draw(st.sampled_from(items))
        item[key], other[key] = other[key], item[key]
    elif kind == "twice":
        items += [copy.deepcopy(item)] * draw(st.integers(1, 3))
    elif kind == "item":
        items[index] = item = draw(values)
    elif kind == "list":
        content[group] = draw(values)
        return content, ["images", "categories", "annotations"]
    else:
        return draw(values), ["images"]
    word = {"images": "image", "categories": "category", "annotations": "annotation"}[group]
    ids = [i["id"] for i in (before, item) if isinstance(i, dict) and "id" in i]
    ids = json.loads(json.dumps(ids), parse_constant=lambda _: None)  # NaN is read as null
    places = [f"{group}[", f"{word} "] if every else [f"{group}[{index}]", f"id of one {word}"]
    places += [text for i in ids for text in (f"{word} {i!r}", f"{word} id {i!r}")]
    return content, [*places, f"{word} ids", "the first", "'categories'"]


@st.composite
def damage(draw, text):
    """The bytes of a file, as they should not be."""
    data = text.encode()
    place, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 20))
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return data[:place]
    if kind == 1:
        codecs = ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "utf-7"]
        return text.replace("dog", "Hündin").encode(draw(st.sampled_from(codecs)))
    if kind == 2:
        return data[:place] + draw(st.binary(max_size=4)) + data[place + length :]
    if kind == 3:
        flipped = bytes([data[place] ^ 1 << draw(st.integers(0, 7))])
        return data[:place] + flipped + data[place + 1 :]
    return draw(st.binary(max_size=8)) * length


@st.composite
def damaged_images(draw):
    """What is done to an image on disk."""
    kind = draw(st.integers(0, 6))
    if kind < 2:
        size = (64, 64) if kind else draw(st.sampled_from([(64, 32), (1, 1), (65, 64)]))
        mode = draw(st.sampled_from(["L", "1", "P", "RGBA", "I;16", "I", "F", "CMYK", "LA"]))
        return lambda path: Image.new(mode, size).save(path, "TIFF")
    if kind == 2:
        exif = with_orientation(draw(st.integers(0, 9)))
        return lambda path: Image.new("RGB", (64, 64)).save(path, "JPEG", exif=exif)
    if kind == 3:
        return lambda path: (path.unlink(), path.mkdir())
    if kind == 4:
        return lambda path: (path.unlink(), path.symlink_to("nowhere"))
    place, data = draw(st.floats(0, 1)), draw(st.sampled_from([b"", b"<html>", b"\0" * 9, b"\xff"]))

    def overwrite(path):
        content = path.read_bytes()
        at = int(place * len(content))
        path.write_bytes(content[:at] + data + (content[at + len(data) :] if kind == 6 else b""))

    return overwrite


TASKS = {  # the config of each
    "bbox": "COCO-Detection/faster_rcnn_R_50_FPN_gn_3x.yaml",
    "segm": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml",
    "keypoints": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.yaml",
}
_numbers = itertools.count()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A directory, the content of a valid file, and the mapper of each task."""
    root = tmp_path_factory.mktemp("fuzz")
    options = ("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MASK_FORMAT", "bitmask")
    options += ("INPUT.RANDOM_FLIP", "none")
    mappers = {task: NamingDatasetMapper(config(name, *options)) for task, name in TASKS.items()}
    return root, base(root / "base"), mappers


def use(json_file, image_root, task, mapper) -> float:
    """What a training and an evaluation do with a file that has passed the check. Returns the AP of
    the true objects as detections; -1 where there is none."""
    data = load_coco(str(json_file))
    for image in data.dicts(str(image_root)):
        mapper(image)
    if not data.has_annotations:
        return -1
    truth = COCO()
    truth.dataset = data.ground_truth()
    truth.createIndex()
    objects = [a for a in truth.dataset["annotations"] if not a["iscrowd"]]
    found = [{**a, "score": 1.0} for a in copy.deepcopy(objects)]
    for detection in found if task == "segm" else ():
        mask = truth.annToMask(detection)
        detection["segmentation"] = mask_util.encode(np.asfortranarray(mask))
    evaluation = COCOeval(truth, truth.loadRes(found), task)
    evaluation.params.kpt_oks_sigmas = np.full(data.keypoints.shape[1] // 3, 0.1)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 300,
    database=None,
    deadline=datetime.timedelta(seconds=5),
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_one_defect(setting, data):
    root, content, mappers = setting
    task = data.draw(st.sampled_from(["bbox", "segm", "segm", "keypoints"]), label="task")
    names = ("training", "evaluation", "box_format")
    needs = {name: data.draw(st.booleans(), label=name) for name in names}
    needs |= {"masks": task == "segm", "keypoints": task == "keypoints"}
    directory = root / str(next(_numbers))
    directory.mkdir()
    image_root = root / "base/images"
    kind = data.draw(st.sampled_from(["change"] * 4 + ["damage", "image"]), label="kind")
    if kind == "change":
        content, places = data.draw(changes(content), label="content")
    text = json.dumps(content).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)
    encoded = data.draw(damage(text), label="bytes") if kind == "damage" else text.encode()
    json_file = directory / "data.json"
    json_file.write_bytes(encoded)
    if kind == "image":
        change = data.draw(damaged_images())
        image_root = shutil.copytree(image_root, directory / "images")
        change(image_root / "2.png")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            summary = check_coco_json(str(json_file), str(image_root), **needs)
            scored = task if needs["evaluation"] else "bbox"
            ap = use(json_file, image_root, scored, mappers[task])
        # What is mended is right; what cannot be is said.
        said = re.search("degenerate|boxes|left out", " ".join(summary.warnings))
        assert ap == -1 or ap > 0.99 or said
    except DataError as error:
        message = str(error)
        assert str(json_file) in message or "cannot use the image" in message
        if kind == "change" and not re.search(FILE, message):
            assert any(place in message for place in places)
    finally:
        shutil.rmtree(directory)
