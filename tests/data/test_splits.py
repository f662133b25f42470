"""One COCO file split in two, and two that have something in common."""

import json
import logging
import re

import numpy as np
import pytest
from helpers import CocoFiles

from gn_detect.data.coco import DataError, load_coco
from gn_detect.data.splits import describe_overlap, split_coco, validation_images


def write(path, objects, names=None):
    """A COCO JSON of images with these classes of objects; returns its path."""
    images = [
        {
            "id": f"image {i}",
            "file_name": names[i] if names else f"{i}.jpg",
            "height": 9,
            "width": 9,
        }
        for i in range(len(objects))
    ]
    annotations = [
        {"id": f"{i}/{k}", "image_id": f"image {i}", "category_id": k, "bbox": [1, 1, 4, 4], "a": 1}
        for i, classes in enumerate(objects)
        for k in classes
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in range(4)]
    content = {"info": {"x": 1}, "images": images, "categories": categories}
    path.write_text(json.dumps({**content, "annotations": annotations}))
    return str(path)


def chosen(path, *args):
    data = load_coco(path)
    which = validation_images(data, *args)
    return {name for name, val in zip(data.file_names, which, strict=True) if val}


@pytest.fixture
def objects():
    """Of 200 images: a common class, a rarer one, two rare ones, and images without any."""
    rng = np.random.default_rng(0)
    rates = {0: 0.9, 1: 0.2, 2: 0.03}
    found = [{k for k, rate in rates.items() if rng.random() < rate} for _ in range(200)]
    return [*found, {3}, {3, 0}]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_each_class_is_split_in_that_proportion(objects, tmp_path, fraction):
    val = chosen(write(tmp_path / "a.json", objects), fraction)
    groups = [[i for i, found in enumerate(objects) if k in found] for k in range(4)]
    groups.append([i for i, found in enumerate(objects) if not found])
    for group in [*groups, range(len(objects))]:
        taken = sum(f"{i}.jpg" in val for i in group)
        assert 1 <= taken < len(group) and abs(taken - fraction * len(group)) <= 3


def test_the_choice_depends_on_the_seed_and_not_on_the_order(objects, tmp_path):
    first = write(tmp_path / "a.json", objects)
    assert chosen(first, 0.2) == chosen(first, 0.2, 0) != chosen(first, 0.2, 1)
    order = np.random.default_rng(1).permutation(len(objects))
    names = [f"{i}.jpg" for i in order]
    second = write(tmp_path / "b.json", [objects[i] for i in order], names)
    assert chosen(first, 0.2) == chosen(second, 0.2)


def test_a_picture_that_is_listed_twice_is_in_one_part(tmp_path):
    names = [f"{i // 2}.jpg" if i % 2 else f"./{i // 2}.jpg" for i in range(40)]
    data = load_coco(write(tmp_path / "a.json", [{0}] * 40, names))
    pairs = dict(zip(data.file_names, validation_images(data, 0.4), strict=True))
    assert all(pairs[f"{i}.jpg"] == pairs[f"./{i}.jpg"] for i in range(20))
    assert sum(pairs.values()) == 16


@pytest.mark.parametrize(
    "objects",
    [
        [{0}, {1}],  # each class once
        [set(), set()],
        [{0, 1}, {0, 1}, {1}],
        [{0, 1}, {0, 2}, {1, 2}, {0}],
        [{1, 2, 3}, {0, 1, 2, 3}, {1, 2}, {0, 2, 3}, {0, 3}],
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_both_parts_have_what_they_can(objects, tmp_path, seed):
    val = chosen(write(tmp_path / "a.json", objects), 0.2, seed)
    parts = [[x for i, x in enumerate(objects) if (f"{i}.jpg" in val) == p] for p in (False, True)]
    assert all(parts)
    for k in range(4):
        if sum(k in found for found in objects) > 1:
            assert all(any(k in found for found in part) for part in parts)


def test_records_stay_as_they_are(objects, tmp_path, caplog):
    caplog.set_level(logging.INFO, "gn_detect")
    source = write(tmp_path / "a.json", objects)
    parts = split_coco(source, str(tmp_path / "split"), 0.2)
    whole, train, val = (json.loads(open(path).read()) for path in (source, *parts))
    for key in ("images", "annotations"):
        both = train[key] + val[key]
        assert sorted(both, key=str) == sorted(whole[key], key=str)
        assert train[key] == [record for record in whole[key] if record in train[key]]  # in order
    for part in (train, val):
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}
        assert (part["info"], part["categories"]) == (whole["info"], whole["categories"])
    counts = f"train.json with {len(train['images'])} images, {len(train['annotations'])} objects"
    assert counts in caplog.text and "class 3 1 + 1" in caplog.text
    assert split_coco(source, str(tmp_path / "split"), 0.5, keep=True) == parts
    assert json.loads(open(parts[1]).read()) == val
    split_coco(source, str(tmp_path / "split"), 0.5)
    assert len(json.loads(open(parts[1]).read())["images"]) > 90


def test_what_only_json_of_others_has(tmp_path, caplog):
    """A mark of the encoding, NaN, ids as floats, and an annotation of no image."""
    path = write(tmp_path / "a.json", [{0}] * 5 + [{1}])
    content = json.loads(open(path).read())
    for number, (image, annotation) in enumerate(
        zip(content["images"], content["annotations"], strict=True)
    ):
        image["id"], annotation["image_id"] = float(number), number
        annotation["score"] = float("nan")
    content["annotations"].append({**content["annotations"][0], "image_id": 77})
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    parts = [load_coco(p) for p in split_coco(path, str(tmp_path / "split"), 0.4)]
    assert [len(part.image_ids) for part in parts] == [4, 2]
    assert [part.unknown_images[0] for part in parts] == [1, 0]
    assert "the val part has no object of the classes class 1" in caplog.text


def test_one_picture_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.json", [{0}, {1}], ["x.jpg", "./x.jpg"])
    with pytest.raises(DataError, match=re.escape(f"{path} has one picture, x.jpg")):
        split_coco(path, str(tmp_path / "split"), 0.2)


def test_what_is_trained_and_evaluated_on(tmp_path):
    a, b = CocoFiles(tmp_path / "a"), CocoFiles(tmp_path / "b")  # of the same pixels

    def overlap():
        return describe_overlap(*((str(x.json_file), str(x.image_root)) for x in (a, b)))

    text = overlap()
    assert "3 of 3 images" in text and f"the first: {b.image_root}/1.png is {a.image_root}" in text
    for number in (1, 3):  # of the same size
        path = b.image_root / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "1 of 3 images" in overlap() and "2.png is" in overlap()
    (b.image_root / "2.png").write_bytes(b"another size")
    assert overlap() == ""
    b.image_root = a.image_root / "../images"
    b.content["images"][1]["file_name"] = "./2.png"
    b.content["images"] = b.content["images"][1:2]
    b.write()
    assert "1 of the 1 images" in overlap() and f"the first: {a.image_root}/2.png" in overlap()
    b.json_file = a.json_file
    assert "is both trained and evaluated on" in overlap()
