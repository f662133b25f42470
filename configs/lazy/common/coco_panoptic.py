"""COCO 2017 instances and stuff (Detectron2's datasets/README.md says how to prepare them)."""

from detectron2.config import LazyCall as L

from gn_detect.evaluation import build_evaluator

from .coco import dataloader

dataloader.train.dataset.update(names="coco_2017_train_panoptic_separated", filter_empty=False)
dataloader.test.dataset.names = "coco_2017_val_panoptic_separated"
dataloader.evaluator = L(build_evaluator)(
    dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
)
