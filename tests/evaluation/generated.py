"""Ground truth and detections at random, and their scores: crowds, ties of scores, classes without
objects, images without either."""

import copy

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HEIGHT, WIDTH = 160, 200


def _ellipse(x, y, w, h):
    t = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = np.stack([x + w / 2 * (1 + np.cos(t)), y + h / 2 * (1 + np.sin(t))], axis=1)
    return np.round(points, 2).ravel().tolist()


def _draw(polygon):
    return mask_util.decode(mask_util.frPyObjects([polygon], HEIGHT, WIDTH))[:, :, 0]


def _box(rng):
    w, h = np.exp(rng.uniform(np.log(6), np.log(120), 2))
    return np.array([rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h), w, h])


def ground_truth(num_images=12, num_classes=4, num_keypoints=17, seed=0):
    """The content of a COCO JSON; no object is of the last class."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
        for i in range(3, 3 + num_images)
    ]
    annotations = []
    for image in images:
        for _ in range(rng.integers(0, 6)):
            box = np.round(_box(rng), 1)
            polygon = _ellipse(*box)
            mask = _draw(polygon)
            crowd = rng.random() < 0.15
            rle = mask_util.encode(np.asfortranarray(mask))
            visible = rng.integers(0, 3, num_keypoints) * (rng.random() < 0.8)
            points = box[:2] + rng.random((num_keypoints, 2)) * box[2:]
            points = np.round(points).astype(int) * (visible > 0)[:, None]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.integers(1, num_classes)) * 10,
                    "bbox": box.tolist(),
                    "area": int(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": {**rle, "counts": rle["counts"].decode()}
                    if crowd
                    else [polygon],
                    "keypoints": np.column_stack([points, visible]).ravel().tolist(),
                    "num_keypoints": int((visible > 0).sum()),
                }
            )
    names = [f"part_{i}" for i in range(num_keypoints)]
    categories = [
        {"id": 10 * (c + 1), "name": f"class {c}", "keypoints": names, "skeleton": []}
        for c in range(num_classes)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections(content, seed=1, most=17) -> list[Instances]:
    """Of each image, as a model returns them: fewer than ``most``, found or made up."""
    rng = np.random.default_rng(seed)
    num_keypoints = len(content["categories"][0]["keypoints"])
    classes = len(content["categories"])
    found = []
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes, masks, points, labels = [], [], [], []
        for _ in range(rng.integers(0, most)):
            box, label, keypoints = _box(rng), rng.integers(classes), None
            if objects and rng.random() < 0.7:
                near = objects[rng.integers(len(objects))]
                box = near["bbox"] * (1 + rng.normal(size=4) * 0.06)
                keypoints = np.array(near["keypoints"], float).reshape(-1, 3)[:, :2]
                label = near["category_id"] // 10 - 1 if rng.random() < 0.8 else label
            if keypoints is None:
                keypoints = box[:2] + rng.random((num_keypoints, 2)) * box[2:]
            boxes.append([*box[:2], *(box[:2] + box[2:])])
            masks.append(_draw(_ellipse(*box)))
            points.append(keypoints + rng.normal(size=keypoints.shape) * 3)
            labels.append(label)
        n = len(boxes)
        result = Instances((HEIGHT, WIDTH))
        result.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(n, 4), dtype=torch.float32))
        masks = np.array(masks, bool).reshape(n, HEIGHT, WIDTH)
        result.pred_masks = torch.from_numpy(masks)
        points = np.array(points).reshape(n, num_keypoints, 2)
        points = np.concatenate([points, np.ones((n, num_keypoints, 1))], axis=2)
        result.pred_keypoints = torch.tensor(points, dtype=torch.float32)
        result.scores = torch.from_numpy(rng.integers(1, 10, n).astype(np.float32) / 10)  # ties
        result.pred_classes = torch.tensor(np.array(labels, dtype=np.int64))
        found.append(result)
    return found


def results(content, found: list[Instances], task: str) -> list[dict]:
    """The detections in COCO's format of results, for the reference."""
    fields = {"bbox": ["bbox"], "segm": ["segmentation"], "keypoints": ["bbox", "keypoints"]}[task]
    return [
        {
            **{key: result[key] for key in ("image_id", "score", *fields)},
            "category_id": 10 * (result["category_id"] + 1),
        }
        for image, instances in zip(content["images"], copy.deepcopy(found), strict=True)
        for result in instances_to_coco_json(instances, image["id"])
    ]


def reference(content, found, task, sigmas=(), max_dets=100) -> COCOeval:
    """pycocotools alone."""
    return reference_of(content, results(content, found, task), task, sigmas, max_dets)


def reference_of(content, rows, task, sigmas=(), max_dets=100) -> COCOeval:
    """Of detections in COCO's format of results, with or without boxes beside the masks."""
    if task == "segm":  # pycocotools would take the areas from the boxes
        rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    truth.createIndex()
    scored = COCOeval(truth, truth.loadRes(copy.deepcopy(rows)), task)
    if sigmas and task == "keypoints":
        scored.params.kpt_oks_sigmas = np.array(sigmas)
    if task != "keypoints":
        scored.params.maxDets = [1, 10, max_dets]
    scored.evaluate()
    scored.accumulate()
    return scored


def scores_of(evaluator, images, outputs):
    """The results of ``evaluator`` for ``outputs``, which Detectron2's may change."""
    evaluator.reset()
    evaluator.process(images, copy.deepcopy(list(outputs)))
    return evaluator.evaluate()
