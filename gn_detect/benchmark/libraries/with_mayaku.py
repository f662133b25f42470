"""mayaku's smallest model for instance segmentation without weights, with its recipe for the data
(``auto_config``). Its API takes whole epochs, whose time is a large part of a short run: here its
schedule has the iterations that fit."""

import json
import os
import tempfile
import time
from pathlib import Path

import mayaku.cli.train as cli
from mayaku import from_pretrained
from mayaku.config import MayakuConfig
from mayaku.engine import IterationTimer
from mayaku.utils import select_final_weights
from pycocotools.coco import COCO

from gn_detect.data.formats.from_coco import outlines

from . import Job, Trained, iterations_within

# configs/segmentation/mayaku-n-seg.yaml of https://github.com/datamarkin/mayaku, which the wheel
# lacks, where it differs from the defaults.
MODEL = {
    "meta_architecture": "uniquery",
    "backbone": {"name": "convnext_femto", "freeze_at": 0},
    "fpn": {"out_channels": 128},
    "uniquery_head": {
        "num_proposals": 300,
        "hidden_dim": 128,
        "num_stages": 2,
        "uniquery_generator": True,
        "pooler_sampling_ratio": 1,
    },
    "uniquery_mask": {"conv_dim": 128},
}
INPUT = {
    "resize_mode": "letterbox",
    "train_scale_min": 0.64,
    "color_jitter_enabled": True,
    "mask_format": "polygon",
}
SOLVER = {
    "optimizer_name": "AdamW",
    "base_lr": 1e-4,
    "llrd_enabled": True,
    "llrd_decay": 0.9,
    "ims_per_batch": 4,
    "grad_accum_steps": 4,
    "clip_gradients_enabled": True,
    "clip_gradients_value": 1.0,
    "amp_enabled": True,
    "amp_dtype": "bf16",
    "checkpoint_period": 5000,
}


def train(job: Job) -> Trained:
    config = MayakuConfig.model_validate(
        {
            "model": MODEL,
            "input": INPUT | job.options,
            "solver": SOLVER | {"seed": job.seed},
            "test": {"eval_period": 0},
            "dataloader": {"num_workers": job.cores},
        }
    )
    resolve_schedule, train_json = cli.resolve_schedule, write_polygons(job)

    def fit(iterations: int, folder: str) -> list[float]:
        marks = []

        class Timer(IterationTimer):
            def before_train(self) -> None:
                marks.append(time.perf_counter())

            def after_step(self) -> None:
                super().after_step()
                marks.append(time.perf_counter())

        cli.IterationTimer = Timer
        # As if each iteration was an epoch.
        cli.resolve_schedule = lambda *args: resolve_schedule(iterations, 1, 1, args[-1])
        cli.run_train(
            config,
            coco_gt_json=train_json,
            image_root=Path(job.train_images),
            output_dir=Path(folder),
            device=job.device.partition(":")[0],
            # A backbone that hardly learns is for one that has learned before.
            user_set_paths={"solver.llrd_decay"},
        )
        return marks

    with tempfile.TemporaryDirectory() as folder:
        iterations = iterations_within(job.seconds, fit(4, folder))
    folder = os.path.join(job.folder, "train")
    marks = fit(iterations, folder)
    predictor = from_pretrained(select_final_weights(Path(folder)), device=job.device)
    return Trained(predictor, job.category_ids(), len(marks) - 1, 16, marks[-1] - marks[0])


def write_polygons(job: Job) -> Path:
    """The training data with outlines for masks that are RLE, which its mosaic does not take."""
    coco = COCO(job.train_json)
    for annotation in coco.dataset["annotations"]:
        if isinstance(annotation["segmentation"], dict):
            parts = outlines(coco.annToRLE(annotation))  # which compresses it
            annotation["segmentation"] = [part.ravel().tolist() for part in parts]
    path = Path(job.folder, "train.json")
    path.write_text(json.dumps(coco.dataset))
    return path
