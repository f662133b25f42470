"""What overlapping tiles show of an object, made one.

A detection is a *part* if it reaches a border of its tile within the image, else it is *whole*.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import supervision as sv
from supervision.detection.compact_mask import CompactMask

SAME = 0.5  # IoU of two detections of one object
REACHES = 0.01  # a border: ends so near to it, of the tile's longer side

Box = tuple[int, int, int, int]  # x0, y0, x1, y1


def join(found: Sequence[sv.Detections], tiles: Sequence[Box]) -> sv.Detections:
    """The objects of an image.

    Parts that lie within another tile, which goes on beyond the border that they reach and cuts
    them nowhere else, are dropped. Of whole detections of one object, in different tiles, that of
    the highest score is kept. Parts that agree where their tiles overlap are of an object that is
    larger than the overlap: their masks and boxes are united, with the highest of their scores.

    Args:
        found: of each tile, in pixels of the image; masks are ``CompactMask``.
        tiles: their places.
    """
    objects = sv.Detections.merge(list(found))
    if not len(objects):
        return found[0]  # which has all fields
    places, number = np.array(tiles), np.repeat(np.arange(len(tiles)), [len(f) for f in found])
    image = places.max(axis=0)[2:]
    part = _reached(objects.xyxy, places[number], image).any(axis=1)
    kept = ~_better_seen(objects.xyxy, places, number, image)
    objects, number, part = objects[kept], number[kept], part[kept]
    pairs = _pairs(objects, part, number, places)
    single, score = np.ones(len(objects), bool), objects.confidence
    for a, b in sorted(pairs, key=lambda pair: -score[list(pair)].max()):
        if not part[a] and single[a] and single[b]:
            single[b if score[a] >= score[b] else a] = False
    groups = _groups([(a, b) for a, b in pairs if part[a]], single)
    return sv.Detections.merge([_union(objects[np.array(group)]) for group in groups])


def _reached(boxes: np.ndarray, tiles: np.ndarray, image: np.ndarray) -> np.ndarray:
    """The borders of its tile within the image that each box reaches: left, top, right, bottom."""
    low, high = tiles[:, :2], tiles[:, 2:]
    margin = REACHES * (high - low).max(axis=1, keepdims=True)
    at_low = (boxes[:, :2] <= low + margin) & (low > 0)
    at_high = (boxes[:, 2:] >= high - margin) & (high < image)
    return np.concatenate([at_low, at_high], axis=1)


def _better_seen(
    boxes: np.ndarray, tiles: np.ndarray, number: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Which boxes another tile shows without a border that they reach, and with no other."""
    outward, own = np.array([-1, -1, 1, 1]), tiles[number]
    reached, better = _reached(boxes, own, image), np.zeros(len(boxes), bool)
    for tile in tiles:
        within = (boxes * outward <= tile * outward).all(axis=1)
        beyond = reached & (tile * outward > own * outward)
        cut = _reached(boxes, np.broadcast_to(tile, own.shape), image) & (tile != own)
        better |= within & beyond.any(axis=1) & ~cut.any(axis=1)
    return better


def _pairs(
    objects: sv.Detections, part: np.ndarray, number: np.ndarray, tiles: np.ndarray
) -> list[tuple[int, int]]:
    """Of detections of one object, in different tiles: both whole, or both parts."""
    kind, area = np.stack([objects.class_id, part], 1), _Area(objects)
    everywhere = np.array([-np.inf, -np.inf, np.inf, np.inf])
    pairs = []
    for i, j in itertools.combinations(range(len(tiles)), 2):
        region = _common(tiles[i], tiles[j])
        if (region[2:] <= region[:2]).any():
            continue
        first, second = np.flatnonzero(number == i), np.flatnonzero(number == j)
        low = np.maximum(area.boxes[first, None, :2], area.boxes[None, second, :2])
        high = np.minimum(area.boxes[first, None, 2:], area.boxes[None, second, 2:])
        alike = (kind[first, None] == kind[None, second]).all(axis=2)
        for a, b in np.argwhere(alike & (high > low).all(axis=2)):
            a, b = int(first[a]), int(second[b])
            within = region if part[a] else everywhere  # where both could be seen
            both = area([a, b], within)
            if both >= SAME * (area([a], within) + area([b], within) - both) > 0:
                pairs.append((a, b))
    return pairs


class _Area:
    """Of what is in all of some objects, and within a region, in pixels.

    Attributes:
        boxes: around the masks, or where there are none, those of the detections; (N, 4).
    """

    def __init__(self, objects: sv.Detections):
        self.masks, self.boxes = objects.mask, objects.xyxy
        if self.masks is not None:
            self.boxes = self.masks.bbox_xyxy + (0, 0, 1, 1)  # its last pixels are within

    def __call__(self, indices: list[int], within: np.ndarray) -> float:
        for box in self.boxes[indices]:
            within = _common(within, box)
        sides = np.clip(within[2:] - within[:2], 0, None)
        if self.masks is None or not sides.all():
            return sides.prod()
        x0, y0, x1, y1 = within.astype(int)
        crops = [
            self.masks.crop(i)[y0 - y : y1 - y, x0 - x : x1 - x]
            for i, (x, y, _, _) in zip(indices, self.boxes[indices], strict=True)
        ]
        return np.logical_and.reduce(crops).sum()


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])])


def _groups(pairs: Sequence[tuple[int, int]], kept: np.ndarray) -> list[list[int]]:
    """The indices that are ``kept``, those that are connected together."""
    group = {int(i): [int(i)] for i in np.flatnonzero(kept)}
    for a, b in pairs:
        if kept[a] and kept[b] and group[a] is not group[b]:
            group[a].extend(group[b])
            for i in group[b]:
                group[i] = group[a]
    return list({id(g): g for g in group.values()}.values())


def _union(parts: sv.Detections) -> sv.Detections:
    best = int(parts.confidence.argmax())
    one = parts[[best]]
    if len(parts) == 1:
        return one
    one.xyxy = np.concatenate([parts.xyxy[:, :2].min(0), parts.xyxy[:, 2:].max(0)])[None]
    if (masks := parts.mask) is not None:
        (x0, y0), (x1, y1) = masks.offsets.min(axis=0), masks.bbox_xyxy[:, 2:].max(axis=0)
        union = np.zeros((y1 - y0 + 1, x1 - x0 + 1), bool)
        for i, (x, y) in enumerate(masks.offsets - (x0, y0)):
            crop = masks.crop(i)
            union[y : y + crop.shape[0], x : x + crop.shape[1]] |= crop
        one.mask = compact_mask(union, (x0, y0), masks.image_shape)
    if "keypoints" in parts.data:  # each from where it is seen best
        points = parts.data["keypoints"]
        best = points[..., 2].argmax(axis=0)
        one.data["keypoints"] = points[best, np.arange(len(best))][None]
    return one


def compact_mask(mask: np.ndarray, offset: tuple[int, int], size: tuple[int, int]) -> CompactMask:
    """A mask, (h, w) bool, whose first pixel is at ``offset`` (x, y) of an image of (height,
    width)."""
    x0, y0, x1, y1 = sv.mask_to_xyxy(mask[None])[0]
    tight = CompactMask.from_dense(mask[None], np.array([[x0, y0, x1, y1]]), mask.shape)
    return tight.with_offset(int(offset[0]), int(offset[1]), size)
