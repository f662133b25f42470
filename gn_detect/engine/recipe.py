"""A recipe from the data (``--recipe auto``): sizes of images, anchors, RoIs, length of the run.

Each rule is a function of a summary of the training data and of what the config states; it gives
rows of a setting, a value and the reason. What the user typed stays, and the rules after it follow
what was typed.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from gn_detect.config import ConfigError
from gn_detect.data.anchors import best_iou, fit_aspect_ratios, fit_sizes
from gn_detect.data.coco import load_coco
from gn_detect.data.model_input import ModelInput
from gn_detect.data.summary import DataSummary, summarize
from gn_detect.distributed import from_first_process
from gn_detect.settings import Settings
from gn_detect.solver.schedule import images_of_iteration

from .describe_data import model_input, resizings

logger = logging.getLogger(__name__)

SMALL_OBJECT = 16  # pixels: 4 positions of P2, whose stride is 4
CROP_OBJECTS = 4  # that a crop holds on average, so that few are empty
EVALUATIONS = 10  # of a run


class Row(NamedTuple):
    """A decision: ``run[name] = value``, and why."""

    name: str
    value: Any
    reason: str


def resolve_recipe(run: Settings, names: Sequence[str], processes: int) -> None:
    """Derive the recipe of a run from the training data ``names``, in place, and log it.

    Raises:
        ConfigError: they are not one dataset in COCO format.
    """
    files = [MetadataCatalog.get(name).get("json_file") for name in names]
    if len(files) != 1 or not files[0]:
        raise ConfigError(
            f"--recipe auto follows one training set in COCO format, and {run.keys['train_data']} "
            f"is {', '.join(names)}; give --train-json, or --recipe none"
        )

    def derive() -> list[Row]:
        strides = getattr(model_input(run.cfg).anchors, "strides", ())
        return derive_recipe(run, summarize(load_coco(files[0]), ModelInput()), strides, processes)

    apply_recipe(run, from_first_process(derive))


def derive_recipe(
    run: Settings, summary: DataSummary, strides: Sequence[int], processes: int = 1
) -> list[Row]:
    """The recipe of a run of a YAML config; the config is left as it is.

    Args:
        summary: of the training data.
        strides: of the levels that have anchors, in pixels; empty where anchors do not follow.
        processes: on all machines.
    """
    if not len(summary.boxes):
        return []
    trial = Settings(run.cfg.clone(), run.typed)
    trial.cfg.defrost()
    rows = []
    for row in itertools.chain(  # of generators, each of which sees what those before have set
        image_sizes(trial, summary),
        anchors(trial, summary, strides),
        crowds(trial, summary),
        balance(trial, summary),
        images_per_step(trial, processes),
        schedule(trial, summary, processes),
    ):
        rows.append(row)
        if not trial.is_typed(row.name):
            trial[row.name] = row.value
    return rows


def apply_recipe(run: Settings, rows: Sequence[Row]) -> None:
    """Set ``rows`` in ``run``, but for what was typed, and log them as a table."""
    if not rows:
        logger.warning("--recipe auto: the training data have no objects; the config's stays")
        return
    stated = [run[row.name] for row in rows]
    table = [
        [run.keys[row.name], row.value, "" if row.value == before else before, row.reason]
        for row, before in zip(rows, stated, strict=True)
        if run.derive(*row)
    ]
    header = ["key", "value", "in place of", "reason"]
    logger.info(
        "recipe from the data (--recipe none leaves the config's):\n"
        + tabulate(table, header, disable_numparse=True, maxcolwidths=[None, 34, 34, 60])
    )


def image_sizes(run: Settings, summary: DataSummary) -> Iterator[Row]:
    """Small objects, by their median (the lower quartile of all), get 16 pixels, as far as twice
    the config's size does. Where they have 32, no image need be enlarged more than twice.

    A step costs what the config's does where images are full enough to train on crops of them, as
    large-scale jitter does (Ghiasi et al., https://arxiv.org/abs/2012.07177, section 3).
    """
    sizes, side = run["min_size_train"], run["min_size_test"]
    if run["lsj"] or not side or not all(sizes):  # or images keep the size of their files
        return
    shorter = summary.image_sizes.min(axis=1)
    relative = np.sqrt(summary.boxes.prod(axis=1)) / shorter[summary.object_image]
    small, native = float(np.quantile(relative, 0.25)), float(np.median(shorter))
    stated, why, crops = side, "the config's is enough", False
    if run.is_typed("min_size_test"):
        stated, why = statistics.fmean(sizes), "as typed"
    elif run.is_typed("min_size_train"):
        side, why = round(statistics.fmean(sizes)), "as typed"
    elif side * small < SMALL_OBJECT:
        side = min(_up(SMALL_OBJECT / small, 32), 2 * side)
        why = "twice the config's" if side == 2 * stated else f"the config's {stated} is too small"
        crops = not any(map(run.is_typed, ("crop", "crop_type", "crop_size")))
    elif side > 2 * native:  # small objects of COCO, below 32 pixels, gain from more
        side = min(max(_up(2 * native, 32), _up(2 * SMALL_OBJECT / small, 32)), side)
        if side < stated:
            why = f"the config's {stated} is {stated / native:.2g} times the images"
    reason = (
        f"the median small object, {_digits(small * native):g} pixels in images of {native:.0f}, "
        f"gets {_digits(small * side):g} ({why})"
    )
    yield Row("min_size_test", side, reason)
    if side == stated:
        return
    yield Row("max_size_test", _up(run["max_size_test"] * side / stated, 32), "in proportion")
    share = round(stated / side, 3)
    objects = _objects(summary) * share**2
    if crops and objects >= CROP_OBJECTS:
        reason = f"the same scale for the pixels of the config; {objects:.0f} objects on average"
        yield Row("crop", True, reason)
        yield Row("crop_type", "relative", "a part of each image")
        yield Row("crop_size", [share, share], f"{stated} of {side}")
    elif not run.is_typed("min_size_train"):
        scaled = tuple(max(8, round(size * side / stated / 8) * 8) for size in sizes)
        yield Row("min_size_train", scaled, "in proportion")
        yield Row("max_size_train", _up(run["max_size_train"] * side / stated, 32), "in proportion")


def anchors(run: Settings, summary: DataSummary, strides: Sequence[int]) -> Iterator[Row]:
    """By k-means, where more than a quarter of the boxes overlap no anchor of the config by 0.5; as
    many as the config has, so that weights fit."""
    sizes, (ratios, *others) = run["anchor_sizes"], run["aspect_ratios"]
    if not strides or others or len({len(row) for row in sizes}) != 1:
        return
    boxes = _boxes_of_input(run, summary)
    sizes = sizes if len(sizes) == len(strides) else sizes * len(strides)
    before = best_iou(boxes, sizes, ratios)
    poor = f"of the config {_cover(before)}"
    if np.mean(before < 0.5) <= 0.25:
        yield Row("anchor_sizes", run["anchor_sizes"], f"{poor}: the config's cover the boxes")
        return
    fitted = fit_sizes(boxes, strides, len(sizes[0])), fit_aspect_ratios(boxes, len(ratios))
    new_sizes = sizes if run.is_typed("anchor_sizes") else fitted[0]
    new_ratios = ratios if run.is_typed("aspect_ratios") else fitted[1]
    pairs = [(s, r) for s in (sizes, new_sizes) for r in (ratios, new_ratios)]
    found = [best_iou(boxes, *pair) for pair in pairs]
    best = max(range(4), key=lambda i: found[i].mean())
    reason = f"{poor}; of these {_cover(found[best])}"
    yield Row("anchor_sizes", pairs[best][0], reason)
    yield Row("aspect_ratios", [pairs[best][1]], "with the sizes")


def crowds(run: Settings, summary: DataSummary) -> Iterator[Row]:
    """Room for the objects of the fullest image, and RoIs for those of the mean one."""
    most, kept = int(summary.image_objects.max()), _share(run) ** 2
    full = min(_up(1.25 * most, 100), 1000)
    if full > run["detections"]:
        yield Row("detections", full, f"an image has up to {most} objects")
    if "RetinaNet" in run.cfg.MODEL.META_ARCHITECTURE:
        return
    for use, objects in (("test", most), ("train", most * kept)):
        proposals = min(_up(2.5 * objects, 100), 2000)
        for name in (f"post_nms_{use}", f"pre_nms_{use}"):
            if run[name] < proposals:
                yield Row(name, proposals, f"2.5 for each of {objects:.0f} objects")
    mean = _objects(summary) * kept
    sampled = min(2 ** math.ceil(math.log2(4 * mean)), 512)
    for name in ("rpn_batch", "roi_batch"):
        if sampled > run[name]:
            reason = f"a quarter of these are of objects, and there are {mean:.0f} on average"
            yield Row(name, sampled, reason)


def balance(run: Settings, summary: DataSummary) -> Iterator[Row]:
    """Images of rare classes come more often, up to 4 times (repeat factor sampling: Gupta et al.,
    https://arxiv.org/abs/1908.03195, appendix B.2)."""
    share = np.sort(summary.class_images[summary.class_images > 0]) / len(summary.image_sizes)
    middle = float(np.median(share))
    if share[0] * 4 > middle:
        return
    threshold = round(min(middle, 16 * float(share[0])), 4)
    rare = np.count_nonzero(share < threshold)
    images = f"{100 * share[0]:.2g} % of the images, the median one in {100 * middle:.2g} %"
    reason = f"the rarest class is in {images}"
    yield Row("sampler", "RepeatFactorTrainingSampler", reason)
    most = math.sqrt(threshold / share[0])
    reason = f"images of {rare} class(es) come up to {most:.2g} times as often"
    yield Row("repeat_threshold", threshold, reason)


def images_per_step(run: Settings, processes: int) -> Iterator[Row]:
    """One, from scratch on a CPU, where two take twice as long: GN has no statistics of a batch, so
    that more and smaller steps of the linear rule learn more from the same images."""
    batch, stated = run["ims_per_batch"], run["reference_batch_size"]
    typed = any(map(run.is_typed, ("ims_per_batch", "ims_per_gpu", "accumulate_steps")))
    elsewise = run.cfg.MODEL.RESNETS.NORM in ("BN", "SyncBN") or run["reference_world_size"]
    if run["device"] != "cpu" or run["weights"] or typed or elsewise:
        return
    if batch == stated > processes and not run["ims_per_gpu"]:
        reason = "more steps of the same images: box AP 34.0, 29.5 with 2 (docs/small_batches.md)"
        yield Row("ims_per_gpu", 1, reason)


def schedule(run: Settings, summary: DataSummary, processes: int) -> Iterator[Row]:
    """The length of the run in epochs, and what follows from it."""
    num_images = int(np.count_nonzero(summary.image_objects))  # the others are not trained on
    epochs = _epochs_typed(run, num_images, processes)
    if epochs is None:
        epochs = num_epochs(num_images, scratch=not run["weights"])
        start = "from weights" if run["weights"] else "from scratch, which takes twice as long"
        yield Row("epochs", epochs, f"{num_images:,} images with objects, {start}")
    if run["warmup_epochs"] > epochs / 10:  # that of iterations is shortened by the schedule
        reason = f"a tenth of the run; the config's is {run['warmup_epochs']:.3g}"
        yield Row("warmup_epochs", _digits(epochs / 10), reason)
    if run["test_data"] and not run.is_typed("eval_period"):
        reason = f"{EVALUATIONS} evaluations of the run, an epoch apart or more"
        yield Row("eval_epochs", _digits(max(epochs / EVALUATIONS, 1)), reason)
        stop, reason = run["early_stop"], "much is gained at the end, where the rate falls"
        if "milestones" in run.keys and not (run["steps"] or run["steps_at"]):
            stop, reason = EVALUATIONS // 2, "half of the run without a gain, at a constant rate"
        yield Row("early_stop", stop, reason)


def num_epochs(num_images: int, scratch: bool) -> float:
    """From 50 epochs of 100 images, as small data are fine-tuned, to the 12 of COCO's 118,000
    (Detectron2's 1x), evenly in logarithms; from scratch twice as many."""
    epochs = 50 * (100 / num_images) ** 0.2
    return float(round(min(max(epochs, 12), 100)) * (2 if scratch else 1))


def _epochs_typed(run: Settings, num_images: int, processes: int) -> float | None:
    """The length that was typed, in epochs."""
    if run.is_typed("epochs") or not run.is_typed("max_iter"):
        return run["epochs"] if run.is_typed("epochs") else None
    images = run["ims_per_batch"]
    if run["ims_per_gpu"] not in (0, "auto"):
        images, _ = images_of_iteration(run, processes)
    return run["max_iter"] * images / num_images


def _boxes_of_input(run: Settings, summary: DataSummary) -> np.ndarray:
    """Height and width of the boxes in the input, (N, 2), at the mean of the sizes."""
    scale = resizings(run.cfg)["training"](summary.image_sizes) / summary.image_sizes
    return np.maximum(summary.boxes * scale[summary.object_image], 1)


def _objects(summary: DataSummary) -> float:
    """Of an image that has any, on average."""
    return float(summary.image_objects[summary.image_objects > 0].mean())


def _share(run: Settings) -> float:
    """Of the sides of an image that a crop has."""
    relative = run["crop"] and run["crop_type"] == "relative"
    return statistics.fmean(run["crop_size"]) if relative else 1


def _cover(found: np.ndarray) -> str:
    return f"the best IoU is {found.mean():.2f}, below 0.5 for {100 * np.mean(found < 0.5):.0f} %"


def _up(value: float, multiple: int) -> int:
    return multiple * math.ceil(value / multiple)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")
