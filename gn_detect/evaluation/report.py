"""A page that shows what a run gave and where the detector errs: one file, which needs no network.

The page is ``report.html`` beside this file (Jinja, which torch needs, too).
"""

from __future__ import annotations

import base64
import datetime
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np

from gn_detect import __version__
from gn_detect.checkpoint.saving import write_atomically

from .analysis import Analysis
from .report_figures import analysis_figures, training_figures
from .run_facts import RunFacts, metric_name

MAX_CLASSES = 15  # in the confusion matrix; of more, those that are confused most
_ERRORS = {
    "classification": "found, but as another class",
    "localization": "the right class, but IoU between 0.1 and 0.5",
    "both": "another class, and IoU between 0.1 and 0.5",
    "duplicate": "a second detection of the same object",
    "background": "a detection where no object is",
    "missed": "an object that nothing has found",
}
_SIZES = {"s": "small (< 32²)", "m": "medium", "l": "large (> 96²)"}


class TestSet(NamedTuple):
    """What a page shows of a set of data.

    Attributes:
        name: of it; "" where there is only one.
        analysis: None where there is none.
        pictures: (caption, content of a WebP file).
    """

    __test__ = False  # to pytest

    name: str
    analysis: Analysis | None
    pictures: Sequence[tuple[str, bytes]] = ()


class _Confusion(NamedTuple):
    names: list[str]
    rows: list[tuple[str, list[tuple[int, float]]]]  # (truth, (count, share of the row) ...)
    omitted: int


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    tests: Sequence[TestSet] = (),
    run: RunFacts | None = None,
) -> Path:
    """Write what there is to ``path``, an HTML file, replaced at once; folders are made as needed.

    Args:
        title: of the page.
        tests: what is known of each set of data.
        run: of :func:`.run_facts.read_run`; None for results of no known run.

    Raises:
        CheckpointError: it cannot be written; what was there is as it was.
    """
    run = run or RunFacts()
    tests = [test for test in tests if test.analysis or test.pictures]
    evaluations = run.evaluations()
    keys = dict.fromkeys(key for _, values in evaluations for key in values)
    metrics = {key: metric_name(key) for key in keys}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"num": _number, "count": "{:,}".format, "base64": _base64}
    text = environment.get_template("report.html").render(
        title=title,
        date=f"{datetime.datetime.now():%d %B %Y, %H:%M}",
        version=__version__,
        run=run,
        evaluations=evaluations,
        metrics=metrics,
        scores=_scores(run, metrics, tests),
        figures=training_figures(run.curves, evaluations, metrics),
        sets=tests,
        findings_of=_findings,
        figures_of=analysis_figures,
        confusion_of=_confusion,
        errors=_ERRORS,
        sizes=_SIZES,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(os.fspath(path), lambda file: file.write(text.encode()))
    return path


def _number(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _scores(
    run: RunFacts, metrics: dict[str, str], tests: list[TestSet]
) -> list[tuple[str, float]]:
    """(what, percent) of the last evaluation, or of an analysis where there was no training."""
    evaluations = run.evaluations()
    if not evaluations:
        return [
            (f"{test.name}: {kind} {key}" if len(tests) > 1 else f"{kind} {key}", a.scores[key])
            for test in tests
            if (a := test.analysis)
            for kind in [{"segm": "mask", "bbox": "box"}.get(a.iou_type, a.iou_type)]
            for key in ("AP", "AP50", "AP75")
        ]
    scores = []
    for key, value in evaluations[-1][1].items():
        scores.append((metrics[key], value))
        for other in ("50", "75") if key == next(iter(metrics)) and key.endswith("/AP") else ():
            if found := run.curves.get(key + other):
                scores.append((metrics[key] + other, found[1][-1]))
    return scores


def _findings(a: Analysis) -> list[str]:
    """What to look at first, in sentences."""
    found = []
    kinds = [e for e in a.errors if e.delta_ap > 0]  # nan is not
    if kinds:
        worst = max(kinds, key=lambda e: e.delta_ap)
        times = f", {worst.count:,} times" if worst.count else ""  # else of lower scores
        found.append(
            f"{worst.kind.capitalize()} errors cost most: {_ERRORS.get(worst.kind, worst.kind)}"
            f"{times}. Without them AP50 would be {worst.delta_ap:.1f} higher."
        )
    classes = sorted((c for c in a.per_class if math.isfinite(c.ap)), key=lambda c: c.ap)
    if classes and classes[0].ap < classes[-1].ap:
        low, high = classes[0], classes[-1]
        found.append(
            f"The class with the lowest AP is {low.name}: {low.ap:.1f} with {low.objects:,} "
            f"objects; the highest is {high.name}: {high.ap:.1f} with {high.objects:,}."
        )
    between = a.confusion[:-1, :-1] * (1 - np.eye(len(a.classes), dtype=np.int64))
    if between.any():
        truth, predicted = np.unravel_index(between.argmax(), between.shape)
        found.append(
            f"The most frequent confusion: {a.classes[truth]} is taken for {a.classes[predicted]}, "
            f"{between.max():,} of {a.confusion[truth].sum():,} times."
        )
    sizes = {n: a.scores[f"AP{k}"] for k, n in _SIZES.items() if math.isfinite(a.scores[f"AP{k}"])}
    if len(set(sizes.values())) > 1:
        low = min(sizes, key=sizes.get)
        others = ", ".join(f"{n} {v:.1f}" for n, v in sizes.items() if n != low)
        found.append(f"By size, {low} objects have the lowest AP: {sizes[low]:.1f} ({others}).")
    bins = [b for b in a.calibration if b.count]
    if count := sum(b.count for b in bins):
        gap = sum(b.count * (b.confidence - b.precision) for b in bins) / count
        found.append(
            f"Scores are too {'high' if gap > 0 else 'low'} on average, by {abs(gap):.2f}."
            if abs(gap) >= 0.05
            else "Scores are on average as high as the part of the detections that is right."
        )
    return found


def _confusion(a: Analysis) -> _Confusion:
    """The matrix, of the classes that are confused most where there are many."""
    number = len(a.classes)
    wrong = a.confusion * (1 - np.eye(number + 1, dtype=np.int64))
    order = np.argsort(-(wrong.sum(0) + wrong.sum(1))[:number], kind="stable")
    kept = np.sort(order[:MAX_CLASSES])
    chosen = [*kept.tolist(), number]
    names = [*(a.classes[i] for i in kept), "background"]
    totals = a.confusion.sum(1)
    rows = []
    for name, i in zip(names, chosen, strict=True):
        counts = [int(a.confusion[i, j]) for j in chosen]
        rows.append((name, [(count, count / max(int(totals[i]), 1)) for count in counts]))
    return _Confusion(names, rows, number - len(kept))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
