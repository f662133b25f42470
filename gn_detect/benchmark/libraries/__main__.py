"""Train one contestant, and write its predictions on the validation images as COCO results."""

import importlib
import json
import os
import sys
from pathlib import Path

import msgspec
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json

from . import Job


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
    for image in json.loads(Path(job.val_json).read_bytes())["images"]:
        found = trained.predict(os.path.join(job.val_images, image["file_name"]))
        results += instances_to_coco_json(found.to("cpu"), image["id"])
    for result in results:
        result["category_id"] = trained.category_ids[result["category_id"]]
    run = trained._asdict()
    del run["predict"], run["category_ids"]
    names = {"torch", "torchvision", job.package}
    run["versions"] = {name: sys.modules[name].__version__ for name in sorted(names)}
    for name, content in (("predictions", results), ("run", run)):
        Path(job.folder, f"{name}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
