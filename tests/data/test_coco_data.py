"""The canonical form of COCO files, against Detectron2's loader."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances
from helpers import SHARED_DATA, SQUARE_RLE

from gn_detect.data import coco
from gn_detect.data.coco import load_coco, read_canonical, register_coco_json
from gn_detect.data.coco_data import CocoData


def plain(value):
    """Arrays as lists, bytes as text: to compare dicts with those of Detectron2."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [plain(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value


def assert_same_dicts(json_file, root="root"):
    data = load_coco(str(json_file))
    expected = plain(load_coco_json(str(json_file), root, "reference"))
    assert plain(data.dicts(root)) == expected
    metadata = MetadataCatalog.get("reference")
    assert list(data.classes.values()) == metadata.thing_classes
    MetadataCatalog.remove("reference")


@pytest.fixture
def mixed(coco_files):
    """A file with every kind of mask, and keypoints."""
    first, second, third = coco_files.content["annotations"]
    first["segmentation"].append([1, 1, 2, 2])  # dropped
    second["segmentation"] = SQUARE_RLE
    third["segmentation"].append([40.5, 40, 50, 40.25, 45, 50])
    for k, annotation in enumerate((first, second, third)):
        annotation["keypoints"] = [9 + k, 9, 2, 0, 0, 0, 20, 20.5, 1]
    crowd = {**second, "id": 40, "iscrowd": 1, "image_id": 3, "keypoints": [0] * 9}
    coco_files.content["annotations"].insert(0, crowd)  # not in the order of the images
    coco_files.write()
    return coco_files


def test_dicts_are_those_of_detectron2(mixed):
    assert_same_dicts(mixed.json_file)
    if not SHARED_DATA.is_dir():
        pytest.skip(f"there is no {SHARED_DATA}")
    for path in ("coco_dev/train.json", "nuclei_dsb2018/val.json"):
        assert_same_dicts(SHARED_DATA / path)


@pytest.mark.parametrize("filter_empty", [True, False])
@pytest.mark.parametrize("min_keypoints", [0, 2, 3])
def test_the_images_of_an_epoch_are_those_that_detectron2_keeps(mixed, filter_empty, min_keypoints):
    for i, annotation in enumerate(mixed.content["annotations"]):
        annotation["keypoints"][2::3] = [2, 0, i % 2]
    empty = {"id": 4, "file_name": "4.png", "height": 64, "width": 64}
    crowded = {**empty, "id": 5, "file_name": "5.png"}
    mixed.content["images"] += [empty, crowded]
    mixed.content["annotations"].append({**mixed.content["annotations"][0], "id": 9, "image_id": 5})
    mixed.write()
    register_coco_json("epoch", str(mixed.json_file), str(mixed.image_root))
    options = {"filter_empty": filter_empty, "min_keypoints": min_keypoints}
    expected = len(get_detection_dataset_dicts("epoch", **options))
    assert load_coco(str(mixed.json_file)).num_trained(**options) == expected


def test_packed_form_is_the_same(mixed, tmp_path, monkeypatch):
    data = load_coco(str(mixed.json_file))
    data.save(str(tmp_path / "packed"), "now")
    loaded = CocoData.load(str(tmp_path / "packed"), "now")
    assert CocoData.load(str(tmp_path / "packed"), "later") is None
    assert plain(loaded.dicts("root")) == plain(data.dicts("root"))
    assert plain(loaded.ground_truth()) == plain(data.ground_truth())

    # Large files: parsed once, whatever process asks; again where the packed form is damaged, or
    # the file has changed.
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(coco, "_LARGE", 0)
    parsed = []
    read = coco.read_coco
    monkeypatch.setattr(coco, "read_coco", lambda name: parsed.append(name) or read(name))
    for damage, times in ((None, 1), (None, 1), (0, 2), (None, 2), (-50, 3)):
        coco._loaded.clear()
        if damage is not None:
            (packed,) = (tmp_path / "cache/gn_detect/coco").iterdir()
            packed.write_bytes(packed.read_bytes()[:damage] + b"x" * -damage)
        assert plain(load_coco(str(mixed.json_file)).dicts("root")) == plain(data.dicts("root"))
        assert len(parsed) == times
    mixed.content["categories"][0]["name"] = "lynx"
    mixed.write()
    assert "lynx" in load_coco(str(mixed.json_file)).classes.values()


def test_numbers_may_be_written_with_a_point(coco_files):
    before = plain(load_coco(str(coco_files.json_file)).dicts("root"))
    for image in coco_files.content["images"]:
        image.update(id=float(image["id"]), height=64.0, width=64.0)
    for category in coco_files.content["categories"]:
        category["id"] = float(category["id"])
    for annotation in coco_files.content["annotations"]:
        annotation.update(iscrowd=0.0, category_id=float(annotation["category_id"]))
    coco_files.json_file.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco_files.content).encode())
    after = plain(load_coco(str(coco_files.json_file)).dicts("root"))
    assert repr(after) == repr(before)  # ints are ints


def test_what_detectron2_reads_from_a_file_is_read_so(coco_files):
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    expected = plain(DatasetCatalog.get("own"))
    for annotation in coco_files.content["annotations"]:
        annotation["id"] = 1  # which Detectron2's loader refuses
    coco_files.write()
    DatasetCatalog.remove("own")
    MetadataCatalog.remove("own")
    register_coco_instances("own", {}, str(coco_files.json_file), str(coco_files.image_root))
    read_canonical("own", "own", "nothing")
    assert plain(DatasetCatalog.get("own")) == expected
