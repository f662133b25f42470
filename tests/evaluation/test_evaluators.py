"""Each evaluator that a config can reach, run on predictions whose scores are known."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    LVISEvaluator,
)
from detectron2.structures import Boxes, Instances
from evaluation.generated import scores_of
from PIL import Image

import gn_detect
from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.coco import register_coco_json
from gn_detect.evaluation import build_evaluator, check_evaluator


@pytest.fixture
def images(coco_files):
    """Registered as "own": three images of 64 x 64 pixels of a dog, a cat and a dog."""
    register_coco_json("own", str(coco_files.json_file), str(coco_files.image_root))
    return DatasetCatalog.get("own")


def detections(classes, scores):
    """On each image one object, where the ground truth is."""
    for category, score in zip(classes, scores, strict=True):
        found = Instances((64, 64))
        found.pred_boxes = Boxes([[8, 8, 32, 32]])
        found.pred_masks = torch.zeros(1, 64, 64, dtype=torch.bool)
        found.pred_masks[:, 8:32, 8:32] = True
        found.scores, found.pred_classes = torch.tensor([score]), torch.tensor([category])
        yield {"instances": found}


def test_no_predictions(images, tmp_path):
    nothing = [{"instances": Instances((64, 64), scores=torch.zeros(0))} for _ in images]
    results = scores_of(build_evaluator("own", str(tmp_path)), images, nothing)
    assert math.isnan(results["bbox"]["AP"])


LVIS_JSON = {"images": [], "annotations": [], "categories": []}


@pytest.fixture
def described(tmp_path):
    """The names of datasets that are there, as far as their metadata tell: one of each kind."""
    (tmp_path / "lvis.json").write_text(json.dumps(LVIS_JSON))
    kinds = {
        "lvis": {"json_file": str(tmp_path / "lvis.json")},
        "cityscapes_instance": {"gt_dir": str(tmp_path), "thing_classes": ["car"]},
        "cityscapes_sem_seg": {"gt_dir": str(tmp_path), "stuff_classes": ["road"]},
        "coco_panoptic_seg": {"panoptic_root": str(tmp_path)},
        "another": {},
    }
    for kind, metadata in kinds.items():
        MetadataCatalog.get(f"of_{kind}").set(evaluator_type=kind, **metadata)
    yield
    for kind in kinds:
        MetadataCatalog.remove(f"of_{kind}")


@pytest.mark.parametrize(
    "kind, package",
    [
        ("lvis", "lvis, .*: pip install git.*lvis-api"),
        ("cityscapes_instance", "cityscapesscripts, .*: pip install cityscapesscripts"),
        ("cityscapes_sem_seg", "cityscapesscripts"),
        ("coco_panoptic_seg", "panopticapi, .*: pip install git.*panopticapi"),
    ],
)
def test_a_package_that_is_missing(described, kind, package):
    with pytest.raises(ConfigError, match=rf"the evaluation of of_{kind} .* needs {package}"):
        check_evaluator(f"of_{kind}")


def test_a_kind_without_evaluation(described):
    with pytest.raises(ConfigError, match="of_another has the evaluator_type 'another'.*; known:"):
        check_evaluator("of_another")


def test_data_that_are_not_there(described, tmp_path, monkeypatch):
    pretend(monkeypatch, "lvis")
    (tmp_path / "lvis.json").unlink()
    with pytest.raises(DataError, match="needs .*lvis.json, which does not exist; .*DETECTRON2"):
        check_evaluator("of_lvis")


@pytest.mark.parametrize(
    "kind, evaluator",
    [
        ("lvis", LVISEvaluator),
        ("cityscapes_instance", CityscapesInstanceEvaluator),
        ("cityscapes_sem_seg", CityscapesSemSegEvaluator),
    ],
)
def test_the_evaluation_that_detectron2_chooses(described, tmp_path, monkeypatch, kind, evaluator):
    pretend(monkeypatch, "lvis", LVIS=mock.MagicMock())
    pretend(monkeypatch, "cityscapesscripts")
    pretend(monkeypatch, "shapely")
    assert type(build_evaluator(f"of_{kind}", str(tmp_path))) is evaluator


def test_pascal_voc(tmp_path):
    """Two images in its layout. All that is found is right, but the cat is not found."""
    boxes = {"a": {"dog": (11, 11, 40, 40), "cat": (51, 51, 60, 80)}, "b": {"dog": (1, 1, 30, 90)}}
    for directory in ("Annotations", "ImageSets/Main"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/val.txt").write_text("\n".join(boxes))
    outputs = []
    for name, objects in boxes.items():
        described = "".join(
            f"<object><name>{kind}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
            f"<ymax>{y1}</ymax></bndbox></object>"
            for kind, (x0, y0, x1, y1) in objects.items()
        )
        (tmp_path / f"Annotations/{name}.xml").write_text(f"<annotation>{described}</annotation>")
        x0, y0, x1, y1 = objects["dog"]  # counted from 1, with the last pixel within
        found = Instances((100, 100), pred_boxes=Boxes([[x0 - 1, y0 - 1, x1, y1]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
        outputs.append({"instances": found})
    metadata = MetadataCatalog.get("own_voc").set(evaluator_type="pascal_voc", year=2012)
    metadata.set(dirname=str(tmp_path), split="val", thing_classes=["dog", "cat"])
    images = [{"image_id": name} for name in boxes]
    results = scores_of(build_evaluator("own_voc", str(tmp_path)), images, outputs)
    MetadataCatalog.remove("own_voc")
    assert results == {"bbox": {"AP": 50, "AP50": 50, "AP75": 50}}


def test_semantic_segmentation(tmp_path):
    """A quarter of the image is of the second class, and another quarter is taken for it."""
    labels = np.zeros((40, 40), np.uint8)
    labels[:20, :20], labels[39] = 1, 255  # the last row is not labelled
    Image.fromarray(labels).save(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    root = str(tmp_path)
    DatasetCatalog.register("own_sem_seg", lambda: load_sem_seg(root, root))
    metadata = MetadataCatalog.get("own_sem_seg").set(evaluator_type="sem_seg", ignore_label=255)
    metadata.set(stuff_classes=["ground", "grass"])
    scores = torch.zeros(2, 40, 40)
    scores[1, :20] = 1
    scores[0, 20:] = 1
    images = DatasetCatalog.get("own_sem_seg")
    results = scores_of(build_evaluator("own_sem_seg", root), images, [{"sem_seg": scores}])
    Image.fromarray(labels + 1).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png has the label 2; labels are .* of 0 to 1, .* 255"):
        scores_of(build_evaluator("own_sem_seg", root), images, [{"sem_seg": scores}])
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(DataError, match=r"cannot use the image .*a.png"):
        scores_of(build_evaluator("own_sem_seg", root), images, [{"sem_seg": scores}])
    DatasetCatalog.remove("own_sem_seg")
    MetadataCatalog.remove("own_sem_seg")
    ground, both = 19 * 40, 20 * 20
    assert results["sem_seg"]["IoU-grass"] == pytest.approx(50)
    assert results["sem_seg"]["IoU-ground"] == pytest.approx(100 * ground / (ground + both))


@pytest.fixture
def panoptic_images(images, coco_files, tmp_path, monkeypatch):
    """Registered as "panoptic": the square of each image is of things, and around it is sky, where
    the first row is not labelled. In place of panopticapi is what gives a panoptic quality of 1 to
    two segments of the ids 1 and 2, a square of dogs and the sky."""
    labels = np.ones((64, 64), np.uint8)
    labels[8:32, 8:32], labels[0] = 0, 255
    Image.fromarray(labels).save(tmp_path / "labels.png")
    (tmp_path / "panoptic.json").write_text('{"annotations": []}')
    images = [{**image, "sem_seg_file_name": str(tmp_path / "labels.png")} for image in images]
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "panoptic" in catalog.list():
            catalog.remove("panoptic")
    DatasetCatalog.register("panoptic", lambda: images)
    MetadataCatalog.get("panoptic").set(
        evaluator_type="coco_panoptic_seg",
        json_file=str(coco_files.json_file),
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
        stuff_dataset_id_to_contiguous_id={0: 0, 9: 1},
        stuff_classes=["things", "sky"],
        ignore_label=255,
    )

    def pq_compute(gt_json, predictions, gt_folder, pred_folder):
        with open(predictions) as f:
            predictions = json.load(f)["annotations"]
        qualities = []
        for prediction in predictions:
            ids = np.array(Image.open(f"{pred_folder}/{prediction['file_name']}"))[:, :, 0]
            segments = {s["id"]: s["category_id"] for s in prediction["segments_info"]}
            qualities.append(segments == {1: 3, 2: 9} and (ids[8:32, 8:32] == 1).all())
        row = {key: np.mean(qualities) for key in ("pq", "sq", "rq")}
        return {kind: {**row, "n": 1} for kind in ("All", "Things", "Stuff")}

    def id2rgb(ids):
        return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], 2).astype(np.uint8)

    pretend(monkeypatch, "panopticapi")
    pretend(monkeypatch, "panopticapi.utils", id2rgb=id2rgb)
    pretend(monkeypatch, "panopticapi.evaluation", pq_compute=pq_compute)
    return images


def pretend(monkeypatch, name, **members):
    """To have a package installed."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def lazy_evaluator(output_dir):
    name = "lazy/COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.py"
    cfg = LazyConfig.load(gn_detect.get_config_file(name))
    cfg.train.output_dir, cfg.dataloader.test.dataset.names = output_dir, "panoptic"
    return instantiate(cfg.dataloader.evaluator)


