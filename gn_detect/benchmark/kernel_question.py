"""The question about the GN layers alone that ``tools/benchmark.py`` answers."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import torch

from .detectors import Settings
from .kernels import DTYPES, PASSES, gn_layers, time_layer
from .report import Report, bars
from .timing import Plan, Spread, ratio

# Bytes of one map: the time of larger ones is that of the memory, not of launching kernels.
_LARGE = 17e6


def ask_kernels(
    settings: Settings,
    plan: Plan,
    images: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
    graph: bool,
) -> Report:
    """Each GN layer of the detector alone, by several implementations, and the sum of all."""
    tables: dict[str, list[dict]] = {}
    results, totals = [], []
    panels: dict[str, dict[str, Spread]] = {kind: {} for kind in PASSES}
    for number, dtype, layout in itertools.product(images, dtypes, layouts):
        layers = gn_layers(dataclasses.replace(settings, images=number))
        variants = [v for v in plan.variants if (v, dtype) != ("autocast", "float32")]
        times = {
            layer: time_layer(
                layer,
                variants,
                device=torch.device(settings.device),
                dtype=DTYPES[dtype],
                layout=layout,
                rounds=plan.rounds,
                warmup=plan.warmup,
                graph=graph,
            )
            for layer in layers
        }
        for kind in PASSES:
            where = {"images": number, "dtype": dtype, "layout": layout, "pass": kind}
            of_pass = [
                {
                    **where,
                    "layer": str(layer),
                    "modules": layers[layer],
                    "map_bytes": layer.numel * DTYPES[dtype].itemsize,
                    "minimum_bytes": layer.minimum_bytes(DTYPES[dtype].itemsize, kind != "forward"),
                    "seconds": samples[kind],
                }
                for layer, samples in times.items()
            ]
            results += of_pass
            tables[f"{number} image(s), {dtype}, {layout}, {kind}"] = _layer_rows(of_pass)
            sums = {name: _sum(of_pass, name) for name in variants}
            totals += [where | row for row in _total_rows(of_pass, sums, plan)]
            for name, values in sums.items():
                label = f"{name}, {number} x {dtype} {layout}"
                panels[kind][label] = Spread.of([1e3 * value for value in values])
    count = sum(map(len, layers.values()))
    tables[f"All {count} layers, ours with {settings.kernel}"] = totals
    values = dataclasses.asdict(settings) | dataclasses.asdict(plan) | {"kernel": settings.kernel}
    values |= {"images": images, "dtypes": dtypes, "layouts": layouts, "graph": graph}
    titled = {f"ms of all {count} layers, {kind}": bar for kind, bar in panels.items()}
    return Report("kernels", values, tables, results, lambda f: bars(f, titled))


def _layer_rows(results: list[dict]) -> list[dict]:
    return [
        {
            "layer": result["layer"],
            "layers": len(result["modules"]),
            "MB": f"{result['minimum_bytes'] / 1e6:.1f}",
            **{name: _layer_cell(result, name) for name in result["seconds"]},
        }
        for result in results
    ]


def _layer_cell(result: dict, name: str) -> str:
    median = statistics.median(result["seconds"][name])
    cell = f"{median * 1e6:.1f} us, {result['minimum_bytes'] / median / 1e9:.0f} GB/s"
    if name != "copy" and "copy" in result["seconds"]:
        cell += f", {_share(result, name):.0f} %"
    return cell


def _share(result: dict, name: str) -> float:
    """Percent of the bandwidth of the copy of the minimum bytes."""
    seconds = result["seconds"]
    return 100 * statistics.median(seconds["copy"]) / statistics.median(seconds[name])


def _sum(results: list[dict], name: str) -> list[float]:
    """Seconds of all layers, by rounds."""
    samples = zip(*(result["seconds"][name] for result in results), strict=True)
    counts = [len(result["modules"]) for result in results]
    return [sum(n * s for n, s in zip(counts, of_round, strict=True)) for of_round in samples]


def _total_rows(results: list[dict], sums: dict[str, list[float]], plan: Plan) -> list[dict]:
    rows = []
    for name, seconds in sums.items():
        spread = Spread.of([1e3 * value for value in seconds])
        row = {"variant": name, "ms of all layers": f"{spread}"}
        for base in plan.baselines:
            row[f"/ {base}"] = f"{ratio(seconds, sums[base]):.3f}" if base in sums else "-"
        large = [r for r in results if r["map_bytes"] >= _LARGE and "copy" in r["seconds"]]
        shares = [_share(result, name) for result in large]
        row["% of copy, maps >= 17 MB"] = (
            f"lowest {min(shares):.0f}, median {statistics.median(shares):.0f}" if shares else "-"
        )
        rows.append(row)
    return rows
