"""The COCO evaluation, against pycocotools on the file as it should be."""

import contextlib
import copy
import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import _LOG_COUNTER
from evaluation.generated import detections, ground_truth, reference, scores_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.coco import register_coco_json
from gn_detect.evaluation import build_evaluator, scoring

BACKENDS = ("pycocotools", "fast")
TASKS = ("bbox", "keypoints", "segm")
SIGMAS = (0.05, 0.1, 0.2)


def table(scored: COCOeval) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        scored.summarize()
    return out.getvalue().splitlines()


@pytest.mark.parametrize("coco_eval", BACKENDS)
@pytest.mark.parametrize("seed, sigmas", [(4, ()), (7, SIGMAS)])  # whose first objects are found
def test_equals_pycocotools(evaluate, coco_eval, seed, sigmas):
    content = ground_truth(num_keypoints=len(sigmas) or 17, seed=seed)
    found = detections(content, seed=seed + 1)
    ours, printed = evaluate(content, found, coco_eval=coco_eval, kpt_oks_sigmas=sigmas)
    expected = {task: reference(content, found, task, sigmas) for task in TASKS}
    assert printed == [line for task in TASKS for line in table(expected[task])]
    assert len(printed) == 12 + 10 + 12
    # To the last digit by pycocotools; the C++ of the other divides in another order.
    tolerance = 0 if coco_eval == "pycocotools" else 1e-12
    for task, scored in expected.items():
        assert ours[task]["AP"] == pytest.approx(100 * scored.stats[0], abs=tolerance)
        for index in range(4):
            precision = scored.eval["precision"][:, :, index, 0, -1]
            precision = precision[precision > -1]
            ap = 100 * precision.mean() if precision.size else math.nan
            assert ours[task][f"AP-class {index}"] == pytest.approx(ap, abs=tolerance, nan_ok=True)
    assert all(1 < ours[task]["AP"] < 99 for task in TASKS)


def put(key, value="absent"):
    """A change of all annotations; ``value`` may be a function of the position."""

    def change(content):
        for position, annotation in enumerate(content["annotations"]):
            annotation.pop(key)
            if value != "absent":
                annotation[key] = value(position) if callable(value) else value

    return change


def rename(content):
    for image in content["images"]:
        image["id"] = f"image-{image['id']:03}"
    for category in content["categories"]:
        category["id"] = f"kind-{category['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image-{annotation['image_id']:03}"
        annotation["category_id"] = f"kind-{annotation['category_id']}"


@pytest.mark.parametrize("coco_eval", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        put("id", lambda i: i),  # 0 is no match to pycocotools
        *(put("id", value) for value in (lambda i: f"6f1c-{i}", 5, lambda i: i + 0.5, "absent")),
        *(put("area", value) for value in ("absent", None, "12", 0, 10**400)),
        lambda content: [a.update(image_id=float(a["image_id"])) for a in content["annotations"]],
        rename,
    ],
)
def test_what_is_mended_does_not_matter(evaluate, tmp_path, coco_eval, change):
    content = ground_truth()
    found = detections(content)
    expected = evaluate(content, found, coco_eval=coco_eval)
    change(content)
    assert repr(evaluate(content, found, coco_eval=coco_eval)) == repr(expected)  # with NaN
    written = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {r["image_id"] for r in written} <= {i["id"] for i in content["images"]}
    assert {r["category_id"] for r in written} <= {c["id"] for c in content["categories"]}
    assert len(written) == sum(map(len, found))


@pytest.mark.parametrize("value", ["absent", None])
def test_no_iscrowd_is_that_of_an_object(evaluate, value):
    content = ground_truth()
    found = detections(content)
    put("iscrowd", 0)(content)
    expected = evaluate(content, found)
    put("iscrowd", value)(content)
    assert repr(evaluate(content, found)) == repr(expected)


@pytest.mark.parametrize("coco_eval", BACKENDS)
def test_the_limit_of_detections(evaluate, coco_eval):
    content = ground_truth(num_classes=2)
    found = detections(content, most=40)
    unlimited, _ = evaluate(content, found)
    evaluator = scoring.CocoEvaluator("generated", max_dets_per_image=11, coco_eval=coco_eval)
    outputs = [{"instances": f} for f in found]
    ours = scores_of(evaluator, DatasetCatalog.get("generated"), outputs)["bbox"]["AP"]
    expected = reference(content, found, "bbox", max_dets=11).eval["precision"][..., 0, -1]
    assert ours == pytest.approx(100 * expected[expected > -1].mean(), abs=1e-12)
    assert ours != unlimited["bbox"]["AP"]


