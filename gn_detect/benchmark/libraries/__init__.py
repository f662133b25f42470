"""What people use instead, trained on the same images for the same time: the contestants of
``tools/compare_libraries.py``. Each has an adapter with a function ``train(job) -> Trained``, which
runs in a process of its own (``python -m gn_detect.benchmark.libraries JOB``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from detectron2.structures import Instances

PHOTOS = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
# Name -> the package that its adapter is with, and what the adapter is told.
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gn_detect": ("gn_detect", {"config": PHOTOS, "recipe": "auto"}),
    "torchvision": ("torchvision", {}),
    "yolo11n-seg": ("ultralytics", {"model": "yolo11n-seg.yaml"}),
    "yolo26n-seg": ("ultralytics", {"model": "yolo26n-seg.yaml"}),
    "mayaku-n-seg": ("mayaku", {}),
    "gn_detect-none": ("gn_detect", {"config": PHOTOS, "recipe": "none"}),
    # With images of about the size of gn_detect's, which their documentation does not advise.
    "torchvision-256": ("torchvision", {"min_size": 256, "max_size": 384}),
    "yolo11n-seg-320": ("ultralytics", {"model": "yolo11n-seg.yaml", "imgsz": 320}),
    "mayaku-n-seg-384": ("mayaku", {"size_budget": 384}),
}
USUAL = list(CONTESTANTS)[:5]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One training.

    Attributes:
        package, options: of ``CONTESTANTS``.
        folder: for what is written.
        seconds: of training, from the first batch to the last step; nothing else counts.
        cores: of the CPU that the process may use, and threads of PyTorch.
    """

    package: str
    options: dict[str, Any]
    train_json: str
    train_images: str
    val_json: str
    val_images: str
    folder: str
    seconds: float
    cores: int
    device: str
    seed: int

    def category_ids(self) -> list[int]:
        """Of the dataset, ascending, as the classes of most libraries are."""
        content = json.loads(Path(self.train_json).read_bytes())
        return sorted(category["id"] for category in content["categories"])


class Trained(NamedTuple):
    """
    Attributes:
        predict: what is in an image, by its path, in its pixels: ``pred_boxes``, ``scores``,
            ``pred_classes``, and ``pred_masks``, (N, height, width) bool.
        category_ids: class -> id of the dataset.
        seconds: of the iterations.
    """

    predict: Callable[[str], Instances]
    category_ids: Sequence[int]
    iterations: int
    images_per_iteration: int
    seconds: float


def iterations_within(seconds: float, marks: Sequence[float]) -> int:
    """How many iterations fit, by the mean of some, of which the first does not count. ``marks``:
    ``time.perf_counter()`` before the first and after each."""
    return max(2, int(seconds * (len(marks) - 2) / (marks[-1] - marks[1])))
