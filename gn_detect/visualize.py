"""Predictions and training curves as pictures, drawn from the files that a run leaves behind.

Needs no model, GPU, display or OpenCV: `draw_predictions` reads the dataset and the
``coco_instances_results.json`` of an evaluation, `draw_curves` the ``metrics.json`` of a training.
"""

import colorsys
import functools
import json
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

PANEL = (480, 400)  # the space that an image is fitted into: width, height in pixels
GAP, TITLE = 10, 26  # between panels, above each panel; pixels
FEW, MANY = 12, 30  # objects: up to FEW, labels are large; above MANY, only masks are drawn
ALPHA = 0.45  # opacity of masks
CROWD_COLOR = (160, 160, 160)


@dataclass
class Instance:
    """One object to draw: box in XYXY pixels, boolean mask (H, W) or None, label ("" for none)."""

    box: Sequence[float]
    mask: np.ndarray | None
    color: tuple[int, int, int]
    label: str = ""
    crowd: bool = False


def draw_predictions(
    dataset_json: str | os.PathLike,
    image_root: str | os.PathLike,
    results_json: str | os.PathLike,
    output: str | os.PathLike,
    *,
    num_images: int = 8,
    score_threshold: float = 0.5,
    columns: int = 2,
    seed: int = 0,
) -> Path:
    """Draw ground truth and predictions side by side into one PNG.

    Args:
        dataset_json: COCO-format dataset.
        image_root: folder that the "file_name" of its images is relative to.
        results_json: COCO results, a list of image_id, category_id, score, bbox (XYWH) and, if
            there are masks, segmentation. An empty list is fine.
        output: PNG to write; folders are made as needed.
        num_images: how many images at most. They range from few objects to many; one without
            objects is among them if the dataset has any.
        score_threshold: predictions below it are not drawn.
        columns: image pairs per row.
        seed: another seed chooses other images, the same one always the same.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError: if a JSON or a chosen image is missing.
        ValueError: if a file is damaged, or if results, dataset and images do not match.
    """
    if num_images < 1 or columns < 1:
        raise ValueError(f"num_images ({num_images}) and columns ({columns}) must be at least 1")
    dataset, results = _load_json(dataset_json), _load_json(results_json)
    if not isinstance(dataset, dict) or not dataset.get("images") or "categories" not in dataset:
        raise ValueError(f"{dataset_json} is not a COCO dataset with 'images' and 'categories'")
    _check_results(results, results_json)
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    ids = {record["id"] for record in dataset["images"]}
    truth, predicted = defaultdict(list), defaultdict(list)
    for objects, by_image, source in (
        (dataset.get("annotations", []), truth, dataset_json),
        (results, predicted, results_json),
    ):
        for item in objects:
            if by_image is truth and item["image_id"] not in ids:
                continue  # Detectron2 skips it, too
            for key, known in (("image_id", ids), ("category_id", names)):
                if item[key] not in known:
                    raise ValueError(
                        f"{source} has an object with {key} {item[key]}, which {dataset_json} does "
                        "not list; give the dataset that the results were computed on"
                    )
            if by_image is truth or item["score"] >= score_threshold:
                by_image[item["image_id"]].append(item)

    panels = []
    for record in _choose(dataset["images"], truth, num_images, random.Random(seed)):
        image = _read_image(Path(image_root, record["file_name"]), record, dataset_json)
        for title, objects, source in (
            ("ground truth", truth[record["id"]], dataset_json),
            (f"predictions ≥ {score_threshold:g}", predicted[record["id"]], results_json),
        ):
            instances = [_instance(o, record, names, image.size, source) for o in objects]
            panels.append(_draw_panel(image, title, instances))
    sheet = _grid(panels, min(2 * columns, len(panels)))
    return _write_png(output, lambda file: sheet.save(file, format="PNG"))


def overlay(image: np.ndarray, instances: Sequence[Instance], alpha: float = ALPHA) -> np.ndarray:
    """Blend the masks of ``instances`` over ``image``, in order.

    A pixel inside becomes ``(1 - alpha) * image + alpha * color``; the outermost two pixels of a
    mask get its plain color, so that touching objects stay apart. A crowd is hatched: only
    alternate diagonal stripes are filled. Pixels outside every mask do not change.

    Args:
        image: uint8 RGB of shape (H, W, 3), not modified.
        instances: those without a mask are skipped.
        alpha: opacity of the filling, from 0 to 1.

    Returns:
        uint8 RGB of shape (H, W, 3).
    """
    out = image.astype(np.float32)
    rows, cols = np.indices(image.shape[:2], sparse=True)
    stripes = (rows + cols) // 5 % 2 == 0
    for instance in instances:
        if instance.mask is not None:
            color = np.asarray(instance.color, dtype=np.float32)
            filled = instance.mask & stripes if instance.crowd else instance.mask
            out[filled] = (1 - alpha) * out[filled] + alpha * color
            out[instance.mask & ~_erode(_erode(instance.mask))] = color
    return np.rint(out).astype(np.uint8)


