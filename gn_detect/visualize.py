"""Predictions and training curves as pictures, drawn from the files that a run leaves behind.

Needs no model, GPU, display or OpenCV: `draw_predictions` reads the dataset and the
``coco_instances_results.json`` of an evaluation, `draw_curves` the ``metrics.json`` of a training.
"""

import contextlib
import io
import json
import os
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from detectron2.data.detection_utils import check_image_size, read_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools.coco import COCO

from gn_detect.data.coco import check_coco_json

MANY = 30  # objects, above which only masks are drawn
ALPHA = 0.45  # opacity of masks
CROWD_COLOR = (0.6, 0.6, 0.6)


def draw_predictions(
    dataset_json: str | os.PathLike,
    image_root: str | os.PathLike,
    results_json: str | os.PathLike,
    output: str | os.PathLike,
    *,
    num_images: int = 8,
    score_threshold: float = 0.5,
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

    Returns:
        The path of the picture.

    Raises:
        ValueError: if a file cannot be read, or if results, dataset and images do not match.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1")
    dataset_json = os.fspath(dataset_json)
    check_coco_json(dataset_json, image_root, masks=False, training=False, evaluation=False)
    with contextlib.redirect_stdout(io.StringIO()):  # "creating index..."
        coco = COCO(dataset_json)
    predicted = defaultdict(list)
    for result in _read_results(results_json, coco):
        if result["score"] >= score_threshold:
            predicted[result["image_id"]].append(result)
    records = _choose(coco, num_images)
    columns = 2 * min(2, len(records))
    rows = -(-2 * len(records) // columns)
    figure = Figure((4.8 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    right_title = f"predictions ≥ {score_threshold:g}"
    for record, left, right in zip(records, panels[::2], panels[1::2], strict=False):
        image = _read_image(Path(image_root, record["file_name"]), record)
        _draw_panel(left, "ground truth", image, coco.imgToAnns[record["id"]], coco)
        _draw_panel(right, right_title, image, predicted[record["id"]], coco)
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
            scalars = json.loads(line)
            iteration = scalars.pop("iteration")
        except (ValueError, TypeError, KeyError, AttributeError):
            if number == len(lines):
                break
            raise ValueError(
                f"{metrics_json}, line {number}, is not a JSON object with an 'iteration'; "
                "delete that line to draw the others"
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
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); check the path") from None


def _read_results(path: str | os.PathLike, coco: COCO) -> list[dict]:
    try:
        results = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); write it again") from None
    keys = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and keys <= result.keys() for result in results
    ):
        raise ValueError(
            f"{path} is not a list of COCO results, each with {', '.join(sorted(keys))}; "
            "Detectron2's COCOEvaluator writes such a list to coco_instances_results.json"
        )
    for result in results:
        for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if result[key] not in known:
                raise ValueError(
                    f"{path} has an object with {key} {result[key]}, which the dataset does not "
                    "list; give the dataset that the results were computed on"
                )
    return results


def _choose(coco: COCO, num_images: int) -> list[dict]:
    """Records from the fewest objects to the most, then one without, or as needed."""
    records = sorted(coco.dataset["images"], key=lambda r: len(coco.imgToAnns[r["id"]]))
    empty = [record for record in records if not coco.imgToAnns[record["id"]]]
    filled = records[len(empty) :]
    number = min(len(filled), max(1, num_images - bool(empty)))
    chosen = [filled[int(i)] for i in np.linspace(0, len(filled) - 1, number)]
    return chosen + empty[: num_images - number]


def _read_image(path: Path, record: dict) -> np.ndarray:
    """The image, (H, W, 3) uint8, turned as its EXIF data says, in the size that is stated."""
    try:
        image = read_image(str(path), "RGB")
    except (OSError, SyntaxError) as error:  # Pillow's ways to say that a file is damaged
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it") from None
    check_image_size(record, image)
    return image


def _draw_panel(axes: Axes, title: str, image: np.ndarray, objects: list[dict], coco: COCO) -> None:
    """The image with masks, boxes and, if they are not too many, labels."""
    count = sum(not item.get("iscrowd") for item in objects)
    axes.set_title(f"{title}: {count} object{'s' * (count != 1)}", loc="left")
    blend = image.astype(np.float32) / 255
    # Small objects go on top of large ones, and those on crowds.
    for item in sorted(objects, key=lambda o: (not o.get("iscrowd"), -o["bbox"][2] * o["bbox"][3])):
        crowd = item.get("iscrowd")
        number = sorted(coco.cats).index(item["category_id"])
        color = CROWD_COLOR if crowd else _color(number)
        mask = _mask(item, coco)
        if mask is not None:
            blend[mask] = (1 - ALPHA) * blend[mask] + ALPHA * np.array(color)
        if count > MANY and mask is not None:
            continue
        x, y, width, height = item["bbox"]
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color))
        name = coco.cats[item["category_id"]]["name"] if len(coco.cats) > 1 else ""
        score = f"{item['score']:.2f}" if "score" in item else ""
        label = "crowd" if crowd else f"{name} {score}".strip()
        if label and count <= MANY:
            box = {"facecolor": color, "linewidth": 0, "pad": 0.5}
            above = "bottom" if y > image.shape[0] / 20 else "top"
            axes.text(x, y, label, va=above, size=8, clip_on=True, bbox=box)
    axes.imshow(blend)


def _color(number: int) -> tuple[float, float, float]:
    """Steps of the golden ratio around the hues: each class is far from those before it."""
    return matplotlib.colormaps["hsv"]((0.53 + 0.618034 * number) % 1)[:3]


def _mask(item: dict, coco: COCO) -> np.ndarray | None:
    """The mask of an annotation or a result, (H, W) bool."""
    segmentation = item.get("segmentation")
    if isinstance(segmentation, list):  # polygons; pycocotools takes those of four for boxes
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not segmentation:
        return None
    record = coco.imgs[item["image_id"]]
    mask = coco.annToMask(item | {"segmentation": segmentation}).astype(bool)
    if mask.shape != (record["height"], record["width"]):
        raise ValueError(
            f"an object has a mask of {list(mask.shape)} pixels on image {record['id']}, which has "
            f"{[record['height'], record['width']]}; give the dataset that it was computed on"
        )
    return mask


def _save(figure: Figure, output: str | os.PathLike) -> Path:
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output
