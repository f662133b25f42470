"""Keypoints of own data: names, flips, and what is wrong with them."""

import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import builtin_meta as coco
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from helpers import config
from pycocotools.cocoeval import Params

from gn_detect.config import ConfigError
from gn_detect.data.coco import DataError, check_coco_dataset, output_names, register_coco_json
from gn_detect.data.keypoints import OKS_SIGMA, flip_indices, flip_pairs, mirrored
from gn_detect.data.loader import NamingDatasetMapper

CONFIG = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.yaml"
NAMES = ["nose", "left_eye", "right_eye"]


@pytest.fixture
def faces(coco_files):
    """Three images of two classes, each with a nose and two eyes."""
    for category in coco_files.content["categories"]:
        category.update(keypoints=NAMES, skeleton=[[1, 2], [1.0, 3.0]])
    for annotation in coco_files.content["annotations"]:
        annotation["keypoints"] = [20, 24, 2, 12, 14, 2, 28, 14, 1]
    return coco_files


def check(files, keypoints=True, **metadata):
    files.write()
    register_coco_json("own", str(files.json_file), str(files.image_root))
    MetadataCatalog.get("own").set(**metadata)
    needs = {"masks": False, "training": True, "evaluation": True}
    return check_coco_dataset("own", keypoints=keypoints, **needs)


def test_names_skeleton_and_pairs_are_detectron2s_metadata(faces):
    assert check(faces).keypoints == NAMES
    names = {"classes": ["dog", "cat"], "keypoints": NAMES}
    assert output_names(("own",), keypoints=True) == names  # from the file
    DatasetCatalog.get("own")
    assert output_names(("own",), keypoints=True) == names  # from the metadata
    assert output_names(("own",), keypoints=False) == {"classes": ["dog", "cat"]}
    assert output_names((), keypoints=True) == output_names(("none",), keypoints=True) == {}
    metadata = MetadataCatalog.get("own")
    assert metadata.keypoint_names == NAMES
    assert create_keypoint_hflip_indices("own") == [0, 2, 1]
    rules = metadata.keypoint_connection_rules
    assert [rule[:2] for rule in rules] == [("nose", "left_eye"), ("nose", "right_eye")]


@pytest.mark.parametrize(
    "pairs, order", [(None, [0, 2, 1]), ([], [0, 1, 2]), ([["nose", "left_eye"]], [1, 0, 2])]
)
def test_a_flip_exchanges_the_pairs(faces, pairs, order):
    check(faces)
    (image, *_) = DatasetCatalog.get("own")
    cfg = config(CONFIG, "INPUT.KEYPOINT_FLIP_PAIRS", pairs, "DATASETS.TRAIN", ("own",))
    mapper = NamingDatasetMapper(cfg)
    mapper.augmentations = T.AugmentationList([T.RandomFlip(prob=1.0)])
    (points,) = mapper(image)["instances"].gt_keypoints.tensor.numpy()
    expected = np.array(image["annotations"][0]["keypoints"]).reshape(3, 3)
    expected[:, 0] = image["width"] - expected[:, 0]
    np.testing.assert_allclose(points, expected[order])


def test_evaluation_needs_no_training_set():
    mapper = NamingDatasetMapper(config(CONFIG, "DATASETS.TRAIN", ()), is_train=False)
    assert not mapper.use_keypoint  # without annotations


@pytest.mark.parametrize(
    "left, right",
    [
        *(("left_x", "right_x"), ("x_left", "x_right"), ("LeftX", "RightX"), ("xLeft", "xRight")),
        *(("l_x", "r_x"), ("x_l", "x_r"), ("left ear", "right ear"), ("Left-ear", "Right-ear")),
        *(("LKnee", "RKnee"), ("kneeL", "kneeR"), ("knee.L", "knee.R"), ("tl", "tr")),
        *(("L1", "R1"), ("front left 2", "front right 2"), ("LEFT_EYE", "RIGHT_EYE")),
    ],
)
def test_names_of_left_and_right(left, right):
    assert (mirrored(left), mirrored(right)) == (right, left)
    assert flip_indices([right, "tip", left], flip_pairs([right, "tip", left])) == [2, 1, 0]


