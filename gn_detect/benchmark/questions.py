"""The questions about whole detectors that ``tools/benchmark.py`` answers, one function each."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import torch

from .detectors import Detector, Settings, peak_bytes
from .memory import backbone_bytes, saved_bytes
from .report import Report, bars, lines
from .timing import Plan, Spread, interleave, ratio, wall_clock

_MIB = 2**20


def step(settings: Settings, plan: Plan) -> Report:
    """Seconds of a training step, its peak memory, and what its graph keeps."""
    detectors = {name: Detector(name, settings) for name in plan.variants}
    results = _steps(detectors, plan)
    rows = []
    for result in results:
        rows.append({"variant": result["variant"], **_step_cells(result, results, plan)})
        boxes, masks = result["rois"]
        rows[-1] |= {"RoIs, with mask": f"{boxes}, {masks}"}
    title = f"Training step, {_describe(settings)}"
    panels = {
        "s/iter": {r["variant"]: Spread.of(r["seconds"]) for r in results},
        "MiB kept for backward": {r["variant"]: _exactly(r["saved_bytes"] / _MIB) for r in results},
    }
    return Report(
        "step",
        _values(settings, plan),
        {title: rows},
        results,
        lambda f: bars(f, panels),
    )


def scaling(
    settings: Settings, plan: Plan, sizes: Sequence[tuple[int, int]], images: Sequence[int]
) -> Report:
    """``step`` for each image size with each number of images."""
    detectors = {name: Detector(name, settings) for name in plan.variants}
    results, rows = [], []
    for size, number in itertools.product(sizes, images):
        here = dataclasses.replace(settings, size=size, images=number)
        for detector in detectors.values():
            detector.use(here)
        of_point = _steps(detectors, plan)
        for result in of_point:
            result |= {"size": size, "images": number}
            rows.append(
                {
                    "images": f"{number} x {size[0]}x{size[1]}",
                    "variant": result["variant"],
                    **_step_cells(result, of_point, plan),
                }
            )
        results += of_point
    panels: dict[str, dict[str, list]] = {"s/iter": {}, "MiB kept for backward": {}}
    for result in results:
        pixels = result["size"][0] * result["size"][1] / 1e6
        values = statistics.median(result["seconds"]), result["saved_bytes"] / _MIB
        line = f"{result['variant']}, {result['images']} x"
        for series, value in zip(panels.values(), values, strict=True):
            series.setdefault(line, []).append((pixels, value))
    values = _values(settings, plan) | {"size": sizes, "images": images}
    title = f"Cost of a training step, {_describe(settings, batch=False)}"
    return Report(
        "scaling",
        values,
        {title: rows},
        results,
        lambda f: lines(f, "megapixels of an image", panels),
    )


def inference(settings: Settings, plan: Plan) -> Report:
    """Images per second, from images to masks in their size."""
    detectors = {name: Detector(name, settings) for name in plan.variants}
    clock = wall_clock(torch.device(settings.device))
    runs = {name: detector.infer for name, detector in detectors.items()}
    seconds = interleave(runs, plan.rounds, plan.warmup, clock)
    results, rows = [], []
    for name, detector in detectors.items():
        found = sum(len(result["instances"]) for result in detector.infer())
        rates = [settings.images / value for value in seconds[name]]
        results.append({"variant": name, "seconds": seconds[name], "detections": found})
        rows.append(
            {
                "variant": name,
                "images/s (quartiles)": f"{Spread.of(rates)}",
                **{
                    # rates are to each other as times the other way round
                    f"images/s / {base}": f"{ratio(seconds[base], seconds[name]):.3f}"
                    for base in plan.baselines
                },
                "detections": found,
            }
        )
    panels = {
        "images/s": {
            r["variant"]: Spread.of([settings.images / value for value in r["seconds"]])
            for r in results
        }
    }
    title = f"Inference, {_describe(settings)}"
    return Report(
        "inference",
        _values(settings, plan),
        {title: rows},
        results,
        lambda f: bars(f, panels),
    )


def memory(settings: Settings, plan: Plan) -> Report:
    """What the graph of the ResNet keeps for its backward pass. Nothing is timed, nor computed, and
    no device is needed."""
    results = [
        {"variant": name, "saved_bytes": backbone_bytes(name, settings)} for name in plan.variants
    ]
    kept = {result["variant"]: result["saved_bytes"] for result in results}
    rows = [
        {
            "variant": name,
            "MiB": f"{value / _MIB:.1f}",
            **{f"/ {base}": f"{value / kept[base]:.3f}" for base in plan.baselines},
        }
        for name, value in kept.items()
    ]
    panels = {"MiB kept for backward": {name: _exactly(v / _MIB) for name, v in kept.items()}}
    title = f"The ResNet alone keeps for backward, {_describe(settings, kernel=False)}"
    values = dataclasses.asdict(settings)
    values |= {"variants": plan.variants, "baselines": plan.baselines}
    return Report("memory", values, {title: rows}, results, lambda f: bars(f, panels))


def _steps(detectors: dict[str, Detector], plan: Plan) -> list[dict]:
    """Memory, then times, of a training step of each detector."""
    memory = {
        name: {
            "variant": name,
            "saved_bytes": saved_bytes(detector.forward),
            "peak_bytes": peak_bytes(detector),
            "rois": list(detector.rois),
        }
        for name, detector in detectors.items()
    }
    device = torch.device(next(iter(detectors.values())).settings.device)
    runs = {name: detector.step for name, detector in detectors.items()}
    seconds = interleave(runs, plan.rounds, plan.warmup, wall_clock(device))
    for name, detector in detectors.items():
        detector.check_no_step_was_left_out(name)
    return [memory[name] | {"seconds": seconds[name]} for name in detectors]


def _step_cells(result: dict, results: list[dict], plan: Plan) -> dict[str, str]:
    of_base = {r["variant"]: r for r in results if r["variant"] in plan.baselines}
    cells = {"s/iter (quartiles)": f"{Spread.of(result['seconds'])}"}
    for base in plan.baselines:
        cells[f"s / {base}"] = f"{ratio(result['seconds'], of_base[base]['seconds']):.3f}"
    cells["kept for backward, MiB"] = f"{result['saved_bytes'] / _MIB:.1f}"
    if result["peak_bytes"] is not None:
        cells["peak, MiB"] = f"{result['peak_bytes'] / _MIB:.0f}"
        for base in plan.baselines:
            share = result["peak_bytes"] / of_base[base]["peak_bytes"]
            cells[f"peak / {base}"] = f"{share:.3f}"
    return cells


def _values(settings: Settings, plan: Plan) -> dict:
    """For the record."""
    return dataclasses.asdict(settings) | dataclasses.asdict(plan) | {"kernel": settings.kernel}


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


def _describe(settings: Settings, batch: bool = True, kernel: bool = True) -> str:
    height, width = settings.size
    parts = [f"{settings.images} x {height}x{width}"] if batch else []
    parts += [settings.device, "float32" if settings.amp == "none" else f"AMP {settings.amp}"]
    if settings.channels_last:
        parts.append("channels_last" + " of ours" * (settings.channels_last == "ours"))
    parts += ["the same SGD"] * (settings.optimizer == "same")
    parts += [f"ours with {settings.kernel}"] * kernel
    return ", ".join(parts)
