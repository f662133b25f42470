"""ultralytics' YOLO, built from its YAML and so without weights, with its defaults and its own
``time``, which fits the schedule to the time."""

import os
import time
from pathlib import Path

import torch
import yaml
from detectron2.structures import Boxes, Instances

from gn_detect.data.coco_pack import read_coco
from gn_detect.data.formats import from_coco

from . import Job, Trained


def train(job: Job) -> Trained:
    # Nothing is fetched, installed, or written elsewhere; read when it is imported.
    os.environ |= {"YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0", "YOLO_CONFIG_DIR": job.folder}
    from ultralytics import YOLO

    options = dict(job.options)
    model, batches, marks = YOLO(options.pop("model")), [], []
    # On a CPU it takes one thread less than there are cores.
    model.add_callback("on_train_start", lambda _: torch.set_num_threads(job.cores))
    model.add_callback("on_train_start", lambda _: marks.append(time.perf_counter()))
    model.add_callback("on_train_batch_start", batches.append)
    model.add_callback("on_train_epoch_end", lambda _: marks.append(time.perf_counter()))
    model.train(
        data=write_yolo(job),
        time=job.seconds / 3600,
        pretrained=False,
        val=False,  # until the end
        plots=False,
        # The check of float16 would fetch weights; on a CPU there is neither.
        amp="bf16" if job.device.startswith("cuda") else False,
        device=job.device,
        workers=job.cores,
        seed=job.seed,
        project=job.folder,
        name="train",
        **options,
    )

    def predict(path: str) -> Instances:
        # What its evaluation takes.
        how = {"conf": 0.001, "iou": 0.7, "max_det": 300, "retina_masks": True, "verbose": False}
        (found,) = model.predict(path, device=job.device, **how, **options)
        return Instances(
            found.orig_shape,
            pred_boxes=Boxes(found.boxes.xyxy),
            scores=found.boxes.conf,
            pred_classes=found.boxes.cls.long(),
            pred_masks=[] if found.masks is None else found.masks.data,
        )

    return Trained(predict, job.category_ids(), len(batches), 16, marks[-1] - marks[0])


def write_yolo(job: Job) -> str:
    """The data as YOLO has it. Returns its data.yaml."""
    splits = {"train": (job.train_json, job.train_images), "val": (job.val_json, job.val_images)}
    for split, (json_file, images) in splits.items():
        data, folder = read_coco(json_file), Path(job.folder, "data", split)
        from_coco(data, folder, "yolo")
        for name in data.file_names:
            link = folder / "images" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(images, name).resolve())
    names = [category.name for category in data.categories]
    config = {"path": os.path.join(job.folder, "data"), "names": names}
    config |= {split: f"{split}/images" for split in splits}
    path = Path(job.folder, "data", "data.yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)