@pytest.mark.parametrize("name", ["tail", "lip", "rear", "top", "br", "ball", "Lip", "Rear", "CLR"])
def test_names_of_no_side(name):
    assert flip_pairs([name, "tip"]) == []


def test_pairs_and_tolerance_of_coco():
    names = coco.COCO_PERSON_KEYPOINT_NAMES
    assert {*flip_pairs(names)} == {*coco.COCO_PERSON_KEYPOINT_FLIP_MAP}
    sigmas = Params(iouType="keypoints").kpt_oks_sigmas
    assert OKS_SIGMA == pytest.approx(sigmas.mean(), abs=5e-4) and len(sigmas) == len(names)


@pytest.mark.parametrize(
    "pairs, message",
    [
        ("left_eye", "must be a list of pairs"),
        ([["nose"]], "must be a list of pairs"),
        ([["left_eye", "ear"]], "'ear', which is no keypoint of the data; they are nose, left_eye"),
        ([["nose", "left_eye"], ["nose", "right_eye"]], "names 'nose' twice"),
        ([["nose", "nose"]], "names 'nose' twice"),
    ],
)
def test_pairs_that_cannot_be(pairs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        flip_pairs(NAMES, pairs)


def declare(files, *keypoints):
    for category, names in zip(files.content["categories"], keypoints, strict=True):
        category["keypoints"] = names


@pytest.mark.parametrize(
    "keypoints, message",
    [
        ((NAMES, NAMES[::-1]), "the categories dog and cat declare different keypoints"),
        ((NAMES[:2], NAMES[:2]), "declare 2 keypoints (nose, left_eye), its annotations have 3"),
        (("nose", None), "category 7 (cat) has the keypoints 'nose' (text)"),
        (([1, 2, 3], None), "category 7 (cat) has the keypoints [1, 2, 3] (a list)"),
        ((["nose"] * 3, None), "category 7 (cat) has two keypoints of the name 'nose'"),
    ],
)
def test_declarations_that_cannot_be(faces, keypoints, message):
    declare(faces, *keypoints)
    with pytest.raises(DataError, match=re.escape(message)):
        check(faces)
    assert not check(faces, keypoints=False).keypoints  # another model does not need them
    DatasetCatalog.get("own")
    assert MetadataCatalog.get("own").get("keypoint_names") is None


@pytest.mark.parametrize(
    "point, message",
    [
        ([0, 0, 0], "has no visible keypoints"),
        ([0.4, 0.5, 2], "divided by the size of the image"),
        ([10, 10, 3], "has a keypoint of visibility 3"),
        ([10, 10], "6 numbers as keypoints; others have 9"),
    ],
)
def test_annotations_that_cannot_be(faces, point, message):
    few = len(point) == 2
    for annotation in faces.content["annotations"][: 1 if few else None]:
        annotation["keypoints"] = point * 3
    with pytest.raises(DataError, match=message):
        check(faces)


def test_what_is_probably_not_meant_is_a_warning(faces):
    declare(faces, None, None)
    *_, last = faces.content["annotations"]
    last["keypoints"][0] = 80
    faces.content["categories"][0]["skeleton"] = [[0, 1], [1, 2], "x"]
    cats = [a for a in faces.content["annotations"] if a["category_id"] == 7]
    for annotation in cats:  # a crowd region is no object
        faces.content["annotations"].append({**annotation, "iscrowd": 1})
        del annotation["keypoints"]
    summary = check(faces)
    assert summary.keypoints == ["1", "2", "3"]
    for text in (
        "no category names its 3 keypoints: they are called 1 to 3",
        "category 7 (cat) has the skeleton [[0, 1], [1, 2], 'x'] (a list); it must be pairs",
        "no object of the categories cat has a visible keypoint",
        "1 of 9 visible keypoints are outside of their image",
    ):
        assert any(text in warning for warning in summary.warnings), text


def test_metadata_of_a_user_go_before_the_file(faces):
    assert check(faces, keypoint_names=["a", "b", "c"]).keypoints == ["a", "b", "c"]
    DatasetCatalog.get("own")
    assert MetadataCatalog.get("own").keypoint_names == ["a", "b", "c"]
    with pytest.raises(DataError, match="has 3 keypoints, the metadata of the dataset own name 2"):
        check(faces, keypoint_names=["a", "b"])
