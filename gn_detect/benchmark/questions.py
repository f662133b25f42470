"""The questions that ``tools/benchmark.py`` answers, one function each.

Each measures variants side by side, and gives groups of results that can be compared: of each
variant its samples by rounds, or why it failed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .detectors import DETECTRON2_GN, FROZEN_BN, Detector, Settings
from .kernels import DTYPES, PASSES, gn_layers, time_layer
from .memory import backbone_bytes, saved_bytes
from .report import compare
from .timing import failing, interleave

_BASELINES = (DETECTRON2_GN, FROZEN_BN, "eager", "copy")
_MIB = 2**20


def answer(
    question: Callable[..., list[list[dict]]],
    settings: Settings,
    varied: dict[str, Sequence],
    **how,
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Ask at each combination of some settings.

    Args:
        question: a function of this module.
        varied: fields of ``settings`` -> their values.
        how: more arguments of ``question``.

    Yields:
        after each combination, all so far: the rows of the table, and what they are made from.
    """
    rows, results = [], []
    for values in itertools.product(*varied.values()):
        here = dict(zip(varied, values, strict=True))
        groups = question(dataclasses.replace(settings, **here), **how)
        if "size" in here:
            here["size"] = "x".join(map(str, here["size"]))
        for group in groups:
            results += (group := [here | result for result in group])
            rows += compare(group, _BASELINES)
        yield rows, results


def memory(settings: Settings, variants: Sequence[str]) -> list[list[dict]]:
    """What the graph of the ResNet keeps for its backward pass. Nothing is timed, nor computed, and
    no device is needed."""
    kept = {name: backbone_bytes(name, settings) / _MIB for name in variants}
    return [[{"variant": name, "measures": {"MiB": [value]}} for name, value in kept.items()]]


def step(settings: Settings, **how) -> list[list[dict]]:
    """Seconds of a training step, what its graph keeps, and on a GPU its peak memory; takes
    ``variants``, ``rounds`` and ``warmup``."""

    def prepare(detector: Detector) -> dict[str, list[float]]:
        memory = {"kept MiB": [saved_bytes(detector.forward) / _MIB]}
        if settings.device == "cuda":
            memory["peak MiB"] = [detector.peak_bytes() / _MIB]
        return memory

    return _time(settings, prepare, lambda detector: detector.step, "s/iter", **how)


def inference(settings: Settings, **how) -> list[list[dict]]:
    """Images per second, from images to masks in their size; takes what ``step`` does."""

    def prepare(detector: Detector) -> dict[str, list[float]]:
        detector.model.eval()
        return {"detections": [sum(len(found["instances"]) for found in detector.infer())]}

    return _time(settings, prepare, lambda detector: detector.infer, "images/s", **how)


def _time(
    settings: Settings,
    prepare: Callable[[Detector], dict[str, list[float]]],
    run: Callable[[Detector], Callable[[], object]],
    unit: str,
    variants: Sequence[str],
    rounds: int,
    warmup: int,
) -> list[list[dict]]:
    """``run`` in ``unit`` (s/iter or images/s), after ``prepare``, which measures the rest."""
    runs, measures, failures = {}, {}, {}
    for name in variants:
        with failing(name, failures):
            detector = Detector(name, settings)
            measures[name] = prepare(detector)
            runs[name] = run(detector)
    timed = {}
    for name, seconds in interleave(runs, rounds, warmup, failures).items():
        samples = seconds if unit == "s/iter" else [settings.images / s for s in seconds]
        timed[name] = {unit: samples, **measures[name]}
    return [_group({"kernel": settings.kernel}, variants, timed, failures)]


def kernels(
    settings: Settings, variants: Sequence[str], rounds: int, warmup: int
) -> list[list[dict]]:
    """Each GN layer of the detector alone, by several implementations, and the sum of all."""
    layers, itemsize = gn_layers(settings), DTYPES[settings.dtype].itemsize
    timed = {layer: time_layer(layer, variants, settings, rounds, warmup) for layer in layers}
    groups = []
    for kind in PASSES:
        where, of_layers, failures = {"kernel": settings.kernel, "pass": kind}, [], {}
        for layer, (samples, failed) in timed.items():
            megabytes = layer.minimum_bytes(itemsize, kind != "forward") / 1e6
            row = where | {"layer": str(layer), "layers": layers[layer], "MB": f"{megabytes:.1f}"}
            ms = {name: {"ms": [1e3 * s for s in times]} for name, times in samples[kind].items()}
            of_layers.append(_group(row, variants, ms, failed))
            failures |= {name: why for name, why in failed.items() if name not in ms}
        totals = {}
        for name, *column in zip(variants, *of_layers, strict=True):
            if name not in failures:
                ms = [result["measures"]["ms"] for result in column]
                totals[name] = {"ms": np.dot(list(layers.values()), ms).tolist()}
        row = where | {"layer": "all", "layers": sum(layers.values())}
        groups += [*of_layers, _group(row, variants, totals, failures)]
    return groups


def _group(
    row: dict, variants: Sequence[str], measures: dict, failures: dict[str, str]
) -> list[dict]:
    return [
        {**row, "variant": name}
        | ({"measures": measures[name]} if name in measures else {"failure": failures[name]})
        for name in variants
    ]
