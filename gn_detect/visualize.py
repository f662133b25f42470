"""Predictions beside the ground truth, and the curves of a training.

Needs no model, GPU, display or OpenCV: `draw_pairs` reads the dataset and the
``coco_instances_results.json`` of an evaluation, `read_curves` the ``metrics.json`` of a training.
"""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gn_detect.data import DataError
from gn_detect.data.coco import check_coco_json, load_coco
from gn_detect.data.coco_check import check_masks
from gn_detect.data.coco_results import read_results
from gn_detect.data.images import read_image
from gn_detect.data.paths import find_files
from gn_detect.drawing import XYWH_TO_XYXY, draw, find_font, from_coco

SIDE, GAP = 640, 10  # pixels of the longer side of an image in a pair, and between both
TITLE = 3 * GAP  # pixels above a pair


def draw_pairs(
    dataset_json: str | os.PathLike,
    image_root: str | os.PathLike,
    results_json: str | os.PathLike,
    images: Collection[int | str],
    *,
    score_threshold: float = 0.5,
    bit_depth_range: Sequence[float] = (),
) -> Iterator[tuple[int | str, np.ndarray]]:
    """Draw ground truth, left, and predictions, right, of each of some images.

    Args:
        dataset_json: COCO-format dataset.
        image_root: folder that the "file_name" of its images is relative to.
        results_json: COCO results, a list of image_id, category_id, score, bbox (XYWH) and, if
            there are masks, segmentation. An empty list is fine.
        images: their ids.
        score_threshold: predictions below it are not drawn.
        bit_depth_range: ``INPUT.BIT_DEPTH_RANGE`` of the training.

    Yields:
        Image id; its picture, (H, W, 3) uint8 RGB, with the image twice, `SIDE` pixels long.

    Raises:
        ValueError (DataError): if a file cannot be read, or if results, dataset, images and ids do
            not match.
    """
    dataset_json, image_root = os.fspath(dataset_json), os.fspath(image_root)
    needs = ("masks", "training", "evaluation", "box_format", "exact_names")
    needs = dict.fromkeys(needs, False)
    check_coco_json(dataset_json, image_root, bit_depth_range=bit_depth_range, **needs)
    data = load_coco(dataset_json)
    files, _ = find_files(dataset_json, image_root, data.file_names, exact=False)
    check_masks(data, ~data.no_mask, scored=False)  # an object may have none
    predicted = read_results(os.fspath(results_json), data, score_threshold, images)
    classes, names = list(data.classes), list(data.classes.values())
    position = {id_: number for number, id_ in enumerate(data.image_ids)}
    for id_ in images:
        if (number := position.get(id_)) is None:
            raise DataError(f"{dataset_json} has no image {id_!r}; give ids that it has")
        path = os.path.join(image_root, files[number])
        image = Image.fromarray(read_image(path, "RGB", bit_depth_range=bit_depth_range))
        size, scale = (image.height, image.width), SIDE / max(image.size)
        image = np.asarray(image.resize([max(1, round(side * scale)) for side in image.size]))
        own = np.flatnonzero(data.image == number)
        truth = from_coco(
            data.bbox[own] @ XYWH_TO_XYXY,
            data.category[own],
            [data.segmentation(i) for i in own],
            size,
            data={"crowd": data.crowd[own]},
        )
        results = predicted[id_]
        found = from_coco(
            np.reshape([r.bbox for r in results], (-1, 4)) @ XYWH_TO_XYXY,
            np.array([classes.index(r.category_id) for r in results], int),
            [r.segmentation for r in results],
            size,
            confidence=np.array([r.score for r in results]),
        )
        titles = (
            ("ground truth", truth, int((~data.crowd[own]).sum())),
            (f"predictions ≥ {score_threshold:g}", found, len(results)),
        )
        pair = Image.new("RGB", (2 * image.shape[1] + GAP, image.shape[0] + TITLE), "white")
        for left, (title, objects, count) in zip((0, image.shape[1] + GAP), titles, strict=True):
            objects.xyxy *= scale
            objects.mask = objects.mask and objects.mask.resize(image.shape[:2])
            pair.paste(Image.fromarray(draw(image, objects, names)), (left, TITLE))
            title = f"{title}: {count} object{'s' * (count != 1)}"
            pen = ImageDraw.Draw(pair)
            pen.text((left, 0), title, "black", ImageFont.truetype(find_font(title), 20))
        yield id_, np.array(pair)


def read_curves(metrics_json: str | os.PathLike) -> dict[str, tuple[list[int], list[float]]]:
    """Read Detectron2's ``metrics.json``: key -> (increasing iterations, values, NaN included).

    Where a resumed run goes back, its values replace all later ones of the same key. (Not of every
    key: Detectron2 may write an evaluation after the losses of a later iteration.) A last line
    that a killed run cut off is ignored.

    Raises:
        ValueError: if the file cannot be read, holds no complete line, or an unreadable one, which
            is named by its number.
    """
    try:
        lines = Path(metrics_json).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{metrics_json} cannot be read ({error}); check the path") from None
    curves = defaultdict(lambda: ([], []))
    for number, line in enumerate(lines, start=1):
        try:
            scalars = msgspec.convert(json.loads(line), dict[str, float])
            iteration = int(scalars.pop("iteration"))
        except (ValueError, KeyError, OverflowError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(
                f"{metrics_json}, line {number}, is not a JSON object of numbers with an "
                "'iteration'; delete that line to draw the others"
            ) from None
        for key, value in scalars.items():
            iterations, values = curves[key]
            while iterations and iterations[-1] >= iteration:
                del iterations[-1], values[-1]
            iterations.append(iteration)
            values.append(value)
    if not curves:
        raise ValueError(f"{metrics_json} holds no complete line; let the run log an iteration")
    return dict(curves)
