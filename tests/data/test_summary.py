"""What is said of a dataset, against Detectron2's own mapper, anchors and IoU, and by hand."""

import re

import numpy as np
import pytest
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
from gn_detect.data.loader import NamingDatasetMapper
from gn_detect.data.model_input import ModelInput, Resizing
from gn_detect.data.summary import summarize
from gn_detect.engine.describe_data import model_input
from gn_detect.engine.lazy_config import load_lazy_config

FPN = "COCO-Detection/faster_rcnn_R_50_FPN_gn_1x.yaml"
C4, RETINANET = FPN.replace("FPN", "C4"), "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml"
EDGE, SCALE = T.ResizeShortestEdge, T.ResizeScale
LSJ = ["INPUT.LSJ.ENABLED", True, "INPUT.LSJ.IMAGE_SIZE", 112, "INPUT.LSJ.MIN_SCALE", 1.0]


@pytest.mark.parametrize(
    "augmentation, drawn, text",
    [
        (EDGE([90, 100, 161], 300, "choice"), EDGE(117, 300), "117 (mean of 90 to 161), longer at"),
        (EDGE(0), T.NoOpTransform(), "not resized"),
        (SCALE(0.1, 2.0, 128, 192), SCALE(1, 1, 128, 192), "192 x 128, at scale 1 of 0.1 to 2"),
    ],
)
def test_resizing_is_detectron2s(augmentation, drawn, text):
    sizes, resizing = np.random.default_rng(0).integers(1, 400, (50, 2)), Resizing(augmentation)
    assert text in resizing.text
    for size, resized in zip(sizes, resizing(sizes), strict=True):
        image = T.AugInput(np.zeros((*size, 3), np.uint8))
        T.AugmentationList([drawn])(image)
        assert tuple(resized) == image.image.shape[:2]


def test_the_scale_of_crops_is_detectron2s(coco_files):
    options = (
        "INPUT.CROP.ENABLED",
        True,
        "INPUT.CROP.TYPE",
        "relative",
        "INPUT.CROP.SIZE",
        [0.5, 0.5],
    )
    given = model_input(config(FPN, *options, "INPUT.MIN_SIZE_TRAIN", (100,)))
    size = np.array([[400, 640]])
    cut = T.AugInput(np.zeros((*size[0], 3), np.uint8))
    T.AugmentationList([T.RandomCrop("relative", [0.5, 0.5]), T.ResizeShortestEdge(100)])(cut)
    assert (given.resizing["training"](size)[0] == 2 * np.array(cut.image.shape[:2])).all()
    assert "shorter side 200" in given.resizing["training"].text
    assert given.resizing["evaluation"].edge == 800


def crowded(coco_files, per_image=40):
    """Boxes of all kinds: thin, large, of a pixel, at and beyond the edge."""
    rng, content = np.random.default_rng(0), coco_files.content
    content["images"][1]["height"] = 79  # is padded to 96: a row more of anchors
    Image.new("RGB", (64, 79)).save(coco_files.image_root / "2.png")
    template, content["annotations"] = content["annotations"][0], []
    for i in range(3 * per_image):
        bottom = content["images"][i // per_image]["height"] - 2
        x, y, width, height = rng.uniform([-5, -5, 0.2, 0.2], [62, bottom, 20, 60])
        box = [x, y, max(width, 0.2 - x), max(height, 0.2 - y)]
        content["annotations"].append({**template, "image_id": 1 + i // per_image, "bbox": box})
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
        (FPN, [*LSJ, "INPUT.LSJ.MAX_SCALE", 1.0]),
    ],
)
def test_boxes_and_anchors_are_those_of_the_training(coco_files, name, options):
    cfg = config(name, *TINY, "INPUT.RANDOM_FLIP", "none", *options)
    summary = summarize(crowded(coco_files), model_input(cfg))
    mapper, backbone = NamingDatasetMapper(cfg), build_backbone(cfg)
    levels = (cfg.MODEL.RETINANET if name == RETINANET else cfg.MODEL.RPN).IN_FEATURES
    shapes = backbone.output_shape()
    generator = build_anchor_generator(cfg, [shapes[level] for level in levels])
    best = []
    for item in map(mapper, DatasetCatalog.get("own")):
        images = ImageList.from_tensors([item["image"].float()], backbone.size_divisibility)
        features = backbone(images.tensor)
        anchors = Boxes.cat(generator([features[level] for level in levels]))
        best += pairwise_iou(item["instances"].gt_boxes, anchors).max(dim=1).values.tolist()
    np.testing.assert_allclose(summary.best_iou, best, atol=1e-5)
    (row,) = re.findall("- best IoU below 0.5 (.*)", summary.text())
    assert sum(map(int, re.findall(r"(\d+) \(", row))) == sum(b < 0.5 for b in best) > 0


@pytest.mark.parametrize("name", [FPN, RETINANET])
def test_lazy_configs_say_the_same(coco_files, name):
    lazy = load_lazy_config(get_config_file(f"lazy/{name.removesuffix('.yaml')}.py"))
    data, given = crowded(coco_files), map(model_input, (config(name), lazy))
    one, other = (summarize(data, g) for g in given)
    assert one.text() == other.text() and "best IoU" in one.text()


def test_other_anchors():
    keypoints = "MODEL.KEYPOINT_ON", True, "DATASETS.TRAIN", ()
    for key, name in (("ANCHOR", "RotatedAnchorGenerator"), ("PROPOSAL", "PrecomputedProposals")):
        option = f"MODEL.{key}_GENERATOR.NAME", name
        assert model_input(config(FPN, *option, *keypoints)).anchors is None
    with pytest.raises(ConfigError, match="Got sizes of length 2 in anchor gen"):
        model_input(config(FPN, "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"))


def test_counts(coco_files):
    """Two dogs in image 1, one of them cut at its edge; a cat in image 2; a crowd in image 3."""
    content = coco_files.content
    first, second, third = content["annotations"]
    first["area"], first["segmentation"] = None, [[8, 8, 32, 8, 32, 32]]
    wide = {**first, "id": 12, "bbox": [50, 50, 30, 10], "area": 9999.0, "segmentation": None}
    gone = {**first, "id": 13, "bbox": [70, 8, 24, 24]}  # beyond its image
    content["annotations"] = [first, wide, gone, second, {**third, "iscrowd": 1}]
    content["categories"] += [{"id": i, "name": f"{i}" * i} for i in range(9, 40)]
    coco_files.write()
    given = ModelInput({"training": Resizing(T.ResizeShortestEdge(128))})
    summary = summarize(load_coco(str(coco_files.json_file)), given, ["beware"])
    assert 250 < summary.areas["original"][0] < 350  # of the triangle
    np.testing.assert_allclose(summary.areas["training"], 4 * summary.areas["original"])
    text = " ".join(summary.text().split())
    for line in (
        "3 images, 1 (33 %) of them without objects; 3 objects of 33 classes; 1 crowd regions",
        "dog 2 (67 %) 1 (33 %) cat 1 (33 %) 1 (33 %) 9999",
        "262... 0 (0 %) 0 (0 %) others: 13 0 (0 %) area",
        "original 2 (67 %) 0 (0 %) 1 (33 %)",
        "training 0 (0 %) 2 (67 %) 1 (33 %) images in training, uncropped: shorter side 128",
        "objects per image 0 0 0 1 2 2 2",
        "height / width of boxes 0.714 0.714 0.714 1 1 1 1",  # clipped at 64
        "look at: - beware",
    ):
        assert line in text
    assert "others: 28" in summary.text(num_classes=5)
