"""Every kind of bad data, by the sentence that it gets."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import config

from gn_detect.data.coco import (
    DataError,
    check_coco_dataset,
    check_coco_json,
    register_coco_json,
)
from gn_detect.data.loader import NamingDatasetMapper

ALL = {"masks": True, "training": True, "evaluation": True}


def check(files, **kwargs):
    return check_coco_json(str(files.json_file), str(files.image_root), **{**ALL, **kwargs})


def refusal(files, **kwargs) -> str:
    files.write()
    with pytest.raises(DataError) as error:
        check(files, **kwargs)
    assert str(files.json_file) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_good_data(coco_files):
    summary = check(coco_files)
    assert list(summary.classes.items()) == [(3, "dog"), (7, "cat")]  # by id, as Detectron2 orders
    assert (summary.num_images, summary.num_annotations, summary.has_rle) == (3, 3, False)


def test_classes_and_boxes_are_those_that_detectron2_loads(coco_files):
    register_coco_json("test_own", str(coco_files.json_file), str(coco_files.image_root))
    dicts = DatasetCatalog.get("test_own")
    assert MetadataCatalog.get("test_own").thing_classes == list(check(coco_files).classes.values())
    assert [d["annotations"][0]["category_id"] for d in dicts] == [0, 1, 0]  # ids 3, 7, 3
    assert check_coco_dataset("test_own", **ALL) == check(coco_files)


def test_missing_json(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*absent\.json: No such file"):
        check_coco_json(str(tmp_path / "absent.json"), "x", **ALL)


def test_truncated_json(coco_files):
    text = coco_files.json_file.read_text()
    coco_files.json_file.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"annotations\.json is not valid JSON .*truncated"):
        check(coco_files)


@pytest.mark.parametrize("content", [[], {"images": [], "annotations": []}])
def test_not_coco_format(coco_files, content):
    coco_files.content = content
    assert "not in COCO format: it has no list" in refusal(coco_files)


def test_absent_images_are_counted(coco_files):
    (coco_files.image_root / "2.png").unlink()
    (coco_files.image_root / "3.png").unlink()
    assert "2 of the 3 images" in (message := refusal(coco_files))
    assert message.endswith("the first: 2.png")


def test_absent_image_directory(coco_files):
    with pytest.raises(DataError, match="image directory nowhere .* does not exist"):
        check_coco_json(str(coco_files.json_file), "nowhere", **ALL)


@pytest.mark.parametrize("list_name", ["images", "categories"])
def test_empty_dataset(coco_files, list_name):
    coco_files.content[list_name] = []
    assert f"no {list_name}" in refusal(coco_files)


def test_no_usable_annotation(coco_files):
    for annotation in coco_files.content["annotations"]:
        annotation["iscrowd"] = 1
    assert "no annotation of an object" in refusal(coco_files)


def test_undeclared_category(coco_files):
    coco_files.content["annotations"][1]["category_id"] = 4
    message = refusal(coco_files)
    assert "annotation 20 (image 2.png) has category_id 4" in message
    assert "declares 3, 7" in message


@pytest.mark.parametrize("segmentation", [None, []])
def test_no_segmentation(coco_files, segmentation):
    coco_files.content["annotations"][1]["segmentation"] = segmentation
    message = refusal(coco_files)
    assert "annotation 20 (image 2.png) has no segmentation" in message
    assert "MODEL.MASK_ON False" in message
    assert check(coco_files, masks=False).num_annotations == 3


@pytest.mark.parametrize(
    "segmentation", [[1, 2, 3, 4, 5, 6], {"counts": [1]}, "x", [[1, 2, 3, 4, 5, float("nan")]]]
)
def test_malformed_segmentation(coco_files, segmentation):
    coco_files.content["annotations"][1]["segmentation"] = segmentation
    assert "neither a list of polygons nor RLE" in refusal(coco_files)


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, "4"]])
def test_malformed_box(coco_files, bbox):
    coco_files.content["annotations"][2]["bbox"] = bbox
    assert "annotation 30 (image 3.png) has the bbox" in refusal(coco_files)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_what_only_the_evaluation_needs(coco_files, key):
    del coco_files.content["annotations"][0][key]
    assert f"has no '{key}'" in refusal(coco_files)
    assert check(coco_files, evaluation=False).num_annotations == 3


def test_duplicate_ids(coco_files):
    coco_files.content["annotations"][1]["id"] = 10
    assert "annotation 10" in refusal(coco_files)
    coco_files.content["categories"][1]["id"] = 7
    assert "category id 7 twice" in refusal(coco_files)
    coco_files.content["images"][1]["id"] = 1
    coco_files.content["categories"][1]["id"] = 3
    assert "image id 1 twice" in refusal(coco_files)


@pytest.mark.parametrize("list_name, key", [("images", "height"), ("categories", "name")])
def test_missing_keys(coco_files, list_name, key):
    del coco_files.content[list_name][0][key]
    assert f"'{key}'" in refusal(coco_files)


def test_rle_of_another_size_than_the_image(coco_files):
    coco_files.content["annotations"][1]["segmentation"] = {"size": [64, 63], "counts": [4032]}
    message = refusal(coco_files)
    assert "annotation 20 (image 2.png) has an RLE of [64, 63] pixels" in message
    assert "[64, 64]" in message


def test_masks_that_pycocotools_could_not_score(coco_files):
    coco_files.content["annotations"][0]["segmentation"].insert(0, [1, 2])
    assert "first polygon of fewer than 3 points" in refusal(coco_files)
    assert check(coco_files, evaluation=False).num_annotations == 3
    crowd = {**coco_files.content["annotations"][0], "id": 99, "iscrowd": 1, "segmentation": None}
    coco_files.content["annotations"] = [*coco_files.content["annotations"][1:], crowd]
    assert "annotation 99 (image 1.png) has no segmentation" in refusal(coco_files)
    assert check(coco_files, evaluation=False).num_annotations == 2


def test_test_sets_have_no_annotations(coco_files):
    del coco_files.content["annotations"]
    assert "no list 'annotations'" in refusal(coco_files)
    summary = check(coco_files, training=False)
    assert (summary.num_images, summary.num_annotations) == (3, 0)


def test_crowd_regions_are_not_trained_on(shared_data):
    root = shared_data / "coco_dev"
    annotations = json.loads((root / "train.json").read_text())["annotations"]
    crowds = [a["image_id"] for a in annotations if a["iscrowd"]]
    register_coco_json("test_crowd", str(root / "train.json"), str(root / "images"))
    summary = check_coco_dataset("test_crowd", **ALL)
    dicts = DatasetCatalog.get("test_crowd")
    assert summary.num_annotations == len(annotations) - len(crowds) < len(annotations)
    cfg = config()
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = NamingDatasetMapper(cfg, is_train=True)
    for record in (d for d in dicts if d["image_id"] in crowds):
        objects = [a for a in record["annotations"] if not a["iscrowd"]]
        assert len(objects) < len(record["annotations"])
        assert len(mapper(record)["instances"]) == len(objects)


def test_degenerate_annotations_are_counted_and_dropped(coco_files, caplog):
    coco_files.content["annotations"][0]["bbox"][2] = 0
    coco_files.content["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    coco_files.write()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        summary = check(coco_files, evaluation=False)
    assert summary.num_annotations == 1
    (record,) = caplog.records
    assert "annotations.json: 2 degenerate annotations; as training data they are dropped" in (
        record.message
    )
    assert "1 with a box of zero area, the first: annotation 10 (image 1.png)" in record.message
    assert "polygons of fewer than 3 points, the first: annotation 20" in record.message

    # And so it is: Detectron2's loader and mapper leave one object of the three.
    register_coco_json("test_degenerate", str(coco_files.json_file), str(coco_files.image_root))
    mapper = NamingDatasetMapper(config(), is_train=True)
    counts = [len(mapper(d)["instances"]) for d in DatasetCatalog.get("test_degenerate")]
    assert counts == [0, 0, 1]


def test_unregistered_dataset():
    with pytest.raises(DataError, match="'nothing', which is not registered.*--train-json"):
        check_coco_dataset("nothing", **ALL)