def read_curves(metrics_json: str | os.PathLike) -> dict[str, tuple[list[int], list[float]]]:
    """Read Detectron2's ``metrics.json``: key -> (increasing iterations, values, NaN included).

    Where a resumed run goes back, its values replace all later ones of the same key. (Not of every
    key: Detectron2 may write an evaluation after the losses of a later iteration.) A last line
    that a killed run cut off is ignored.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it holds no complete line, or an unreadable one, named by its number.
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


def draw_curves(metrics_json: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Draw losses, learning rate and AP of a training into one PNG.

    Args:
        metrics_json: the ``metrics.json`` that Detectron2 writes to its OUTPUT_DIR.
        output: PNG to write; folders are made as needed.

    Returns:
        The path of the PNG.

    Raises:
        FileNotFoundError, ValueError: see `read_curves`.
    """
    figure = _curves_figure(read_curves(metrics_json))
    return _write_png(output, lambda file: figure.savefig(file, format="png", dpi=110))


def _curves_figure(curves):
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, ap = figure.subplots(1, 3)
    losses = [key for key in curves if key == "total_loss" or key.startswith("loss_")]
    losses.sort(key=lambda key: key != "total_loss")  # black and first in the legend
    for axes, title, keys, empty in (
        (loss, "loss", losses, "no losses"),
        (rate, "learning rate", ["lr"] if "lr" in curves else [], "no learning rate"),
        # With several test sets, the name of each comes before "bbox/AP".
        (ap, "AP", [key for key in sorted(curves) if key.endswith("/AP")], "no evaluation"),
    ):
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
        for key in keys:
            last = f" (last: {curves[key][1][-1]:.1f})" if axes is ap else ""
            style = {"color": "black", "linewidth": 2.2} if key == "total_loss" else {}
            axes.plot(*curves[key], label=key + last, marker="o" if axes is ap else None, **style)
        if not keys:
            axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center")
        elif axes is not rate:
            axes.legend(ncols=3 if axes is loss else 1, fontsize="small", loc="best")
    if any(value > 0 for key in losses for value in curves[key][1]):
        loss.set_yscale("log")  # the terms differ by orders of magnitude
    return figure


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None


def _load_json(path):
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); write it again") from None


def _check_results(results, path):
    keys = ("image_id", "category_id", "bbox", "score")
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and all(key in result for key in keys) for result in results
    ):
        raise ValueError(
            f"{path} is not a list of COCO results, each with {', '.join(keys)}; Detectron2's "
            "COCOEvaluator writes such a list to coco_instances_results.json"
        )


