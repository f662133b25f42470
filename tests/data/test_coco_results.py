"""Results of an evaluation, as pictures read them."""

import json

import numpy as np
import pytest
from helpers import SQUARE_RLE
from pycocotools import mask as mask_util

from gn_detect.data.coco import DataError, load_coco
from gn_detect.data.coco_results import read_results

FOUND = {"image_id": 1, "category_id": 7, "bbox": [8, 8, 24, 24], "score": 0.9}


def read(files, content, threshold=0.0, images=None):
    path = files.json_file.with_name("results.json")
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_results(str(path), load_coco(str(files.json_file)), threshold, images)


def test_results_by_image(coco_files):
    polygon, other = [8.0, 8, 32, 8, 32, 32], {**FOUND, "image_id": 3.0, "category_id": 3}
    results = [
        {**FOUND, "segmentation": SQUARE_RLE},
        {**FOUND, "score": 0.4},
        {**other, "segmentation": [polygon, [1, 1]], "other": "[{"},
    ]
    content = b"\xef\xbb\xbf" + json.dumps(results).encode()
    found = read(coco_files, content, threshold=0.5)
    ((first,), (last,)) = found[1], found[3]
    assert sorted(found) == [1, 3] and not found[2]
    assert (first.category_id, first.bbox, first.score) == (7, (8, 8, 24, 24), 0.9)
    expected = mask_util.decode(mask_util.frPyObjects(SQUARE_RLE, 64, 64))
    assert np.array_equal(mask_util.decode(first.segmentation), expected)
    assert (last.category_id, last.segmentation) == (3, [polygon])
    assert len(read(coco_files, results)[1]) == 2
    damaged = {**other, "segmentation": [[1, 2, 3, 4, 5]]}  # not looked at
    assert read(coco_files, [*results, damaged], 0.5, images=[1]) == {1: [first]}


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'[{"image_id": 1', "is not valid JSON"),
        (b"\xff\xfe[\0]\0", "is text in UTF-16 or UTF-32; save it as UTF-8"),
        (b'[{"image_id": "\xe9"}]', "is not text in UTF-8"),
        (b'[{"other": ' + b"[" * 10**5, "has lists that are nested too deeply"),
        ({}, "is not a list of COCO results, each with bbox, category_id, image_id and score"),
        ([FOUND, 5], "Expected `object`, got `int` - at `$[1]`"),
        ([{"image_id": 1}], "missing required field `category_id` - at `$[0]`"),
        ([{**FOUND, "score": "0.9"}], "Expected `float`, got `str` - at `$[0].score`"),
        ([{**FOUND, "score": float("nan")}], "Expected `float`, got `null` - at `$[0].score`"),
        ([{**FOUND, "bbox": [1, 2, 3]}], "Expected `array` of length 4 - at `$[0].bbox`"),
        ([{**FOUND, "image_id": [1]}], "got `array` - at `$[0].image_id`"),
        ([{**FOUND, "image_id": 9}], "has an object with the image_id 9 (a number), which"),
        ([{**FOUND, "image_id": "1"}], "the image_id '1' (text), which"),
        ([{**FOUND, "category_id": 7.5}], "the category_id 7.5 (a number), which"),
        (
            [{**FOUND, "segmentation": [[1, 2, 3, 4, 5]]}],
            "results.json: an object of image 1 has a polygon of 5 numbers",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(coco_files, content, sentence):
    with pytest.raises(DataError) as error:
        read(coco_files, content)
    message = str(error.value)
    assert "results.json" in message and sentence in message and "\n" not in message
