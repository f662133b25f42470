"""Whether a training step fits into the memory of the device, before the run; and what fits."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils import comm

from gn_detect.config import ConfigError
from gn_detect.data.coco import load_coco
from gn_detect.data.model_input import Resizing
from gn_detect.distributed import from_first_process
from gn_detect.layers.recompute import MODES
from gn_detect.settings import Settings

from .describe_data import augmentations
from .errors import REMEDY
from .free_memory import available_memory, spare_the_heap
from .step_memory import Batch, StepMemory, estimate_step, gib

logger = logging.getLogger(__name__)

MOST_IMAGES = 4  # of a GPU, of SOLVER.IMS_PER_GPU auto
SPARE = 0.1  # of the free memory is left
_MIB = 2**20
# What a step takes beside its tensors, in bytes and as a share of them, in the measurements of
# docs/memory.md: on CUDA the gaps of PyTorch's allocator and workspaces of cuDNN; on a CPU what a
# process loads in its first steps, and writes a checkpoint with.
_BESIDE = {"cuda": (256 * _MIB, 0.08), "cpu": (128 * _MIB, 0.03)}
_WORKER = 96 * _MIB  # of a data loading worker: 30 MiB of its own (measured), and its batches
_SCARCE = 0.4  # a step that needs more of the free memory of a CPU has it given back at once


def resolve_memory(
    run: Settings, processes: int, data: Sequence[str] = (), resume: bool = False
) -> None:
    """Settle ``SOLVER.IMS_PER_GPU`` and ``MODEL.GN.MEMORY`` where they are ``"auto"``, and log what
    a step needs: the most images, up to ``MOST_IMAGES``, that fit; where not even one does, in the
    first of the modes that save memory in which one does (unless the mode was typed).

    The process with the least free memory decides for all. A run that is resumed keeps what it had.

    Args:
        processes: of the run, on all machines.
        data: names of the training sets that are COCO JSON files.

    Raises:
        ConfigError: a value is none of these, or not even one image fits.
    """
    images, mode = run["ims_per_gpu"], run["memory"]
    if images != "auto" and (type(images) is not int or images < 0):
        key = run.keys["ims_per_gpu"]
        raise ConfigError(f"{key} is {images!r}; it must be a number of images, or 'auto'")
    if resume and "auto" in (images, mode):
        _take_saved(run)
    free, total = min(comm.all_gather(available_memory(run["device"], comm.get_local_size())))
    decide = functools.partial(_decide, run, processes, data, free, total)
    values, scarce = from_first_process(decide)
    for name, value in values.items():
        run.derive(name, value, "what fits into the memory")
    if run["device"] == "cpu" and scarce:
        spare_the_heap()


class _Plain(yaml.SafeLoader):
    """Without the classes and functions that a lazy config has by name."""


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def _take_saved(run: Settings) -> None:
    """What the run that is resumed has chosen, as its config has it."""
    path = Path(run["output_dir"], "config.yaml")
    try:
        saved = yaml.load(path.read_text(), _Plain)
    except (OSError, yaml.YAMLError):
        return
    # Images that are "auto" have chosen the mode, too.
    modes = (run["memory"], run["ims_per_gpu"] if not run.is_typed("memory") else "")
    for name, asks in (("ims_per_gpu", run["ims_per_gpu"] == "auto"), ("memory", "auto" in modes)):
        value = saved
        for part in run.keys.get(name, "").split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if asks and value not in (None, "auto", run[name]):
            run.derive(name, value, f"as before ({path})")
            logger.info(f"{run.keys[name]} = {value}, as before ({path})")


def _decide(
    run: Settings, processes: int, data: Sequence[str], free: int, total: int
) -> tuple[dict[str, int | str], bool]:
    """The values of ``run`` to set, and whether memory is scarce."""
    images, mode, room = run["ims_per_gpu"], run["memory"], free * (1 - SPARE)
    asks = "auto" in (images, mode)
    modes = ["fast" if mode == "auto" else mode or "fast"]
    if mode == "auto" or (images == "auto" and mode in MODES and not run.is_typed("memory")):
        modes += [m for m in ("lean", "checkpoint") if MODES.index(m) > MODES.index(modes[0])]
    passes = run["accumulate_steps"]  # "auto" goes with images of a GPU
    passes = passes if isinstance(passes, int) and passes else 1
    others = run["reference_world_size"] or processes * passes
    counts = [images or max(run["ims_per_batch"] // others, 1)]
    if images == "auto":  # such that they make the iteration that is typed
        whole = run["ims_per_batch"] if run.is_typed("ims_per_batch") else 0
        counts = [n for n in range(1, MOST_IMAGES + 1) if whole % (n * processes) == 0] or [1]
        if whole and run.is_typed("accumulate_steps") and run["accumulate_steps"] != "auto":
            counts = [max(whole // others, 1)]
    found: dict[tuple[str, int], StepMemory] = {}

    def need(mode: str, count: int) -> float:
        found[mode, count] = estimate_step(_in_mode(run, mode), batch(count), processes)
        return needed(run, found[mode, count])

    try:
        batch = largest_batch(run, data)
        for mode in modes:
            fitting = bisect.bisect(counts, room, key=functools.partial(need, mode))
            if fitting:
                break
        count = counts[max(fitting - 1, 0)]
        step, needs = found[mode, count], needed(run, found[mode, count])
        side = 0 if fitting else _side_that_fits(run, mode, batch(1), processes, room)
    except ConfigError:
        raise
    except Exception as error:  # of any kind: of a model that we do not know
        logger.warning(
            "no estimate of the memory of a training step: on tensors without memory, the model "
            f"ends with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        )
        return _values(run, counts[0], modes[0]), False
    height, width = batch(count).size
    text = (
        f"a training step of {count} image(s) of up to {height}x{width} needs {gib(needs)} of "
        f"{gib(free)} GiB (free, of {gib(total)}): {step}, and {gib(needs - step.total)} beside"
    )
    values = _values(run, count, mode)
    if not fitting:
        key = run.keys.get("longest_side", "the augmentations")
        fits = f"{key} {side} lets one image fit" if side else "no size lets one image fit"
        advice = f"{text}. In the memory mode {mode}, {fits} with {SPARE:.0%} to spare"
        advice += "" if (count, mode) == (1, "checkpoint") else f"; {REMEDY}"
        if asks and needs > free:
            raise ConfigError(f"{advice}. Numbers in place of auto let it be tried all the same")
        logger.warning(advice)
    else:
        logger.info(text)
    for name, value in values.items():
        logger.info(f"{run.keys[name]} = {value}, which {'fits' if fitting else 'is the least'}")
    return values, needs > _SCARCE * free


def _values(run: Settings, count: int, mode: str) -> dict[str, int | str]:
    values = {"ims_per_gpu": count} if run["ims_per_gpu"] == "auto" else {}
    return values | ({"memory": mode} if run["memory"] not in (None, mode) else {})


def _in_mode(run: Settings, mode: str) -> Settings:
    copied = Settings(copy.deepcopy(run.cfg))
    if "memory" in run.keys:
        copied["memory"] = mode
    return copied


def needed(run: Settings, step: StepMemory) -> float:
    """Bytes of memory that a process takes for a step, on its device."""
    fixed, share = _BESIDE[torch.device(run["device"]).type]
    workers = run["num_workers"] or 0 if run["device"] == "cpu" else 0
    return fixed + workers * _WORKER + step.total * (1 + share)


def _side_that_fits(run: Settings, mode: str, batch: Batch, processes: int, room: float) -> int:
    """The longer side of images of which one fits into ``room``, in pixels; 0: there is none. Maps
    grow with the area of an image."""
    run, longest = _in_mode(run, mode), max(batch.size)
    areas, needs = [], []
    for part in (1, 2):
        size = (batch.size[0] // part, batch.size[1] // part)
        areas.append(size[0] * size[1])
        step = estimate_step(run, dataclasses.replace(batch, size=size), processes)
        needs.append(needed(run, step))
    area = areas[1] + (room - needs[1]) * (areas[0] - areas[1]) / (needs[0] - needs[1])
    side = longest * math.sqrt(max(area, 0) / areas[0])
    return int(side) // 32 * 32


def largest_batch(run: Settings, data: Sequence[str] = ()) -> Callable[[int], Batch]:
    """The largest batch that the run can meet, by the number of its images.

    Args:
        data: names of training sets that are COCO JSON files, whose images and objects count;
            without, the sizes of the config.
    """
    sets = [load_coco(MetadataCatalog.get(name).json_file) for name in data]
    objects = max((np.bincount(d.image[~d.crowd]).max(initial=1) for d in sets), default=20)
    sizes = np.concatenate([np.stack([d.heights, d.widths], axis=1) for d in sets] or [[]])
    objects *= 1 + bool(run["copy_paste"])  # as many as another image has
    bitmasks = run["mask_format"] == "bitmask" or bool(run["copy_paste"])
    known = augmentations(run.cfg, training=True)
    for augmentation in known:
        if isinstance(augmentation, (T.RandomCrop, T.FixedSizeCrop)):
            bitmasks |= isinstance(run.cfg, CfgNode)  # of NamingDatasetMapper
            if getattr(augmentation, "crop_type", "absolute").startswith("absolute"):
                sizes = np.array([augmentation.crop_size[::-1], augmentation.crop_size])
        elif isinstance(augmentation, T.ResizeShortestEdge):
            longest = augmentation.max_size
            edge = min(max(augmentation.short_edge_length), longest)
            if not edge and len(sizes):
                continue  # they keep the size of their files
            if any(isinstance(other, T.RandomCrop) for other in known) or not len(sizes):
                sizes = np.array([(edge, longest), (longest, edge)])
            else:
                resize = Resizing(T.ResizeShortestEdge(edge, longest))
                sizes = resize(np.unique(sizes, axis=0))
        elif isinstance(size := getattr(augmentation, "size", 0), Sequence) and len(size) == 2:
            sizes = np.array([size])  # torchvision's RandomResizedCrop

    def batch(images: int) -> Batch:
        # Those of a batch are padded to one size; they are of one orientation.
        of_one = [sizes[sizes[:, 0] < sizes[:, 1]], sizes[sizes[:, 0] >= sizes[:, 1]]]
        groups = [size[None] for size in sizes] if images == 1 else of_one if group else [sizes]
        sides = [tuple(map(int, group.max(axis=0))) for group in groups if len(group)]
        return Batch(images, max(sides, key=math.prod), int(objects), bitmasks)

    group = run["aspect_ratio_grouping"] is not False
    return batch
