"""Measurements as tables and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.collect_env import collect_env_info
from tabulate import tabulate


def quartiles(samples: Sequence[float], spec: str = "") -> str:
    """``median (lower-upper)``, or one sample; without ``spec``, in three digits."""
    lower, median, upper = (
        f"{value:{spec}}" if spec else f"{float(f'{value:.3g}'):g}"
        for value in np.quantile(samples, (0.25, 0.5, 0.75))
    )
    return f"{median} ({lower}-{upper})" if len(samples) > 1 else median


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> str:
    """``samples`` over ``baseline``, round by round."""
    return quartiles([a / b for a, b in zip(samples, baseline, strict=True)], ".3f")


def compare(results: Sequence[dict], baselines: Sequence[str]) -> list[dict[str, str]]:
    """A row for each of the variants that were measured side by side.

    Args:
        results: each has a ``"variant"`` and more words for the row, and ``"measures"``, name ->
            samples by rounds, or ``"failure"``, the reason.
        baselines: the variants that the others are compared with.
    """
    done = {r["variant"]: r["measures"] for r in results if "measures" in r}
    rows = []
    for result in results:
        rows.append({key: value for key, value in result.items() if key != "measures"})
        for measure, samples in result.get("measures", {}).items():
            rows[-1][measure] = quartiles(samples)
            for base in [name for name in baselines if name in done]:
                rows[-1][f"{measure} / {base}"] = ratio(samples, done[base][measure])
    return rows


def markdown(rows: Sequence[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)


def write(path: Path, command: str, settings: dict, rows: list[dict], results: list[dict]) -> None:
    """Write a table to ``path.md``, and what it is made from to ``path.json``.

    Args:
        command: that was typed, for the record.
        settings: that it ran with.
        rows, results: of ``questions.answer``.
    """
    content = {
        "command": command,
        "settings": settings | {"threads": torch.get_num_threads()},
        "environment": collect_env_info(),
        "results": results,
    }
    path.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str))
    path.with_suffix(".md").write_text(f"`{command}`\n\n{markdown(rows)}\n")
