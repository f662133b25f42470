"""Training data in an order that a resumed run can continue, and images that errors name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from gn_detect.config import ConfigError

from .augment import AugmentedDataset
from .coco import read_canonical
from .headers import image_size
from .images import (
    check_image_format,
    naming,
    read_image,
    read_labels,
    value_range,
)
from .keypoints import flip_indices, flip_pairs
from .sampler import ResumableSampler

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """A :func:`resumable_train_loader` of ``cfg``, with errors that name the image.

    ``SOLVER.IMS_PER_BATCH`` counts the images of an iteration; a batch of the loader is what one
    of its ``SOLVER.ACCUMULATE_STEPS`` forward passes takes.
    """
    read_canonical(*cfg.DATASETS.TRAIN, exact_names=cfg.GUARDS.FILE_NAMES)
    arguments = build_detection_train_loader.from_config(cfg, mapper=NamingDatasetMapper)
    arguments["mapper"] = NamingDatasetMapper(cfg)  # now that the data are read, and their metadata
    arguments["total_batch_size"] //= cfg.SOLVER.ACCUMULATE_STEPS or 1
    return resumable_train_loader(
        **arguments,
        copy_paste=cfg.INPUT.COPY_PASTE.ENABLED,
        color_jitter=cfg.INPUT.COLOR_JITTER,
        close_augmentation=cfg.INPUT.CLOSE_AUGMENTATION,
    )


def resumable_train_loader(
    dataset: list[dict] | Dataset,
    *,
    mapper: Callable[[dict], dict | None] | None,
    total_batch_size: int,
    sampler: Sampler[int] | None = None,
    aspect_ratio_grouping: bool = True,
    copy_paste: bool = False,
    color_jitter: float = 0.0,
    close_augmentation: float = 0.15,
    **arguments,
) -> DataLoader:
    """Detectron2's ``build_detection_train_loader``, whose order a resumed run can continue.

    Args:
        dataset: of dicts in Detectron2's format; others are passed on as they are.
        total_batch_size: images of all processes.
        sampler: a ``TrainingSampler`` if None.
        aspect_ratio_grouping: batches are of images of one orientation.
        copy_paste, color_jitter: see :class:`.augment.AugmentedDataset`; they need a list.
        close_augmentation: the share of the run, at its end, without both.

    Raises:
        ConfigError: see :class:`.augment.AugmentedDataset`.
    """
    augments = copy_paste or color_jitter
    if augments and not (isinstance(dataset, list) and 0 <= close_augmentation <= 1):
        raise ConfigError(
            "INPUT.COPY_PASTE and INPUT.COLOR_JITTER (in lazy configs copy_paste and color_jitter "
            "of dataloader.train) need a list of images in Detectron2's format, and "
            "INPUT.CLOSE_AUGMENTATION (close_augmentation) from 0 to 1, the share of the run "
            f"without them; the data is a {type(dataset).__name__}, the share {close_augmentation}"
        )
    if isinstance(dataset, list):
        sampler = ResumableSampler(
            sampler or TrainingSampler(len(dataset)),
            [_orientation(d) if aspect_ratio_grouping else 0 for d in dataset],
            batch_size=total_batch_size // comm.get_world_size(),
        )
        aspect_ratio_grouping = False  # the sampler has done it
    if augments:
        sampler.close = close_augmentation
        dicts = DatasetFromList(dataset, copy=False)
        dataset = AugmentedDataset(dicts, mapper, copy_paste=copy_paste, color_jitter=color_jitter)
        mapper = None  # the dataset has it
    return build_detection_train_loader(
        dataset,
        mapper=mapper,
        total_batch_size=total_batch_size,
        sampler=sampler,
        aspect_ratio_grouping=aspect_ratio_grouping,
        **arguments,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's test loader, with errors that name the image."""
    read_canonical(dataset_name, exact_names=cfg.GUARDS.FILE_NAMES)
    mapper = NamingDatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def _orientation(dataset_dict: dict) -> int:
    """1 for an image that is wider than high, else 0: the groups of Detectron2's loader. Where the
    dataset leaves the size to the mapper, the header of the file tells it."""
    if "width" in dataset_dict and "height" in dataset_dict:
        return int(dataset_dict["width"] > dataset_dict["height"])
    width, height = image_size(dataset_dict["file_name"])
    return int(width > height)


