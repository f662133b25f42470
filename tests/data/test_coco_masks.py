"""Masks of COCO files against pycocotools, which must not see one that does not add up."""

import json

import msgspec
import numpy as np
import pytest
from pycocotools import mask as mask_util

from gn_detect.data.coco_masks import MaskError, decode_mask, decode_runs


def runs_of(mask):
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *edges, len(pixels)]).tolist()
    return [0, *runs] if pixels[0] else runs


def test_runs_of_a_compressed_rle():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 200, 2)
        blocks = rng.random((height // 8 + 1, width // 8 + 1)) < rng.random()
        mask = np.kron(blocks, np.ones((8, 8)))[:height, :width].astype(np.uint8)
        counts = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
        assert decode_runs(counts) == runs_of(mask)


def decode(segmentation, height=8, width=6):
    return decode_mask(msgspec.Raw(json.dumps(segmentation).encode()), height, width)


def test_masks_that_add_up():
    mask = np.zeros((8, 6), np.uint8)
    mask[2:5, 1:4] = 1
    compressed = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    first, *rest = runs_of(mask)
    split = mask_util.frPyObjects({"size": [8, 6], "counts": [0, 0, first, *rest]}, 8, 6)["counts"]
    for counts in (compressed, [first, *rest], [float(first), 0, 0, *rest], split.decode()):
        assert decode({"size": [8, 6.0], "counts": counts}) == compressed
    triangle = [1, 1, 5, 1, 1, 5]
    assert decode([triangle, [1, 2, 3, 4]]) == [triangle, [1, 2, 3, 4]]
    assert decode([]) is decode(None) is None


WHOLE = mask_util.encode(np.ones((8, 6), np.uint8, order="F"))["counts"].decode()


@pytest.mark.parametrize(
    "segmentation, sentence",
    [
        ({"size": [8, 6], "counts": [40]}, "an RLE of 40 pixels, its image has 48 (8 x 6)"),
        ({"size": [6, 8], "counts": [48]}, "an RLE of [6, 8] pixels, but its image"),
        ({"size": [8, 6], "counts": [60, -12]}, "damaged counts, [60, -12]"),
        ({"size": [8, 6], "counts": [24.5, 23.5]}, "damaged counts"),
        ({"size": [8, 6], "counts": WHOLE + "1"}, "an RLE of 49 pixels"),
        ({"size": [8, 6], "counts": WHOLE[:-1] + "o"}, "damaged counts"),  # more would follow
        ({"size": [8, 6], "counts": "o" * 20 + "0"}, "damaged counts"),
        ({"size": [8, 6], "counts": "\x7f"}, "damaged counts"),
        ({"size": [8, 6], "counts": "é"}, "damaged counts"),
        ({"size": [8, 6], "counts": ""}, "damaged counts"),
        ({"size": [8, 6], "counts": None}, "neither a list of polygons"),
        ([[[1, 1], [5, 1], [1, 5]]], "neither a list of polygons"),
        ([1, 1, 5, 1, 1, 5], "neither a list of polygons"),
        ([[1, 1, 5, 1, 1, None]], "neither a list of polygons"),  # as NaN is read
        ({"counts": [48]}, "neither a list of polygons"),
        ("mask.png", "neither a list of polygons"),
        ([[1, 1, 1e6, 1, 1, 5]], "(pixels, of 100000 at most)"),
        ([[1, 1], [5, 1], [1, 5]], "a list of 3 points as its segmentation; write them as one"),
        ([[1, 1, 5, 1, 1, 5], [1, 1, 5, 1, 1, 5, 7]], "a polygon of 7 numbers; x and y come in"),
    ],
)
def test_masks_that_cannot_be_used(segmentation, sentence):
    with pytest.raises(MaskError) as error:
        decode(segmentation)
    assert sentence in str(error.value)
