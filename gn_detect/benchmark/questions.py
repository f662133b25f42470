"""The questions about whole detectors that ``tools/benchmark.py`` answers, one function each.

They give a report, or a longer one after each point that is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence

import torch

from .detectors import Detector, Settings, peak_bytes
from .memory import backbone_bytes, saved_bytes
from .report import Report, bars, lines
from .timing import Plan, Spread, failing, interleave, ratio, wall_clock

_MIB = 2**20


def step(settings: Settings, plan: Plan) -> Iterator[Report]:
    """Seconds of a training step, its peak memory, and what its graph keeps."""
    failures: dict[str, str] = {}
    results = _steps(_detectors(settings, plan, failures), settings, plan, failures)
    rows = []
    for result in results:
        rows.append({"variant": result["variant"], **_step_cells(result, results, plan)})
        if "rois" in result:
            boxes, masks = result["rois"]
            rows[-1] |= {"RoIs, with mask": f"{boxes}, {masks}"}
    title = f"Training step, {_describe(settings)}"
    done = [r for r in results if "failure" not in r]
    panels = {
        "s/iter": {r["variant"]: Spread.of(r["seconds"]) for r in done},
        "MiB kept for backward": {r["variant"]: _exactly(r["saved_bytes"] / _MIB) for r in done},
    }
    values = _values(settings, plan)
    yield Report("step", values, {title: rows}, results, lambda f: bars(f, panels))


def scaling(
    settings: Settings, plan: Plan, sizes: Sequence[tuple[int, int]], images: Sequence[int]
) -> Iterator[Report]:
    """``step`` for each image size with each number of images; a report after each."""
    lost: dict[str, str] = {}
    detectors = _detectors(settings, plan, lost)
    results, rows = [], []
    values = _values(settings, plan) | {"size": sizes, "images": images}
    title = f"Cost of a training step, {_describe(settings, batch=False)}"
    panels: dict[str, dict[str, list]] = {"s/iter": {}, "MiB kept for backward": {}}
    for size, number in itertools.product(sizes, images):
        here = dataclasses.replace(settings, size=size, images=number)
        of_point = _steps(detectors, here, plan, lost.copy())
        for result in of_point:
            result |= {"size": size, "images": number}
            rows.append(
                {
                    "images": f"{number} x {size[0]}x{size[1]}",
                    "variant": result["variant"],
                    **_step_cells(result, of_point, plan),
                }
            )
            if "failure" not in result:
                cells = statistics.median(result["seconds"]), result["saved_bytes"] / _MIB
                line = f"{result['variant']}, {number} x"
                for series, value in zip(panels.values(), cells, strict=True):
                    series.setdefault(line, []).append((size[0] * size[1] / 1e6, value))
        results += of_point
        yield Report(
            "scaling",
            values,
            {title: rows},
            results,
            lambda f: lines(f, "megapixels of an image", panels),
        )


def inference(settings: Settings, plan: Plan) -> Iterator[Report]:
    """Images per second, from images to masks in their size."""
    failures: dict[str, str] = {}
    detectors = _detectors(settings, plan, failures)
    found = {}
    for name, detector in detectors.items():
        detector.model.eval()
        with failing(name, failures):
            found[name] = sum(len(result["instances"]) for result in detector.infer())
    clock = wall_clock(torch.device(settings.device))
    runs = {name: detector.infer for name, detector in detectors.items()}
    seconds = interleave(runs, plan.rounds, plan.warmup, clock, failures)
    results, rows, bars_of = [], [], {}
    for name in plan.variants:
        if name in failures:
            results.append({"variant": name, "failure": failures[name]})
            rows.append({"variant": name, "images/s (quartiles)": failures[name]})
            continue
        bars_of[name] = Spread.of([settings.images / value for value in seconds[name]])
        results.append({"variant": name, "seconds": seconds[name], "detections": found[name]})
        rows.append(
            {
                "variant": name,
                "images/s (quartiles)": f"{bars_of[name]}",
                **{
                    # rates are to each other as times the other way round
                    f"images/s / {base}": f"{ratio(seconds[base], seconds[name]):.3f}"
                    for base in plan.baselines
                    if base in seconds
                },
                "detections": found[name],
            }
        )
    title, values = f"Inference, {_describe(settings)}", _values(settings, plan)
    yield Report(
        "inference", values, {title: rows}, results, lambda f: bars(f, {"images/s": bars_of})
    )


def memory(settings: Settings, plan: Plan) -> Iterator[Report]:
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
    yield Report("memory", values, {title: rows}, results, lambda f: bars(f, panels))


def _detectors(settings: Settings, plan: Plan, failures: dict[str, str]) -> dict[str, Detector]:
    detectors = {}
    for name in plan.variants:
        with failing(name, failures):
            detectors[name] = Detector(name, settings)
    return detectors


def _steps(
    detectors: dict[str, Detector], settings: Settings, plan: Plan, failures: dict[str, str]
) -> list[dict]:
    """Memory, then times, of a training step of each detector; or why it failed."""
    memory = {}
    for name, detector in detectors.items():
        with failing(name, failures):
            detector.use(settings)
            memory[name] = {
                "saved_bytes": saved_bytes(detector.forward),
                "peak_bytes": peak_bytes(detector),
                "rois": list(detector.rois),
            }
    clock = wall_clock(torch.device(settings.device))
    runs = {name: detector.step for name, detector in detectors.items()}
    seconds = interleave(runs, plan.rounds, plan.warmup, clock, failures)
    for name in seconds:
        with failing(name, failures):
            detectors[name].check_no_step_was_left_out()
    return [
        {"variant": name, "failure": failures[name]}
        if name in failures
        else {"variant": name, **memory[name], "seconds": seconds[name]}
        for name in plan.variants
    ]


def _step_cells(result: dict, results: list[dict], plan: Plan) -> dict[str, str]:
    if "failure" in result:
        return {"s/iter (quartiles)": result["failure"]}
    done = {r["variant"]: r for r in results if "failure" not in r}
    of_base = {base: done[base] for base in plan.baselines if base in done}
    cells = {"s/iter (quartiles)": f"{Spread.of(result['seconds'])}"}
    for base, other in of_base.items():
        cells[f"s / {base}"] = f"{ratio(result['seconds'], other['seconds']):.3f}"
    cells["kept for backward, MiB"] = f"{result['saved_bytes'] / _MIB:.1f}"
    if result["peak_bytes"] is not None:
        cells["peak, MiB"] = f"{result['peak_bytes'] / _MIB:.0f}"
        for base, other in of_base.items():
            cells[f"peak / {base}"] = f"{result['peak_bytes'] / other['peak_bytes']:.3f}"
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
    parts += [f"ours with {settings.kernel}"] * kernel
    return ", ".join(parts)
