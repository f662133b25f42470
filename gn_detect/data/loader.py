"""Training data in an order that a resumed run can continue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .coco import DataError


class ResumableTrainingSampler(TrainingSampler):
    """Detectron2's TrainingSampler, one batch after the other, from any batch on.

    Detectron2 groups images by orientation after they are loaded, so where its stream stands
    depends on images that wait in its buckets. Grouping the indices gives the same batches, and
    skips ``start`` of them without loading an image.

    Args:
        groups: one group for each image; the images of a batch are of one group.
        batch_size: images per process.
        seed: of the shuffling; the same in all processes.

    Attributes:
        start: batches to skip.
    """

    def __init__(self, groups: list[int], batch_size: int, seed: int):
        super().__init__(len(groups), seed=seed)
        self.groups = groups
        self.batch_size = batch_size
        self.start = 0

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = value

    def __iter__(self) -> Iterator[int]:
        batches = itertools.islice(self._batches(), self.start, None)
        return itertools.chain.from_iterable(batches)

    def _batches(self) -> Iterator[list[int]]:
        buckets: dict[int, list[int]] = {}
        for index in super().__iter__():
            bucket = buckets.setdefault(self.groups[index], [])
            bucket.append(index)
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Detectron2's train loader, with a :class:`ResumableTrainingSampler` where it would take a
    ``TrainingSampler``, and errors that name the image.

    ``SOLVER.IMS_PER_BATCH`` counts the images of an iteration; a batch of the loader is what one
    of its ``SOLVER.ACCUMULATE_STEPS`` forward passes takes.
    """
    mapper = NamingDatasetMapper(cfg, is_train=True)
    total_batch_size = cfg.SOLVER.IMS_PER_BATCH // (cfg.SOLVER.ACCUMULATE_STEPS or 1)
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        return build_detection_train_loader(cfg, mapper=mapper, total_batch_size=total_batch_size)
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    dataset = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    by_orientation = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    sampler = ResumableTrainingSampler(
        [int(by_orientation and d["width"] > d["height"]) for d in dataset],
        batch_size=total_batch_size // comm.get_world_size(),
        seed=comm.shared_random_seed() if cfg.SEED < 0 else cfg.SEED,
    )
    return build_detection_train_loader(
        dataset,
        mapper=mapper,
        sampler=sampler,
        total_batch_size=total_batch_size,
        aspect_ratio_grouping=False,  # the sampler has done it
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Detectron2's test loader, with errors that name the image."""
    return build_detection_test_loader(
        cfg, dataset_name, mapper=NamingDatasetMapper(cfg, is_train=False)
    )


class NamingDatasetMapper(DatasetMapper):
    """Detectron2's DatasetMapper, whose errors name the image file."""

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            DataError: the image cannot be decoded, or does not fit its annotations.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:  # Pillow and Detectron2 raise too many kinds to list
            raise DataError(
                f"cannot use the image {dataset_dict['file_name']} ({type(error).__name__}: "
                f"{error}); replace it, or take it out of the annotations"
            ) from error