@pytest.mark.parametrize("build", [lambda path: build_evaluator("panoptic", path), lazy_evaluator])
def test_panoptic_segmentation(panoptic_images, tmp_path, build):
    """All things are found where they are, but semantically only their left half."""
    sem_seg = torch.zeros(2, 64, 64)
    sem_seg[1], sem_seg[0, 8:32, 8:20] = 0.5, 1
    ids = torch.full((64, 64), 2, dtype=torch.int32)
    ids[8:32, 8:32] = 1
    outputs = []
    for output in detections([0, 1, 0], [0.9, 0.5, 0.8]):
        segments = [
            {"id": 1, "isthing": True, "category_id": 0},
            {"id": 2, "isthing": False, "category_id": 1},
        ]
        outputs.append({**output, "sem_seg": sem_seg, "panoptic_seg": (ids, segments)})
    results = scores_of(build(str(tmp_path / "run")), panoptic_images, outputs)
    assert results["bbox"]["AP"] == results["segm"]["AP"] == pytest.approx(100)
    things, half, sky = 24 * 24, 24 * 12, 64 * 63 - 24 * 24
    assert results["sem_seg"]["IoU-things"] == pytest.approx(100 * half / things)
    assert results["sem_seg"]["IoU-sky"] == pytest.approx(100 * sky / (sky + things - half))
    assert results["panoptic_seg"]["PQ"] == 100