class NamingDatasetMapper(DatasetMapper):
    """Detectron2's DatasetMapper, with large-scale jitter (``INPUT.LSJ``, training only).

    Where the image is cut, an object's box must be found again, and that from its mask as a bitmap:
    with ``INPUT.LSJ`` or ``INPUT.CROP``, masks are bitmaps.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str,
        bit_depth_range: Sequence[float] = (),
        **arguments,
    ):
        """
        Args:
            is_train, image_format, arguments: of Detectron2's DatasetMapper.
            bit_depth_range: see :func:`.images.value_range`.

        Raises:
            ConfigError: Detectron2 cannot train on images of ``image_format``, or
                ``bit_depth_range`` is no range.
        """
        check_image_format(image_format)
        value_range("I", bit_depth_range)
        self.bit_depth_range = tuple(bit_depth_range)
        super().__init__(is_train, image_format=image_format, **arguments)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        if cfg.MODEL.KEYPOINT_ON and not is_train:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.KEYPOINT_ON = False  # no annotations are read, and no training set is needed
        args = super().from_config(cfg, is_train)
        args["bit_depth_range"] = cfg.INPUT.BIT_DEPTH_RANGE
        if args["use_keypoint"] and cfg.INPUT.KEYPOINT_FLIP_PAIRS is not None:
            names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).keypoint_names
            pairs = flip_pairs(names, cfg.INPUT.KEYPOINT_FLIP_PAIRS)
            args["keypoint_hflip_indices"] = flip_indices(names, pairs)
        jitter, crop = (is_train and c.ENABLED for c in (cfg.INPUT.LSJ, cfg.INPUT.CROP))
        if jitter and crop:
            raise ConfigError(
                "INPUT.LSJ.ENABLED and INPUT.CROP.ENABLED are both True, and both cut the image; "
                "set one of them to False"
            )
        if jitter:
            # As in Detectron2's ``new_baselines``: scale, relative to the image fit into a square;
            # then cut (at random) or pad (with gray, right and below) it to that square. What the
            # mapper pads is image to the model, what the batch does is not.
            lsj, size = cfg.INPUT.LSJ, (cfg.INPUT.LSJ.IMAGE_SIZE,) * 2
            scale = T.ResizeScale(lsj.MIN_SCALE, lsj.MAX_SCALE, *size)
            crop_or_pad = T.FixedSizeCrop(size, pad=not cfg.MODEL.GN.MASK_PADDING)
            _, *flips = args["augmentations"]  # the first one is the resizing
            args["augmentations"] = [scale, crop_or_pad, *flips]
        if (jitter or crop) and cfg.MODEL.MASK_ON:
            args.update(instance_mask_format="bitmask", recompute_boxes=True)
            if cfg.INPUT.MASK_FORMAT != "bitmask":
                logger.info("masks are made bitmaps, as INPUT.LSJ and INPUT.CROP cut them")
        return args

    def _transform_annotations(self, dataset_dict: dict, transforms, image_shape) -> None:
        if all(a.get("iscrowd", 0) for a in dataset_dict["annotations"]):
            # Detectron2 would find the boxes again from the masks, which it makes of objects only.
            del dataset_dict["annotations"]
            dataset_dict["instances"] = detection_utils.annotations_to_instances([], image_shape)
            return
        for i, transform in enumerate(transforms.transforms):
            if isinstance(transform, T.CropTransform) and self.instance_mask_format == "bitmask":
                transforms.transforms[i] = _CropTransform(**vars(transform))
            elif isinstance(transform, T.PadTransform):
                # What is padded is of no object; Detectron2 would pad masks that are RLE with the
                # 255 that means "ignore" in the semantic labels, which are done by now.
                transform.seg_pad_value = 0
        super()._transform_annotations(dataset_dict, transforms, image_shape)

    def __call__(self, dataset_dict: dict) -> dict:
        """As Detectron2's, with :func:`.images.read_image`.

        Raises:
            DataError: the image cannot be decoded, has values beyond the range, or does not fit its
                annotations.
        """
        file_name = dataset_dict["file_name"]
        image = read_image(file_name, self.image_format, bit_depth_range=self.bit_depth_range)
        with naming(file_name, (AssertionError, ValueError)):
            return self._map(copy.deepcopy(dataset_dict), image)

    def _map(self, dataset_dict: dict, image: np.ndarray) -> dict:
        detection_utils.check_image_size(dataset_dict, image)
        sem_seg = None
        if label_file := dataset_dict.pop("sem_seg_file_name", None):
            sem_seg = read_labels(label_file)
        augmented = T.AugInput(image, sem_seg=sem_seg)
        transforms = self.augmentations(augmented)
        image_shape = augmented.image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(
            np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        )
        if sem_seg is not None:
            dataset_dict["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict


class _CropTransform(T.CropTransform):
    """Leaves polygons whole: drawing them as bitmaps of the crop cuts them. Detectron2's own cuts
    them with shapely, which is needed for nothing else."""

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        return T.Transform.apply_polygons(self, polygons)
