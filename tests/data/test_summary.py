"""What is said of a dataset, against Detectron2's own mapper, anchors and IoU, and by hand."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from helpers import TINY, config
from PIL import Image

from gn_detect import get_config_file
from gn_detect.config import ConfigError
from gn_detect.data.coco import load_coco, register_coco_json
from gn_detect.data.input_size import Resizing
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.data.summary import summarize
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.engine.model_input import ModelInput

FPN = "COCO-Detection/faster_rcnn_R_50_FPN_gn_1x.yaml"
C4 = "COCO-Detection/faster_rcnn_R_50_C4_gn_1x.yaml"
LSJ = ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 112]
RETINANET = "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml"


@pytest.mark.parametrize(
    "augmentation, at_one_size, text",
    [
        (
            T.ResizeShortestEdge([100, 120, 161], 300, "choice"),
            T.ResizeShortestEdge([127], 300, "choice"),
            "shorter side 127 pixels (the mean of 100 to 161), longer side at most 300",
        ),
        (
            T.ResizeShortestEdge([100, 200]),
            T.ResizeShortestEdge([150], sample_style="choice"),
            "shorter side 150 pixels (the mean of 100 to 200)",
        ),
        (T.ResizeShortestEdge(0), T.NoOpTransform(), "not resized"),
        (
            T.ResizeScale(0.1, 2.0, 128, 192),
            T.ResizeScale(1.0, 1.0, 128, 192),
            "fit into 192 x 128 pixels, at scale 1 of 0.1 to 2",
        ),
    ],
)
def test_resizing_is_detectron2s(augmentation, at_one_size, text):
    sizes = np.random.default_rng(0).integers(1, 400, (50, 2))
    resizing = Resizing(augmentation)
    assert str(resizing) == text
    for size, resized in zip(sizes, resizing(sizes), strict=True):
        image = np.broadcast_to(np.uint8(0), (*size, 3))
        transform = T.AugmentationList([at_one_size])(T.AugInput(image))
        assert tuple(resized) == transform.apply_image(image).shape[:2]


def crowded(coco_files, per_image=40):
    """Boxes of all kinds: thin, large, of a pixel, at and beyond the edge."""
    rng, content = np.random.default_rng(0), coco_files.content
    content["images"][1]["height"] = 79  # is padded to 96: a row more of anchors
    Image.new("RGB", (64, 79)).save(coco_files.image_root / "2.png")
    content["annotations"] = []
    for i in range(3 * per_image):
        bottom = content["images"][i // per_image]["height"] - 2
        x, y, width, height = rng.uniform([-5, -5, 0.2, 0.2], [62, bottom, 20, 60])
        box = [x, y, max(width, 0.2 - x), max(height, 0.2 - y)]
        annotation = {"id": i, "image_id": 1 + i // per_image, "category_id": 3, "bbox": box}
        content["annotations"].append({**annotation, "area": 1, "iscrowd": 0})
    coco_files.write()
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    return load_coco(str(coco_files.json_file))


@pytest.mark.parametrize(
    "name, options",
    [
        (FPN, ["MODEL.ANCHOR_GENERATOR.SIZES", "[[128], [32], [8], [64], [16]]"]),
        (FPN, ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5, "INPUT.MIN_SIZE_TRAIN", "(0,)"]),
        (C4, []),
        (RETINANET, []),
        (FPN, [*LSJ, "INPUT.LSJ.MIN_SCALE", 1.0, "INPUT.LSJ.MAX_SCALE", 1.0]),
    ],
)
def test_boxes_and_anchors_are_those_of_the_training(coco_files, name, options):
    cfg = config(name, *TINY, "INPUT.RANDOM_FLIP", "none", *options)
    data = crowded(coco_files)
    given = ModelInput.from_config(cfg)
    summary = summarize(data, given.resizing, given.anchors)
    mapper, backbone = NamingDatasetMapper(cfg), build_backbone(cfg)
    retinanet = name == RETINANET
    levels = cfg.MODEL.RETINANET.IN_FEATURES if retinanet else cfg.MODEL.RPN.IN_FEATURES
    shapes = backbone.output_shape()
    generator = build_anchor_generator(cfg, [shapes[level] for level in levels])
    best = []
    for item in map(mapper, DatasetCatalog.get("own")):
        images = ImageList.from_tensors([item["image"].float()], backbone.size_divisibility)
        features = backbone(images.tensor)
        anchors = Boxes.cat(generator([features[level] for level in levels]))
        boxes = item["instances"].gt_boxes
        best.append(pairwise_iou(boxes, anchors).max(dim=1).values)
    assert len(summary.best_iou) == 120
    np.testing.assert_allclose(summary.best_iou, torch.cat(best).numpy(), atol=1e-5)


@pytest.mark.parametrize("name", [FPN, C4, RETINANET])
def test_lazy_configs_say_the_same(coco_files, name):
    data = crowded(coco_files)
    lazy = load_lazy_config(get_config_file(f"lazy/{name.removesuffix('.yaml')}.py"))
    one, other = (
        summarize(data, given.resizing, given.anchors)
        for given in map(ModelInput.from_config, (config(name), lazy))
    )
    assert str(one) == str(other) and "best IoU" in str(one)
    np.testing.assert_allclose(one.best_iou, other.best_iou, atol=1e-6)


def test_models_without_such_anchors(coco_files):
    rotated = ["MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"]
    for options in (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], rotated):
        given = ModelInput.from_config(config(FPN, *options))
        summary = summarize(crowded(coco_files), given.resizing, given.anchors)
        assert summary.best_iou is None and "resized for training" in str(summary)
        assert "IoU" not in str(summary) + summary.brief()


@pytest.mark.parametrize(
    "options, message",
    [
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"], "Got sizes of length 2 in anchor gen"),
        (["MODEL.RPN.IN_FEATURES", "['p9']"], "p9"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], r"INPUT.MIN_SIZE_TRAIN is \(\): it is empty"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "must be two values"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        ModelInput.from_config(config(FPN, *options))


def test_counts(coco_files):
    """Two dogs in image 1, one of them cut at its edge; a cat in image 2; a crowd in image 3."""
    content = coco_files.content
    first, second, third = content["annotations"]
    first["area"], first["segmentation"] = None, [[8, 8, 32, 8, 32, 32]]
    wide = {**first, "id": 12, "bbox": [50, 50, 30, 10], "area": 9999.0, "segmentation": None}
    gone = {**first, "id": 13, "bbox": [70, 8, 24, 24]}  # beyond its image
    content["annotations"] = [first, wide, gone, second, {**third, "iscrowd": 1}]
    content["categories"].append({"id": 9, "name": "unseen"})
    coco_files.write()
    data = load_coco(str(coco_files.json_file))
    resizing = {"training": Resizing(T.ResizeShortestEdge([128], sample_style="choice"))}
    summary = summarize(data, resizing, warnings=[*data.mended, "beware"])
    assert summary.classes == ["dog", "cat", "unseen"]
    assert summary.class_objects.tolist() == [2, 1, 0]
    assert summary.class_images.tolist() == [1, 1, 0]
    assert summary.image_objects.tolist() == [2, 1, 0]
    assert summary.num_crowds == 1 and summary.warnings == ["beware"]
    np.testing.assert_allclose(summary.aspect_ratios, [1, 10 / 14, 1])  # clipped at 64
    truth = [a["area"] for a in data.ground_truth()["annotations"]]
    assert summary.areas["original"].tolist() == [truth[0], 9999, 576] and 250 < truth[0] < 350
    assert summary.areas["training"].tolist() == [4 * truth[0], 4 * 9999, 4 * 576]
    assert summary.size_shares("original").tolist() == pytest.approx([2 / 3, 0, 1 / 3])
    assert summary.size_shares("training").tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    text = " ".join(str(summary).split())
    for line in (
        "3 images, 1 (33 %) of them without objects; 3 objects of 3 classes; 1 crowd regions",
        "dog 2 67 % 1 33 %",
        "objects per image 0 0 0 1 2 2 2",
        "height / width of boxes 0.714 0.714 0.714 1 1 1 1",
        "original 2 67 % 0 0 % 1 33 %",
        "resized for training: shorter side 128 pixels",
        f"mended: - {data.mended[0]}",
        "- beware",
    ):
        assert line in text


def test_many_classes_are_cut_short(coco_files):
    content = coco_files.content
    content["categories"] = [{"id": i, "name": f"class {i}" + "x" * i} for i in range(50)]
    coco_files.write()
    summary = summarize(load_coco(str(coco_files.json_file)))
    text, brief = str(summary), summary.brief()
    assert "and 30 others" in text and "and 45 others" in brief
    assert max(map(len, text.splitlines()[1:])) <= 100 and len(brief.splitlines()) <= 8
    assert "class 7xxxxxxx " in text and "class 26" not in text


def test_a_test_set_has_nothing_but_images(coco_files):
    del coco_files.content["annotations"]
    coco_files.write()
    given = ModelInput.from_config(config(FPN))
    summary = summarize(load_coco(str(coco_files.json_file)), given.resizing, given.anchors)
    assert "3 images, 3 (100 %) of them without objects; 0 objects of 2 classes" in str(summary)
    assert summary.best_iou is None
