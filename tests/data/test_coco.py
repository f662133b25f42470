"""Every kind of bad data, by the sentence that it gets."""

import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers import config

from gn_detect.data.coco import DataError, check_coco_dataset, check_coco_json, register_coco_json
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


def trained_objects(files) -> list[int]:
    """How many objects of each image Detectron2's loader and mapper leave."""
    register_coco_json("own", str(files.json_file), str(files.image_root))
    mapper = NamingDatasetMapper(config(), is_train=True)
    return [len(mapper(image)["instances"]) for image in DatasetCatalog.get("own")]


def test_classes_are_those_that_detectron2_loads(coco_files):
    summary = check(coco_files)
    assert list(summary.classes.items()) == [(3, "dog"), (7, "cat")]  # by id
    assert (summary.num_images, summary.num_annotations, summary.has_rle) == (3, 3, False)
    assert str(summary) == "3 images, 3 annotations"
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    dicts = DatasetCatalog.get("own")
    assert MetadataCatalog.get("own").thing_classes == list(summary.classes.values())
    assert [d["annotations"][0]["category_id"] for d in dicts] == [0, 1, 0]  # ids 3, 7, 3
    assert check_coco_dataset("own", **ALL) == summary


def test_categories_that_change_during_a_run(coco_files):
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    DatasetCatalog.get("own")
    coco_files.content["categories"][0]["name"] = "another"
    coco_files.write()
    with pytest.raises(DataError, match="json: its categories were changed"):
        DatasetCatalog.get("own")


def test_files_that_are_absent_or_truncated(coco_files):
    with pytest.raises(DataError, match="image directory nowhere .* does not exist"):
        check_coco_json(str(coco_files.json_file), "nowhere", **ALL)
    for name in ("2.png", "3.png"):
        (coco_files.image_root / name).unlink()
    message = refusal(coco_files)
    assert "2 of the 3 images" in message and message.endswith("the first: '2.png'")
    text = coco_files.json_file.read_text()
    coco_files.content = []
    assert "not in COCO format" in refusal(coco_files)
    coco_files.json_file.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"annotations\.json is not valid JSON .*truncated"):
        check(coco_files)
    coco_files.json_file.unlink()
    with pytest.raises(DataError, match=r"cannot read .*annotations\.json: No such file"):
        check(coco_files)


# What is put into (a list, the number of an item, its key), in place of what is there; and the
# sentence. Annotation 20 is of image 2. (More, wherever a file is read: test_cases.py.)
REFUSED = [
    (("images",), [], "lists no images"),
    (("images",), None, "not in COCO format: it has no list 'images'"),
    (("images", 1, "id"), 1, "image id 1 twice"),
    (("images", 0), {"id": 1, "file_name": "1.png", "width": 64}, "'height'"),
    (("categories",), [], "declares no categories"),
    (("categories", 0, "id"), 3, "category id 3 twice"),
    (("categories", 0), {"id": 7}, "'name'"),
    (("annotations",), None, "not in COCO format: it has no list 'annotations'"),
    (("images", 1, "id"), 1.5, "the id of one image is 1.5"),
    (("images", 1, "id"), True, "image True (2.png) has the id True; it must be a number or text"),
    (("images", 1, "width"), "64", "image 2 (2.png) has the width '64' (text); it must be a whole"),
    (("images", 1, "width"), 64.5, "image 2 (2.png) has the width 64.5 (a number); it must be a w"),
    (("images", 1, "height"), 0, "image 2 (2.png) has the height 0 (a number)"),
    (("annotations", 1, "iscrowd"), 2, "annotation 20 (image 2.png) has the iscrowd 2 (a number)"),
    (("annotations", 1), 5, "annotations[1] is 5 (a number); it must be an object"),
    *(
        (("annotations", 2, "bbox"), box, "annotation 30 (image 3.png) has the bbox")
        for box in (None, [1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, "4"])
    ),
    (("annotations", 1, "ignore"), 1, "has 'ignore', which"),
]


@pytest.mark.parametrize("place, value, sentence", REFUSED)
def test_what_cannot_be_used_is_refused(coco_files, place, value, sentence):
    node = coco_files.content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert sentence in refusal(coco_files)


def test_boxes_alone_need_no_segmentation(coco_files):
    coco_files.content["annotations"][1]["segmentation"] = []
    coco_files.write()
    assert check(coco_files, masks=False).num_annotations == 3


def test_what_only_the_evaluation_needs(coco_files):
    first = coco_files.content["annotations"][0]
    crowd = {**first, "id": 99, "iscrowd": 1, "segmentation": None}
    coco_files.content["annotations"].append(crowd)
    assert "annotation 99 (image 1.png) has no segmentation" in refusal(coco_files)
    check(coco_files, evaluation=False)
    first["segmentation"] = crowd["segmentation"] = [[8, 8, 32, 8]]
    assert "fewer than 3 points, which cannot be scored" in refusal(coco_files)
    check(coco_files, evaluation=False)


def test_test_sets_have_no_annotations(coco_files):
    del coco_files.content["annotations"]
    assert "no list 'annotations'" in refusal(coco_files)
    assert str(check(coco_files, training=False)) == "3 images, 0 annotations"
    coco_files.content["annotations"] = []
    assert "an empty list of annotations" in refusal(coco_files, training=False)


