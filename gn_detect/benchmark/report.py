"""A measurement as tables, JSON and a plot."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate

import gn_detect

from .timing import Spread


@dataclasses.dataclass
class Report:
    """What a benchmark found.

    Args:
        name: of the benchmark.
        settings: that it ran with.
        tables: title -> rows, each column -> cell.
        results: what the tables are made from, with all samples (seconds, bytes).
        draw: fills a figure.
    """

    name: str
    settings: dict
    tables: dict[str, list[dict]]
    results: list[dict]
    draw: Callable[[Figure], None]

    def text(self) -> str:
        """The tables in Markdown."""
        parts = []
        for title, rows in self.tables.items():
            table = tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
            parts.append(f"{title}\n\n{table}\n")
        return "\n".join(parts)

    def write(self, directory: Path, name: str, command: str) -> list[Path]:
        """Write ``name.json``, ``name.md`` and ``name.png`` into a directory.

        Args:
            command: that was typed, for the record.
        """
        paths = [directory / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
        content = {
            "benchmark": self.name,
            "command": command,
            "environment": environment(self.settings["device"]),
            "settings": self.settings,
            "results": self.results,
        }
        paths[0].write_text(json.dumps(content, indent=1))
        paths[1].write_text(f"`{command}`\n\n{self.text()}")
        figure = Figure(figsize=(9, 5), layout="constrained")
        self.draw(figure)
        figure.savefig(paths[2], dpi=150)
        return paths


def environment(device: str) -> dict[str, str | int | None]:
    """The machine, the versions and the date (UTC) of a measurement."""
    now = datetime.datetime.now(datetime.timezone.utc)
    on_gpu = device == "cuda" and torch.cuda.is_available()  # memory is told without one, too
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gn_detect": gn_detect.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "tf32 of matrices, convolutions": (
            f"{torch.backends.cuda.matmul.allow_tf32}, {torch.backends.cudnn.allow_tf32}"
        ),
        **{name: _version(name) for name in ("torchvision", "triton", "detectron2")},
    }


def bars(figure: Figure, panels: dict[str, dict[str, Spread]]) -> None:
    """One panel of horizontal bars with whiskers for each title -> name -> value."""
    for number, (title, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        names = list(values)
        errors = [
            [spread.median - spread.lower for spread in values.values()],
            [spread.upper - spread.median for spread in values.values()],
        ]
        axes.barh(names, [spread.median for spread in values.values()], xerr=errors)
        axes.invert_yaxis()
        axes.set_xlabel(title)
        if number > 1:
            axes.set_yticklabels([])


def lines(
    figure: Figure, xlabel: str, panels: dict[str, dict[str, list[tuple[float, float]]]]
) -> None:
    """One panel of lines for each title -> name -> points."""
    for number, (title, series) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(title)
    axes.legend(fontsize="small")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
