"""The question about the GN layers alone that ``tools/benchmark.py`` answers."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence

import torch

from .detectors import Settings
from .kernels import DTYPES, PASSES, Layer, gn_layers, time_layer
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
) -> Iterator[Report]:
    """Each GN layer of the detector alone, by several implementations, and the sum of all; a report
    after each combination of ``images``, ``dtypes`` and ``layouts``."""
    tables: dict[str, list[dict]] = {}
    results, totals = [], []
    panels: dict[str, dict[str, Spread]] = {kind: {} for kind in PASSES}
    values = dataclasses.asdict(settings) | dataclasses.asdict(plan) | {"kernel": settings.kernel}
    values |= {"images": images, "dtypes": dtypes, "layouts": layouts, "graph": graph}
    for number, dtype, layout in itertools.product(images, dtypes, layouts):
        layers = gn_layers(dataclasses.replace(settings, images=number))
        variants = [v for v in plan.variants if (v, dtype) != ("autocast", "float32")]
        failures: dict[Layer, dict[str, str]] = {layer: {} for layer in layers}
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
                failures=failures[layer],
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
                    "failures": {
                        v: why for v, why in failures[layer].items() if v not in samples[kind]
                    },
                }
                for layer, samples in times.items()
            ]
            results += of_pass
            tables[f"{number} image(s), {dtype}, {layout}, {kind}"] = _layer_rows(of_pass, variants)
            failed = {v: why for result in of_pass for v, why in result["failures"].items()}
            sums = {name: _sum(of_pass, name) for name in variants if name not in failed}
            totals += [where | row for row in _total_rows(of_pass, sums, plan)]
            totals += [where | {"variant": v, "ms of all layers": failed[v]} for v in failed]
            for name, seconds in sums.items():
                label = f"{name}, {number} x {dtype} {layout}"
                panels[kind][label] = Spread.of([1e3 * value for value in seconds])
        count = sum(map(len, layers.values()))
        total = {f"All {count} layers, ours with {settings.kernel}": totals}
        titled = {f"ms of all {count} layers, {kind}": bar for kind, bar in panels.items()}
        yield Report(
            "kernels", values, tables | total, results, lambda f, titled=titled: bars(f, titled)
        )


def _layer_rows(results: list[dict], variants: Sequence[str]) -> list[dict]:
    return [
        {
            "layer": result["layer"],
            "layers": len(result["modules"]),
            "MB": f"{result['minimum_bytes'] / 1e6:.1f}",
            **{name: _layer_cell(result, name) for name in variants},
        }
        for result in results
    ]


def _layer_cell(result: dict, name: str) -> str:
    if name in result["failures"]:
        return result["failures"][name]
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