def test_crowd_regions_are_counted_and_not_trained_on(coco_files):
    rle = {"size": [64, 64], "counts": [9, 4087]}
    annotations = coco_files.content["annotations"]
    annotations.append({**annotations[0], "id": 11, "iscrowd": 1, "segmentation": rle})
    coco_files.write()
    summary = check(coco_files)
    assert str(summary) == "3 images, 4 annotations (1 of them crowds, which are not trained on)"
    assert not summary.has_rle  # of an object
    assert trained_objects(coco_files) == [1, 1, 1]
    coco_files.content["annotations"] = annotations[3:]
    assert "no annotation of an object" in refusal(coco_files)


def test_degenerate_annotations_are_counted_and_dropped(coco_files, caplog):
    first, second, third = coco_files.content["annotations"]
    first["bbox"][2] = 0
    second["segmentation"] = [[1, 2, 3, 4]]
    third["segmentation"].append([1, 2, 3, 4])
    coco_files.write()
    with caplog.at_level(logging.WARNING, "gn_detect"):
        check(coco_files, evaluation=False)
    short, record = caplog.records
    assert short.message.endswith("polygons of fewer than 3 points are left out (2)")
    for part in (
        "annotations.json: degenerate annotations; as training data they are dropped",
        "1 with a box of zero area, the first: annotation 10 (image 1.png)",
        "1 with only polygons of fewer than 3 points, the first: annotation 20 (image 2.png)",
    ):
        assert part in record.message
    assert trained_objects(coco_files) == [0, 0, 1]
    coco_files.content["annotations"] = [first, second]
    assert "no annotation of an object" in refusal(coco_files, evaluation=False)


def test_files_of_another_name_are_said(coco_files):
    coco_files.content["images"][0]["file_name"] = "1.PNG"
    coco_files.write()
    (warning,) = check(coco_files, exact_names=False).warnings
    assert "the first: '1.PNG'" in warning and warning.endswith("and taken")


def test_what_is_listed_twice_is_counted(coco_files):
    images, annotations = (coco_files.content[key] for key in ("images", "annotations"))
    images.append({**images[0], "id": 9})
    annotations.append({**annotations[1], "id": 99, "segmentation": [[9, 9, 30, 9, 30, 30]]})
    coco_files.write()
    objects, again = check(coco_files).warnings
    assert objects.startswith("1 annotations have the image, class and box of another one, the ")
    assert "first: annotation 99 (image 2.png)" in objects
    assert again.startswith("1 images are listed again with another id, the first: 1.png")


def test_others_of_the_kind_are_counted(coco_files):
    for annotation in coco_files.content["annotations"]:
        annotation["ignore"] = 1
    assert "delete it (and 2 other annotations)" in refusal(coco_files)
    for image in coco_files.content["images"]:
        image["width"] = "64"
    assert "it must be a whole number of pixels (and 2 other images)" in refusal(coco_files)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("{}".encode("utf-16"), "is text in UTF-16 or UTF-32; save it as UTF-8"),
        ("{}".encode("utf-32"), "is text in UTF-16 or UTF-32; save it as UTF-8"),
        ("{}".encode("utf-16-le"), "is text in UTF-16 or UTF-32; save it as UTF-8"),
        ('{"images": [{"file_name": "é"}]}'.encode("latin-1"), "is not text in UTF-8"),
        ('{"images": é}'.encode("latin-1"), "is not text in UTF-8"),
        (b"", "is not valid JSON"),
        (b"<html>", "is not valid JSON"),
        (b'{"images": ' + b"[" * 100000, "nested too deeply"),
        (b'{"images": ' + b"[" * 100000 + b"NaN", "nested too deeply"),
        (b"[]", "is not in COCO format: it is no object"),
        (b"7", "is not in COCO format: it is no object"),
    ],
)
def test_files_of_another_kind(coco_files, content, sentence):
    coco_files.json_file.write_bytes(content)
    with pytest.raises(DataError) as error:
        check(coco_files)
    assert sentence in str(error.value) and str(coco_files.json_file) in str(error.value)


def test_annotations_of_unknown_images(coco_files):
    first, *rest = coco_files.content["annotations"]
    first["image_id"] = "1"
    coco_files.write()
    (warning,) = check(coco_files).warnings
    assert warning == (
        "of 3 annotations 1 are of no image that the file lists (annotation 10, with the image_id "
        "'1' (text)): left out"
    )
    assert trained_objects(coco_files) == [0, 1, 1]
    for annotation in rest:
        annotation["image_id"] = "2"
    assert "of its 3 annotations 3 are of no image that the file lists (ann" in refusal(coco_files)


def test_classes_that_cannot_be_meant(coco_files):
    coco_files.content["categories"] += [
        {"id": 0, "name": "_background_"},
        {"id": 1, "name": "animal"},
        {"id": 2, "name": "dog", "supercategory": "animal"},
        {"id": 4, "name": "bird"},
    ]
    coco_files.write()
    assert check(coco_files).warnings == [
        "the categories dog are named twice",
        "the categories _background_ seem to be the background, which Detectron2 has without a "
        "category",
        "the categories animal have no object, and seem to be groups of the others",
        "the categories bird have no object",
    ]
    assert not check(coco_files, training=False).warnings


def test_unregistered_dataset():
    with pytest.raises(DataError, match="'nothing', which is not registered.*--train-json"):
        check_coco_dataset("nothing", **ALL)
