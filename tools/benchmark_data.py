#!/usr/bin/env python3
"""What reading and scoring COCO costs, on generated data of its size.

    python tools/benchmark_data.py read    a training set of 118,287 images, 860,001 annotations
    python tools/benchmark_data.py score   1,000 images with 100 detections each

CPU seconds and peak memory, each of a process of its own.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
from tabulate import tabulate

POINTS = 25  # of a polygon
SIDE = 640  # of an image, in pixels
CLASSES = 80


def write_coco(path: Path, num_images: int, num_annotations: int) -> None:
    """Polygons of random place and size, in images that are not there."""
    rng = np.random.default_rng(0)
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": SIDE, "width": SIDE}
        for i in range(1, num_images + 1)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    with open(path, "wb") as f:
        f.write(b'{"images":' + msgspec.json.encode(images))
        f.write(b',"categories":' + msgspec.json.encode(categories) + b',"annotations":[')
        for first in range(0, num_annotations, 10_000):
            count = min(10_000, num_annotations - first)
            radius = rng.uniform(8, 100, (count, 1, 1))
            centre = rng.uniform(radius, SIDE - radius, (count, 1, 2))
            polygons = (centre + radius * circle * rng.uniform(0.7, 1, (count, POINTS, 1))).round(2)
            low, high = polygons.min(axis=1), polygons.max(axis=1)
            boxes = np.concatenate([low, high - low], axis=1).round(2)
            columns = zip(
                rng.integers(1, num_images + 1, count).tolist(),
                rng.integers(1, CLASSES + 1, count).tolist(),
                boxes.tolist(),
                boxes[:, 2:].prod(axis=1).round(2).tolist(),
                polygons.reshape(count, -1).tolist(),
                strict=True,
            )
            keys = ("image_id", "category_id", "bbox", "area", "segmentation")
            annotations = [
                {**dict(zip(keys, (*row, [polygon]), strict=True)), "id": i, "iscrowd": 0}
                for i, (*row, polygon) in enumerate(columns, first + 1)
            ]
            text = msgspec.json.encode(annotations)[1:-1]
            f.write(b"," + text if first else text)
        f.write(b"]}")


def write_results(path: Path, truth: Path, num_images: int, detections: int) -> None:
    """Each object with some noise, and other boxes and masks of random place."""
    rng = np.random.default_rng(1)
    annotations = json.loads(truth.read_text())["annotations"]
    results = []
    for i in range(num_images * detections):
        source = annotations[i % len(annotations)]
        shift = rng.normal(0, 4, 2).round(1)
        points = np.reshape(source["segmentation"][0], (-1, 2)) + shift
        low, high = points.min(axis=0), points.max(axis=0)
        results.append(
            {
                "image_id": source["image_id"] if i < len(annotations) else i % num_images + 1,
                "category_id": source["category_id"],
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "segmentation": _rle(points),
                "score": float(rng.random()),
            }
        )
    path.write_bytes(msgspec.json.encode(results))


def _rle(points: np.ndarray) -> dict:
    from pycocotools import mask

    rle = mask.frPyObjects([points.clip(0, SIDE).ravel().tolist()], SIDE, SIDE)[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def check_and_load(folder: Path) -> None:
    from detectron2.data import DatasetCatalog

    from gn_detect.data.coco import check_coco_json, register_coco_json

    truth, images = str(folder / "truth.json"), str(folder / "images")
    check_coco_json(truth, images, masks=True, training=True, evaluation=True, headers=False)
    register_coco_json("generated", truth, images)
    DatasetCatalog.get("generated")


def load_with_detectron2(folder: Path) -> None:
    from detectron2.data.datasets import load_coco_json

    load_coco_json(str(folder / "truth.json"), str(folder / "images"), "generated")


def score(folder: Path, which: str) -> None:
    ...
