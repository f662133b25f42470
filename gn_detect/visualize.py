"""Predictions and training curves as pictures, drawn from the files that a run leaves behind.

Needs no model, GPU, display or OpenCV: `draw_predictions` reads the dataset and the
``coco_instances_results.json`` of an evaluation, `draw_curves` the ``metrics.json`` of a training.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import msgspec
import numpy as np
from detectron2.structures.masks import polygons_to_bitmask
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as mask_util

from gn_detect.data.coco import check_coco_json, load_coco
from gn_detect.data.coco_check import check_masks
from gn_detect.data.coco_results import read_results
from gn_detect.data.images import read_image
from gn_detect.data.paths import find_files

MANY = 30  # objects, above which only masks are drawn
ALPHA = 0.45  # opacity of masks
CROWD_COLOR = (0.6, 0.6, 0.6)


class _Object(NamedTuple):
    category: int  # position of its class
    bbox: Any  # x, y, width, height
    segmentation: Any  # polygons, a compressed RLE, or nothing
    crowd: bool
    score: float | None = None


def draw_predictions(
    dataset_json: str | os.PathLike,
    image_root: str | os.PathLike,
    results_json: str | os.PathLike,
    output: str | os.PathLike,
    *,
    num_images: int = 8,
    score_threshold: float = 0.5,
    bit_depth_range: Sequence[float] = (),
) -> Path:
    """Draw ground truth and predictions side by side into one picture.

    Args:
        dataset_json: COCO-format dataset.
        image_root: folder that the "file_name" of its images is relative to.
        results_json: COCO results, a list of image_id, category_id, score, bbox (XYWH) and, if
            there are masks, segmentation. An empty list is fine.
        output: file to write, PNG or another format of Matplotlib; folders are made as needed.
        num_images: how many images at most. They range from the fewest objects to the most; one
            without objects is among them if the dataset has any.
        score_threshold: predictions below it are not drawn.
        bit_depth_range: ``INPUT.BIT_DEPTH_RANGE`` of the training.

    Returns:
        The path of the picture.

    Raises:
        ValueError (DataError): if a file cannot be read, or if results, dataset and images do not
            match.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1")
    dataset_json, image_root = os.fspath(dataset_json), os.fspath(image_root)
    needs = ("masks", "training", "evaluation", "box_format", "exact_names")
    needs = dict.fromkeys(needs, False)
    check_coco_json(dataset_json, image_root, bit_depth_range=bit_depth_range, **needs)
    data = load_coco(dataset_json)
    files, _ = find_files(dataset_json, image_root, data.file_names, exact=False)
    check_masks(data, ~data.no_mask, scored=False)  # an object may have none
    predicted = read_results(os.fspath(results_json), data, score_threshold)
    chosen = _choose(np.bincount(data.image, minlength=len(data.image_ids)), num_images)
    columns = 2 * min(2, len(chosen))
    rows = -(-2 * len(chosen) // columns)
    figure = Figure((4.8 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    classes, names = list(data.classes), list(data.classes.values())
    right_title = f"predictions ≥ {score_threshold:g}"
    for number, left, right in zip(chosen, panels[::2], panels[1::2], strict=False):
        path = os.path.join(image_root, files[number])
        image = read_image(path, "RGB", bit_depth_range=bit_depth_range)
        truth = [
            _Object(data.category[i], data.bbox[i], data.segmentation(i), bool(data.crowd[i]))
            for i in np.flatnonzero(data.image == number)
        ]
        _draw_panel(left, "ground truth", image, truth, names)
        found = [
            _Object(classes.index(r.category_id), r.bbox, r.segmentation, False, r.score)
            for r in predicted[data.image_ids[number]]
        ]
        _draw_panel(right, right_title, image, found, names)
    return _save(figure, output)


def draw_curves(metrics_json: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Draw losses, learning rate and AP of a training into one picture, ``output``, as
    `draw_predictions` does, of the ``metrics.json`` of a run; raises what `read_curves` does."""
    return _save(_curves_figure(read_curves(metrics_json)), output)


def read_curves(metrics_json: str | os.PathLike) -> dict[str, tuple[list[int], list[float]]]:
    """Read Detectron2's ``metrics.json``: key -> (increasing iterations, values, NaN included).

    Where a resumed run goes back, its values replace all later ones of the same key. (Not of every
    key: Detectron2 may write an evaluation after the losses of a later iteration.) A last line
    that a killed run cut off is ignored.

    Raises:
        ValueError: if the file cannot be read, holds no complete line, or an unreadable one, which
            is named by its number.
    """
    lines = _read_text(metrics_json).rstrip().split("\n")
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


def _curves_figure(curves: dict[str, tuple[list[int], list[float]]]) -> Figure:
    figure = Figure((15, 4.5), layout="constrained")
    loss, rate, ap = figure.subplots(1, 3)
    losses = [key for key in curves if key == "total_loss" or key.startswith("loss_")]
    losses.sort(key=lambda key: key != "total_loss")  # black and first in the legend
    for axes, title, keys in (
        (loss, "loss", losses),
        (rate, "learning rate", [key for key in curves if key == "lr"]),
        # With several test sets, the name of each comes before "bbox/AP".
        (ap, "AP", [key for key in sorted(curves) if key.endswith("/AP")]),
    ):
        axes.set(title=title if keys else f"no {title}", xlabel="iteration")
        axes.grid(alpha=0.3)
        for key in keys:
            last = f" (last: {curves[key][1][-1]:.1f})" if axes is ap else ""
            style = {"color": "black", "linewidth": 2.2} if key == "total_loss" else {}
            axes.plot(*curves[key], label=key + last, marker="o" if axes is ap else None, **style)
        if keys:
            axes.legend(fontsize="small")
    loss.set_yscale("log")  # the terms differ by orders of magnitude
    return figure


def _read_text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); check the path") from None


def _choose(counts: np.ndarray, num_images: int) -> list[int]:
    """Images from the fewest objects to the most, then one without, or as needed.

    Args:
        counts: objects of each image.
    """
    order = np.argsort(counts, kind="stable")
    empty, filled = np.split(order, [int((counts == 0).sum())])
    number = min(len(filled), max(1, num_images - bool(len(empty))))
    chosen = filled[np.linspace(0, len(filled) - 1, number).astype(int)]
    return [*chosen.tolist(), *empty[: num_images - number].tolist()]


def _draw_panel(
    axes: Axes, title: str, image: np.ndarray, objects: list[_Object], names: list[str]
) -> None:
    """The image with masks, boxes and, if they are not too many, labels."""
    count = sum(not item.crowd for item in objects)
    axes.set_title(f"{title}: {count} object{'s' * (count != 1)}", loc="left")
    blend = image.astype(np.float32) / 255
    # Small objects go on top of large ones, and those on crowds.
    for item in sorted(objects, key=lambda o: (not o.crowd, -o.bbox[2] * o.bbox[3])):
        color = CROWD_COLOR if item.crowd else _color(item.category)
        if item.segmentation:
            blend[mask := _mask(item.segmentation, *image.shape[:2])] *= 1 - ALPHA
            blend[mask] += ALPHA * np.array(color)
            if count > MANY:
                continue
        x, y, width, height = item.bbox
        far = 2 * max(image.shape)  # beyond which Matplotlib loses count
        x, y, right, bottom = np.clip([x, y, x + width, y + height], -far, far)
        axes.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor=color))
        name = names[item.category] if len(names) > 1 else ""
        score = "" if item.score is None else f"{item.score:.2f}"
        label = "crowd" if item.crowd else f"{name} {score}".strip()
        if label and count <= MANY:
            box = {"facecolor": color, "linewidth": 0, "pad": 0.5}
            above = "bottom" if y > image.shape[0] / 20 else "top"
            style = {"va": above, "size": 8, "clip_on": True, "bbox": box, "parse_math": False}
            axes.text(x, y, label, **style)
    axes.imshow(blend)


def _color(number: int) -> tuple[float, float, float]:
    """Steps of the golden ratio around the hues: each class is far from those before it."""
    return matplotlib.colormaps["hsv"]((0.53 + 0.618034 * number) % 1)[:3]


def _mask(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) bool."""
    if isinstance(segmentation, dict):
        return mask_util.decode(segmentation).astype(bool)
    return polygons_to_bitmask([np.asarray(polygon) for polygon in segmentation], height, width)


def _save(figure: Figure, output: str | os.PathLike) -> Path:
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output