def _choose(records, truth, num_images, rng):
    """One record from each quantile of object counts, then one without objects, or as needed."""
    filled = sorted((r for r in records if truth[r["id"]]), key=lambda r: len(truth[r["id"]]))
    empty = [r for r in records if not truth[r["id"]]]
    num_filled = min(len(filled), num_images - (1 if empty and num_images > 1 else 0))
    bounds = [len(filled) * i // num_filled for i in range(num_filled + 1)] if filled else []
    chosen = [filled[rng.randrange(*ends)] for ends in pairwise(bounds)]
    return chosen + rng.sample(empty, min(len(empty), num_images - len(chosen)))


def _read_image(path, record, dataset_json):
    """The image at the size of a panel, turned as its EXIF data says, as Detectron2 does."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; give the folder that file names in {dataset_json} start from"
        ) from None
    except (OSError, SyntaxError) as error:  # Pillow's ways to say that a file is damaged
        raise ValueError(f"{path} cannot be read as an image ({error}); replace it") from None
    if image.size != (record["width"], record["height"]):
        raise ValueError(
            f"{path} is {image.width}x{image.height} pixels, but {dataset_json} says "
            f"{record['width']}x{record['height']}; correct the width and height there"
        )
    scale = min(panel / side for panel, side in zip(PANEL, image.size, strict=True))
    return image.resize([max(1, round(side * scale)) for side in image.size])


def _instance(annotation, record, names, size, source):
    """An annotation or a result as an `Instance` in a panel of ``size`` (width, height)."""
    height, width = record["height"], record["width"]
    rle = annotation.get("segmentation")
    if isinstance(rle, list):  # polygons; pycocotools takes those of four numbers for boxes
        polygons = [polygon for polygon in rle if len(polygon) >= 6]
        rle = polygons and mask_util.merge(mask_util.frPyObjects(polygons, height, width))
    elif rle and isinstance(rle["counts"], list):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    mask = None
    if rle:
        if list(rle["size"]) != [height, width]:
            raise ValueError(
                f"{source} has a mask of {rle['size']} pixels on image {record['id']}, which has "
                f"{[height, width]}; give the dataset that it was computed on"
            )
        # Bilinear, then a threshold: an enlarged contour stays smooth.
        mask = Image.fromarray(mask_util.decode(rle) * np.uint8(255))
        mask = np.asarray(mask.resize(size, Image.Resampling.BILINEAR)) >= 128
    x, y, w, h = (value * size[0] / width for value in annotation["bbox"])
    box = (x, y, x + w, y + h)
    if annotation.get("iscrowd"):
        return Instance(box, mask, CROWD_COLOR, "crowd", crowd=True)
    name = names[annotation["category_id"]] if len(names) > 1 else ""
    score = f"{annotation['score']:.2f}" if "score" in annotation else ""
    color = _color(sorted(names).index(annotation["category_id"]))
    return Instance(box, mask, color, f"{name} {score}".strip())


def _color(index):
    """Steps of the golden ratio around the hues: each class is far from those before it."""
    hue, saturation = (0.53 + 0.618034 * index) % 1, (0.9, 0.6)[index // 5 % 2]
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(hue, saturation, 1.0))


def _erode(mask):
    padded = np.pad(mask, 1)
    across, down = padded[1:-1, 2:] & padded[1:-1, :-2], padded[2:, 1:-1] & padded[:-2, 1:-1]
    return mask & across & down


def _draw_panel(image, title, instances):
    """The image under its title, with masks, boxes and as many labels as there is room for."""
    count = sum(not i.crowd for i in instances)
    # Small objects go on top of large ones, and those on crowds.
    instances = sorted(
        instances, key=lambda i: (not i.crowd, -(i.box[2] - i.box[0]) * (i.box[3] - i.box[1]))
    )
    image = Image.fromarray(overlay(np.asarray(image), instances))
    draw = ImageDraw.Draw(image)
    for i in instances:
        if i.mask is None or (count <= MANY and not i.crowd):
            draw.rectangle(i.box, outline=i.color, width=2 if count <= FEW else 1)
    placed = []
    for i in instances if count <= MANY else []:
        _draw_label(draw, image.size, i, placed, few=count <= FEW)
    title, font = f"{title}: {count} object{'s' * (count != 1)}", _font(18)
    width = max(image.width, int(font.getlength(title)) + 1)
    panel = Image.new("RGB", (width, image.height + TITLE), "white")
    panel.paste(image, (0, TITLE))
    ImageDraw.Draw(panel).text((0, 2), title, "black", font)
    return panel


def _draw_label(draw, size, instance, placed, few):
    """Print a label at its box unless it would be far wider than that or hide another one."""
    x0, y0, x1, y1 = instance.box
    font = _font(14 if few else 11)
    width, height = font.getlength(instance.label) + 4, font.size + 3
    if not instance.label or width > (x1 - x0) * (3 if few else 1):
        return
    left = min(max(x0, 0), size[0] - width)
    for top in (y0 - height, y0, y1):
        place = (left, top, left + width, top + height)
        inside = top >= 0 and place[3] <= size[1]
        if inside and not any(_overlap(place, other) for other in placed):
            placed.append(place)
            draw.rectangle(place, fill=instance.color)
            bright = np.dot(instance.color, (0.299, 0.587, 0.114)) > 100
            draw.text((left + 2, top), instance.label, "black" if bright else "white", font)
            return


def _overlap(a, b):
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


@functools.cache
def _font(size):
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _grid(panels, columns):
    """The panels in rows of equal cells; the gap around a pair is twice the one inside it."""
    width = GAP + max(panel.width for panel in panels)
    height = GAP + max(panel.height for panel in panels)
    xs = [column * width + (column // 2 + 1) * GAP for column in range(columns)]
    sheet = Image.new("RGB", (xs[-1] + width, -(-len(panels) // columns) * height + GAP), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (xs[i % columns], i // columns * height + GAP))
    return sheet


def _write_png(output, save):
    """Write through a temporary file, so that a run that dies leaves no half picture."""
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} must end in .png: pictures are written as PNG")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output
