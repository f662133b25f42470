"""The questions that ``tools/benchmark.py`` answers, one function each.

Each measures variants side by side, and gives groups of results that can be compared: what a group
is of, and of each variant its measures, name -> samples by rounds, or why it failed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.benchmark import timer

from .detectors import DETECTRON2_GN, FROZEN_BN, Detector, Settings
from .kernels import DTYPES, PASSES, gn_layers, layer_run
from .memory import backbone_bytes, estimated_step, measured_step, saved_bytes
from .peers import marked
from .timing import as_cuda_graph, interleave, kernel_clock, wall_clock

_BASELINES = (DETECTRON2_GN, FROZEN_BN, "eager", "copy")
_MIB = 2**20
Measures = dict[str, list[float]]
Groups = list[tuple[dict, dict[str, Measures | str]]]


def answer(
    question: Callable[..., Groups], settings: Settings, varied: dict[str, Sequence], **how
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Ask at each combination of ``varied``, fields of ``settings`` -> their values. Yields the
    rows of the table so far, and what they are made from."""
    rows, results = [], []
    for values in itertools.product(*varied.values()):
        here = dict(zip(varied, values, strict=True))
        groups = question(dataclasses.replace(settings, **here), **how)
        if "size" in here:
            here["size"] = "x".join(map(str, here["size"]))
        for where, measured in groups:
            results.append({**here, **where, "variants": measured})
            rows += compare(here | where, measured, _BASELINES)
        yield rows, results


def memory(settings: Settings, variants: Sequence[str]) -> Groups:
    """What the graph of the ResNet keeps for its backward pass. Nothing is timed, nor computed, and
    no device is needed."""
    return [({}, {name: {"MiB": [backbone_bytes(name, settings) / _MIB]} for name in variants})]


def estimate(settings: Settings, variants: Sequence[str]) -> Groups:
    """What a training step needs of the memory of the device: by fake tensors, and measured."""
    measured: dict[str, Measures | str] = {}
    for name in variants:
        start = timer()
        estimated = estimated_step(name, settings).total
        measures = {"estimate MiB": estimated / _MIB, "estimate s": timer() - start}
        try:
            found = measured_step(name, settings)
        except torch.OutOfMemoryError:
            found = {}
        measures |= {f"{what} MiB": size / _MIB for what, size in found.items()}
        if found:
            measures["estimate / peak"] = estimated / found["peak"]
        measured[name] = {what: [value] for what, value in measures.items()}
    return [({"kernel": settings.kernel, "amp": settings.amp}, measured)]


def step(settings: Settings, **how) -> Groups:
    """Seconds of a training step, what its graph keeps, and on a GPU its peak memory; takes
    ``variants`` and ``rounds``."""

    def prepare(detector: Detector) -> tuple[Callable[[], object], Measures]:
        memory = {"kept MiB": [saved_bytes(detector.forward) / _MIB]}
        if settings.device == "cuda":
            memory["peak MiB"] = [detector.peak_bytes() / _MIB]
        return detector.step, memory

    return _time(settings, prepare, "s/iter", **how)


def inference(settings: Settings, **how) -> Groups:
    """Images per second, from images to masks in their size; takes what ``step`` does."""

    def prepare(detector: Detector) -> tuple[Callable[[], object], Measures]:
        detector.model.eval()
        found = sum(len(image["instances"]) for image in detector.infer())
        return detector.infer, {"detections": [found]}

    return _time(settings, prepare, "images/s", **how)


def _time(
    settings: Settings,
    prepare: Callable[[Detector], tuple[Callable[[], object], Measures]],
    unit: str,
    variants: Sequence[str],
    rounds: int,
) -> Groups:
    """What ``prepare`` gives, in ``unit`` (s/iter or images/s), and the rest that it measures."""
    others = {}

    def make(name: str) -> Callable[[], object]:
        run, others[name] = prepare(Detector(name, settings))
        return run

    measured = interleave({name: partial(make, name) for name in variants}, rounds)
    for name, seconds in measured.items():
        if not isinstance(seconds, str):
            samples = seconds if unit == "s/iter" else [settings.images / s for s in seconds]
            measured[name] = {unit: samples, **others[name]}
    return [({"kernel": settings.kernel}, measured)]


def kernels(settings: Settings, variants: Sequence[str], rounds: int) -> Groups:
    """Each GN layer of the detector alone, by several implementations, and the sum of all.

    On CUDA, CUDA graphs are replayed, so that the time is that of the kernels: else a short one
    would wait for Python.
    """
    layers, itemsize = gn_layers(settings), DTYPES[settings.dtype].itemsize
    on_gpu = settings.device == "cuda"
    clock = kernel_clock() if on_gpu else wall_clock

    def make(name: str, *what) -> Callable[[], object]:
        with marked(name):
            run = layer_run(name, *what, settings)
            return as_cuda_graph(run) if on_gpu else run

    groups = []
    for kind in PASSES:
        where, columns = {"kernel": settings.kernel, "pass": kind}, {name: [] for name in variants}
        for layer, count in layers.items():
            makers = {name: partial(make, name, kind, layer) for name in variants}
            timed = interleave(makers, rounds, clock)
            for name, seconds in timed.items():
                columns[name].append(seconds)
            megabytes = layer.minimum_bytes(itemsize, kind != "forward") / 1e6
            row = where | {"layer": str(layer), "layers": count, "MB": f"{megabytes:.1f}"}
            groups.append((row, {name: _milliseconds([1], [s]) for name, s in timed.items()}))
        counts = list(layers.values())
        total = {name: _milliseconds(counts, column) for name, column in columns.items()}
        groups.append((where | {"layer": "all", "layers": sum(counts)}, total))
    return groups


def _milliseconds(counts: list[int], column: list[list[float] | str]) -> Measures | str:
    """Of some layers, of each of which there are ``counts``, in each round; or why one failed."""
    for failure in (seconds for seconds in column if isinstance(seconds, str)):
        return failure
    return {"ms": (1e3 * np.dot(counts, column)).tolist()}


def compare(where: dict, measured: dict[str, Measures | str], baselines: Sequence[str]) -> list:
    """The rows of a group, one for each variant, which is compared with some of the others."""
    done = {name: measures for name, measures in measured.items() if isinstance(measures, dict)}
    rows = []
    for variant, measures in measured.items():
        row = {**where, "variant": variant}
        if variant not in done:
            row["failure"] = measures
        for measure, samples in done.get(variant, {}).items():
            row[measure] = quartiles(samples)
            for base in [name for name in baselines if name in done]:
                row[f"{measure} / {base}"] = ratio(samples, done[base][measure])
        rows.append(row)
    return rows


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> str:
    """``samples`` over ``baseline``, round by round."""
    return quartiles([a / b for a, b in zip(samples, baseline, strict=True)], ".3f")


def quartiles(samples: Sequence[float], spec: str = "") -> str:
    """``median (lower-upper)``, or one sample; without ``spec``, in three digits."""
    lower, median, upper = (
        f"{value:{spec}}" if spec else f"{float(f'{value:.3g}'):g}"
        for value in np.quantile(samples, (0.25, 0.5, 0.75))
    )
    return f"{median} ({lower}-{upper})" if len(samples) > 1 else median
