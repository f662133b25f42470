"""Large images, tile by tile."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import supervision as sv
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from supervision.detection.compact_mask import CompactMask

from gn_detect.config import ConfigError

from .joining import compact_mask, join
from .pixels import MAX_TILED_PIXELS, AnyImage
from .statistics import fixed_statistics, recorded_statistics

STATISTICS = ("tile", "image")


class TiledPredictor:
    """A predictor of images that are larger than what it was trained on.

    An image is cut into overlapping tiles, each of which is predicted as an image of its own: it is
    resized as the config says (``INPUT.MIN_SIZE_TEST``), so that ``size`` decides how large
    objects are for the model; they should be as large as they were in training. What several tiles
    see of an object becomes one (:func:`.joining.join`). An image of one tile is predicted as it
    is.

    Args:
        predictor: a ``Predictor``; or, with the statistics of tiles, any function from pixels,
            (height, width, 3) uint8 RGB, to ``Instances``.
        size: of a tile, pixels of the image. Tiles at the border are as large.
        overlap: of two tiles, as a part of ``size``. Objects that are smaller than that are whole
            in one of them.
        statistics: that GN layers normalize a tile by (:mod:`.statistics`): those of the
            ``"tile"``, or of the whole ``"image"``, found at the resolution at which it is
            predicted untiled. Without GN they are the same.

    Raises:
        ConfigError: a value is out of its range.
    """

    def __init__(
        self,
        predictor: Callable[[np.ndarray], Instances],
        size: int = 1024,
        overlap: float = 0.2,
        statistics: str = "tile",
    ):
        if size != int(size) or size < 1:
            raise ConfigError(f"--tiles is {size}; it must be the pixels of a tile's side")
        if not 0 <= overlap < 1 or int(size * (1 - overlap)) < 1:
            raise ConfigError(
                f"--overlap is {overlap:g} of tiles of {size} pixels; it must be the part of a "
                "tile that the next one shows again, from 0 to below 1"
            )
        if statistics not in STATISTICS:
            raise ConfigError(f"--statistics is {statistics!r}; known: {', '.join(STATISTICS)}")
        if statistics == "image" and not hasattr(predictor, "model"):
            raise ConfigError(
                "--statistics is 'image', but the predictor is no PyTorch model: its statistics, "
                "if any, are those of a tile"
            )
        if statistics == "image" and getattr(predictor, "augments", False):
            raise ConfigError(
                "--statistics is 'image' and TEST.AUG.ENABLED True: an image has other statistics "
                "at each of the sizes; take one of the two"
            )
        self.predictor, self.size, self.overlap = predictor, int(size), overlap
        self.statistics = statistics

    def __getattr__(self, name: str):
        return getattr(self.predictor, name)

    def __call__(self, images: AnyImage | list[AnyImage]) -> Instances | list[Instances]:
        """As ``Predictor``; but ``pred_masks`` are :class:`Masks`."""
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        return list(self.stream(images))

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Instances]:
        for image in images:
            yield self._predict(self.read(image))

    def read(self, image: AnyImage) -> np.ndarray:
        """The pixels of an image, which may be larger than one that is predicted as a whole."""
        read = getattr(self.predictor, "read", None)
        return read(image, max_pixels=MAX_TILED_PIXELS) if read else np.asarray(image)

    def _predict(self, pixels: np.ndarray) -> Instances:
        height, width = pixels.shape[:2]
        stride = int(self.size * (1 - self.overlap))
        tiles = [
            (x, y, min(x + self.size, width), min(y + self.size, height))
            for y, x in itertools.product(
                *(starts(length, self.size, stride) for length in (height, width))
            )
        ]
        if len(tiles) == 1:
            return next(self._each([pixels]))
        with self._statistics_of(pixels):
            parts = (pixels[y0:y1, x0:x1] for x0, y0, x1, y1 in tiles)
            results = zip(self._each(parts), tiles, strict=True)
            found = [on_image(instances, tile, (height, width)) for instances, tile in results]
        return to_instances(join(found, tiles), (height, width))

    def _each(self, parts: Iterable[np.ndarray]) -> Iterator[Instances]:
        stream = getattr(self.predictor, "stream", None)
        return stream(parts) if stream else map(self.predictor, parts)

    @contextlib.contextmanager
    def _statistics_of(self, pixels: np.ndarray) -> Iterator[None]:
        if self.statistics == "tile":
            yield
            return
        with self.predictor.lock:  # while its layers are not as they were
            with recorded_statistics(self.predictor.model) as statistics:
                next(self._each([pixels]))
            with fixed_statistics(statistics):
                yield


def starts(length: int, size: int, stride: int) -> list[int]:
    """Where tiles begin along a side of an image; the last one ends with it."""
    last = max(length - size, 0)
    return [*range(0, last, stride), last]


class Masks(Sequence):
    """Masks of an image, kept as run lengths of what is around each, ``compact``.

    An index gives (height, width) bool, made when it is asked for, column after column in memory,
    as COCO's encoding reads it; a slice, positions or booleans give ``Masks``.
    """

    def __init__(self, compact: CompactMask):
        self.compact = compact

    def to(self, device: torch.device | str) -> Masks:
        return self

    def __len__(self) -> int:
        return len(self.compact)

    def __getitem__(self, index) -> torch.Tensor | Masks:
        if isinstance(index, (int, np.integer)):
            crop, (x, y) = self.compact.crop(index), self.compact.offsets[index]
            mask = np.zeros(self.compact.shape[:0:-1], bool).T
            mask[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
            return torch.from_numpy(mask)
        return Masks(self.compact[index if isinstance(index, slice) else np.asarray(index)])

    def rles(self) -> list[dict]:
        """Of COCO, as its encoder makes them of each mask, in the time that the crops take."""
        (height, width), offsets = self.compact.image_shape, self.compact.offsets.tolist()
        rles = []
        for i, (x, y) in enumerate(offsets):
            crop = self.compact.crop(i)
            columns = np.zeros((height, crop.shape[1]), np.uint8, order="F")
            columns[y : y + crop.shape[0]] = crop
            (starts,) = np.nonzero(np.diff(columns.ravel("F"), prepend=0, append=0))
            edges = [0, *(starts + x * height).tolist(), height * width]
            counts = np.diff(edges[:-1] if edges[-2] == edges[-1] else edges).tolist()
            rle = {"size": [height, width], "counts": counts}
            rle = mask_util.frPyObjects(rle, height, width)
            rles.append({**rle, "counts": rle["counts"].decode()})
        return rles


def on_image(
    found: Instances, tile: tuple[int, int, int, int], size: tuple[int, int]
) -> sv.Detections:
    """What was found in a tile, in pixels of the image."""
    x, y, _, _ = tile
    data, masks = {}, None
    if found.has("pred_masks"):
        none = CompactMask.from_dense(np.zeros((0, 1, 1), bool), np.zeros((0, 4)), size)
        crops = [compact_mask(np.asarray(mask), (x, y), size) for mask in found.pred_masks]
        masks = CompactMask.merge([none, *crops])
    if found.has("pred_keypoints"):
        data["keypoints"] = found.pred_keypoints.numpy() + (x, y, 0)
    boxes = found.pred_boxes.tensor.double().numpy().reshape(-1, 4) + (x, y, x, y)
    scores, classes = found.scores.numpy(), found.pred_classes.numpy()
    return sv.Detections(boxes, masks, scores, classes, data=data)


def to_instances(found: sv.Detections, size: tuple[int, int]) -> Instances:
    """Sorted by score, as models sort."""
    found = found[np.argsort(-found.confidence, kind="stable")]
    result = Instances(size)
    result.pred_boxes = Boxes(torch.from_numpy(found.xyxy).float())
    result.scores = torch.from_numpy(found.confidence)
    result.pred_classes = torch.from_numpy(found.class_id)
    if found.mask is not None:
        result.pred_masks = Masks(found.mask)
    if "keypoints" in found.data:
        result.pred_keypoints = torch.from_numpy(found.data["keypoints"]).float()
    return result
