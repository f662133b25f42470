"""Weights that predict: they know their config, their classes, and how to be fed."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances
from PIL import Image

from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights
from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.engine.prepare import dataset_names
from gn_detect.evaluation import masks_one_by_one, with_tta
from gn_detect.evaluation.masks import PastedMasks
from gn_detect.settings import Settings

from .pixels import AnyImage, read_rgb
from .saved_config import build_mapper, build_model, find_config

MAX_MASKS = 2**32  # bytes of the masks of an image


class Predictor:
    """A trained detector, of a file of weights.

    Args:
        weights: a checkpoint of this project, ``.pth`` or ``.safetensors``, which needs nothing
            else; or any name of weights that ``checkpoint.sources.locate`` knows.
        config_file: YAML or lazy config, for weights that have none, and in place of theirs.
        opts: of the config, as on the command line: KEY, VALUE, ... or, of a lazy one, key=value.
            ``TEST.AUG.ENABLED``: with test-time augmentation (:mod:`gn_detect.evaluation.tta`).
        device: ``"cpu"``, ``"cuda"``, ...; None for CUDA where it is available.
        batch_size: of a list, how many images of one size go through the model at once. The
            results of 1 are those of an evaluation; others may differ in the last digits.

    Attributes:
        cfg: the config, YAML (``CfgNode``) or lazy (``DictConfig``).
        model: on ``device``, in evaluation mode.
        augments: runs it on several sizes of each image.
        class_names: in the order of ``pred_classes``.
        keypoint_names: in the order of ``pred_keypoints``; empty for models without.
        bit_depth_range: ``INPUT.BIT_DEPTH_RANGE``, for images with more than 8 bits.
        lock: of the model, so that threads may share it.

    Raises:
        ConfigError, WeightsError: the weights cannot be read, have no config, or are not those of
            it. Nothing in the file is run.
    """

    def __init__(
        self,
        weights: str | os.PathLike,
        *,
        config_file: str | os.PathLike = "",
        opts: Sequence[str] = (),
        device: str | torch.device | None = None,
        batch_size: int = 1,
    ):
        name = os.fspath(weights)
        found = read_weights(name)
        self.cfg = find_config(found, name, os.fspath(config_file), list(opts))
        run = Settings(self.cfg)
        self.device = _device(device)
        run["device"] = str(self.device)
        self.batch_size = batch_size
        self.lock = threading.RLock()
        mapper = build_mapper(self.cfg)
        self.model = build_model(self.cfg).eval()
        self._augmentations, self._format = mapper.augmentations, mapper.image_format
        self.bit_depth_range = tuple(getattr(mapper, "bit_depth_range", ()))
        guards = WeightGuards.from_config(self.cfg)
        checkpointer = Checkpointer(self.model, guards=guards, evaluation=True)
        self.model.load_state_dict(checkpointer.check(found, name).loaded, strict=False)
        self.augments = isinstance(self.cfg, CfgNode) and self.cfg.TEST.AUG.ENABLED
        self._run = with_tta(self.cfg, self.model) if self.augments else self.model
        self.class_names = found.names("classes") or _names(run, "num_classes")
        self.keypoint_names = []
        if run["keypoints"] and run["num_keypoints"]:
            self.keypoint_names = found.names("keypoints") or _names(run, "num_keypoints")

    def __call__(self, images: AnyImage | list[AnyImage]) -> Instances | list[Instances]:
        """Detect objects.

        Args:
            images: a path, an image of Pillow, or an array of RGB pixels, (height, width, 3)
                uint8 (:func:`.pixels.read_rgb`); or a list of these.

        Returns:
            on the CPU, in pixels of the image (its EXIF orientation applied): ``pred_boxes``
            (XYXY), ``scores``, ``pred_classes``, and of models that have them ``pred_masks``,
            (N, height, width) bool, and ``pred_keypoints``, (N, K, 3) of x, y and score. A list of
            these for a list.

        Raises:
            DataError: an image cannot be read, is of another kind, or too large.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        return [_with_tensors(found) for found in self.stream(images)]

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Instances]:
        """As a call of a list, without holding it. ``pred_masks`` are a sequence of (height, width)
        bool, each made when it is asked for, so that large images need no memory for all."""
        inputs = (self._input(self.read(image)) for image in images)
        for _, same in itertools.groupby(inputs, lambda one: one["image"].shape):
            while batch := list(itertools.islice(same, self.batch_size)):
                with (
                    self.lock,
                    _no_memory_as_sentence(),
                    torch.no_grad(),
                    masks_one_by_one(self._run),
                ):
                    results = self._run(batch)
                if "instances" not in results[0]:
                    raise ConfigError(
                        f"a {type(self.model).__name__} finds no instances, which are what is "
                        "predicted here; use the weights of a detector"
                    )
                yield from (result["instances"].to("cpu") for result in results)

    def read(self, image: AnyImage, **options) -> np.ndarray:
        """:func:`.pixels.read_rgb`, with the ``bit_depth_range`` of the config."""
        return read_rgb(image, bit_depth_range=self.bit_depth_range, **options)

    def _input(self, pixels: np.ndarray) -> dict:
        """What the model takes of RGB pixels, as the mapper of an evaluation makes it."""
        height, width = pixels.shape[:2]
        augmented = T.AugInput(convert_PIL_to_numpy(Image.fromarray(pixels), self._format))
        try:
            self._augmentations(augmented)
        except ValueError as error:  # of Pillow: a side would have no pixel
            raise DataError(
                f"an image of {width} x {height} pixels cannot be resized as the config says "
                f"({error}); cut it into pieces"
            ) from None
        image = np.ascontiguousarray(augmented.image.transpose(2, 0, 1))
        return {"image": torch.as_tensor(image), "height": height, "width": width}


@contextlib.contextmanager
def _no_memory_as_sentence() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise DataError(
            "the GPU has no memory left for the model's maps: lower batch_size (--batch) or "
            "INPUT.MIN_SIZE_TEST, or run on the CPU (device, --device)"
        ) from None


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device (--device) {device}: {reason}") from None
    return torch.device(device)


def _names(run: Settings, count: str) -> list[str]:
    """Of the data that the config names, where they are registered; else "class 0", ..."""
    key, plain = {
        "num_classes": ("thing_classes", "class"),
        "num_keypoints": ("keypoint_names", "keypoint"),
    }[count]
    for name in (n for split in ("train", "test") for n in dataset_names(run, split)):
        known = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
        if known and len(names := known.get(key, ())) == run[count]:
            return list(names)
    return [f"{plain} {number}" for number in range(run[count] or 0)]


def _with_tensors(found: Instances) -> Instances:
    if found.has("pred_masks") and isinstance(found.pred_masks, PastedMasks):
        count, (height, width) = len(found), found.image_size
        if (size := count * height * width) > MAX_MASKS:
            raise DataError(
                f"{count} masks of {width} x {height} pixels take {size / 2**30:.0f} GiB: iterate "
                "over predictor.stream([image]), whose masks are made one by one"
            )
        masks = list(found.pred_masks)
        empty = torch.zeros(0, height, width, dtype=torch.bool)
        found.pred_masks = torch.stack(masks) if masks else empty
    return found
