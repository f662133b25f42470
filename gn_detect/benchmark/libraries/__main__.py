"""Train one contestant, and write its predictions on the validation images as COCO results."""

import importlib
import json
import os
import sys
from pathlib import Path

import msgspec
import numpy as np
import torch
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from . import Detections, Job


def main(job_file: str) -> None:
    """Beside the job: ``predictions.json`` and ``run.json``, with what was set and how long it
    took."""
    job = msgspec.json.decode(Path(job_file).read_bytes(), type=Job)
    if hasattr(os, "sched_setaffinity"):  # also what the adapter starts uses these cores alone
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    torch.set_num_threads(job.cores)
    torch.manual_seed(job.seed)
    adapter = importlib.import_module(f"{__package__}.with_{job.package}")
    trained = adapter.train(job)
    results = []
    for image in COCO(job.val_json).dataset["images"]:
        found = trained.predict(os.path.join(job.val_images, image["file_name"]))
        results += to_results(image["id"], found)
    run = trained._asdict()
    del run["predict"]
    names = {"torch", "torchvision", job.package}
    run["versions"] = {name: sys.modules[name].__version__ for name in sorted(names)}
    for name, content in (("predictions", results), ("run", run)):
        Path(job.folder, f"{name}.json").write_text(json.dumps(content))


def to_results(image_id: int, found: Detections) -> list[dict]:
    """As COCO's results, with masks as compressed RLE."""
    results = []
    for box, score, category, mask in zip(*found, strict=True):
        rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
        x, y, right, bottom = map(float, box)
        results.append(
            {
                "image_id": image_id,
                "category_id": int(category),
                "bbox": [x, y, right - x, bottom - y],
                "score": float(score),
                "segmentation": {**rle, "counts": rle["counts"].decode()},
            }
        )
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