@pytest.mark.parametrize("data", ["coco_dev", "nuclei_dsb2018"])
def test_both_packages_agree_on_real_photos(shared_data, tmp_path, capsys, data):
    """Objects that are found are moved by a few pixels, and their masks with them."""
    file = shared_data / data / "val.json"
    register_coco_json("real", str(file), str(file.parent / "images"))
    rng, coco = np.random.default_rng(0), COCO(file)
    images, tables, classes = DatasetCatalog.get("real"), [], MetadataCatalog.get("real")
    classes = classes.thing_dataset_id_to_contiguous_id
    found, scored = [], []
    for image in images:
        objects = [a for a in coco.imgToAnns[image["image_id"]] if rng.random() < 0.8]
        result = Instances((image["height"], image["width"]))
        x, y, w, h = np.array([a["bbox"] for a in objects]).reshape(-1, 4).T
        shifts = rng.integers(-4, 5, (len(objects), 2))
        boxes = np.stack([x, y, x + w, y + h], axis=1) + shifts[:, [0, 1, 0, 1]]
        result.pred_boxes = Boxes(torch.from_numpy(boxes))
        result.pred_masks = [
            torch.from_numpy(np.roll(coco.annToMask(a), shift, (1, 0)))
            for a, shift in zip(objects, shifts, strict=True)
        ]
        result.scores = torch.from_numpy(rng.integers(1, 9, len(objects)) / 10)
        result.pred_classes = torch.tensor([classes[a["category_id"]] for a in objects])
        found.append({"instances": result})
    for coco_eval in BACKENDS:
        evaluator = build_evaluator("real", str(tmp_path), coco_eval=coco_eval)
        capsys.readouterr()
        scored.append(scores_of(evaluator, images, found))
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and tables[0].count("Average") == 24
    for task in ("bbox", "segm"):  # each class, too
        assert scored[0][task] == pytest.approx(scored[1][task], abs=1e-12, nan_ok=True)


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert scoring.choose_coco_eval("auto")[0] is COCO
    with pytest.raises(ConfigError, match="faster-coco-eval cannot be imported .*: pip install"):
        scoring.choose_coco_eval("fast")
    with pytest.raises(ConfigError, match="TEST.COCO_EVAL is 'c'; known: auto, fast, pycocotools"):
        scoring.choose_coco_eval("c")


def test_what_scores_is_said_once(evaluate, caplog):
    content = ground_truth(num_images=2)
    caplog.set_level("INFO")
    _LOG_COUNTER.clear()
    for _ in range(2):
        evaluate(content, detections(content))
    assert caplog.text.count("COCO evaluation by faster-coco-eval (TEST.COCO_EVAL is auto)") == 1


@pytest.mark.parametrize("coco_eval", BACKENDS)
def test_no_objects(evaluate, coco_eval):
    content = ground_truth()
    found = detections(content)
    content["annotations"] = []
    ours, _ = evaluate(content, found, coco_eval=coco_eval)
    assert ours.keys() == set(TASKS) and all(math.isnan(v) for v in ours["bbox"].values())


def test_a_test_set_is_not_scored(evaluate, tmp_path):
    content = ground_truth()
    found = detections(content)
    del content["annotations"]
    assert evaluate(content, found) == ({}, [])
    written = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert len(written) == sum(map(len, found))


def test_a_dataset_without_a_json(evaluate, tmp_path):
    """Its dicts are the ground truth; Detectron2 converts them."""
    content = ground_truth()
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0  # whose masks Detectron2 does not convert
        annotation["segmentation"] = [[8, 8, 32, 8, 32, 32, 8, 32]]
        annotation["area"] = 24 * 24  # Detectron2 takes it from the mask
    found = detections(content)
    expected, _ = evaluate(content, found)
    images = DatasetCatalog.get("generated")
    names = MetadataCatalog.get("generated").thing_classes
    scored = []
    for order in (1, -1):  # of equal scores, the one on the image of the lower id comes first
        dicts = copy.deepcopy(images[::order])
        DatasetCatalog.register("dicts", lambda dicts=dicts: dicts)
        MetadataCatalog.get("dicts").set(evaluator_type="coco", thing_classes=names)
        for _ in range(2):
            evaluator = build_evaluator("dicts", str(tmp_path))
            scored.append(scores_of(evaluator, images, [{"instances": f} for f in found]))
        DatasetCatalog.remove("dicts")
        MetadataCatalog.remove("dicts")
    ours, *others = scored
    assert ours["bbox"]["AP50"] > 1 and all(repr(other) == repr(ours) for other in others)
    assert ours["bbox"] == pytest.approx(expected["bbox"], nan_ok=True, abs=0.5)  # rounds boxes


def test_proposals_as_detectron2(evaluate, tmp_path):
    content = ground_truth()
    found = detections(content)
    evaluate(content, found)
    outputs = []
    for instances in found:
        proposals = Instances((160, 200), proposal_boxes=instances.pred_boxes)
        proposals.objectness_logits = torch.arange(len(proposals), dtype=torch.float32)
        outputs.append({"proposals": proposals})
    theirs = COCOEvaluator("generated", output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    ours, images = (
        build_evaluator("generated", str(tmp_path / "ours")),
        DatasetCatalog.get("generated"),
    )
    scored = [dict(scores_of(evaluator, images, outputs)) for evaluator in (theirs, ours)]
    assert repr(scored[0]) == repr(scored[1]) and scored[0]["box_proposals"]["AR@100"] > 1
    files = [(tmp_path / name / "box_proposals.pkl").read_bytes() for name in ("theirs", "ours")]
    assert files[0] == files[1]


def test_predictions_of_something_else(evaluate):
    content = ground_truth(num_keypoints=3)
    found = detections(content)
    with pytest.raises(ConfigError, match="3 keypoints per object, the predictions 3, .* 17; they"):
        evaluate(content, found)
    evaluator = scoring.CocoEvaluator("generated", kpt_oks_sigmas=SIGMAS)
    for image, label, error, message in (
        ("absent", 0, DataError, "predictions on the image 'absent', which generated does not"),
        (3, 9, ConfigError, "predicts the class 9, but generated has 4 classes, from 0 on"),
    ):
        instances = next(f for f in found if len(f))[:1]
        instances.pred_classes[0] = label
        with pytest.raises(error, match=message):
            scores_of(evaluator, [{"image_id": image}], [{"instances": instances}])
