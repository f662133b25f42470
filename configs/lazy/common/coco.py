"""COCO 2017, as Detectron2 reads it, in an order that a resumed run continues; errors name the
image, and evaluations write to the output directory of the run."""

from detectron2.config import LazyCall as L

from gn_detect.data.loader import NamingDatasetMapper, resumable_train_loader
from gn_detect.evaluation import build_evaluator

from .base import load


def coco(kind="coco", masks=True):
    """``kind``: "coco", "coco_keypoint" or "coco_panoptic_separated" (Detectron2's
    datasets/README.md says how to prepare the last)."""
    dataloader = load(f"data/{kind}.py", "dataloader")
    dataloader.train._target_ = resumable_train_loader
    dataloader.train.update(copy_paste=False, color_jitter=0.0, close_augmentation=0.15)
    dataloader.train.mapper._target_ = dataloader.test.mapper._target_ = NamingDatasetMapper
    dataloader.train.mapper.use_instance_mask &= masks
    dataloader.train.mapper.bit_depth_range = ()
    dataloader.test.mapper.bit_depth_range = "${...train.mapper.bit_depth_range}"
    dataloader.test.mapper.augmentations[0].sample_style = "choice"
    dataloader.evaluator = L(build_evaluator)(
        dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
    )
    return dataloader


def use_rgb(model, dataloader, mean, std):
    """Feed ``model`` as weights of timm's and torchvision's were trained."""
    model.input_format = dataloader.train.mapper.image_format = "RGB"
    model.pixel_mean, model.pixel_std = mean, std
