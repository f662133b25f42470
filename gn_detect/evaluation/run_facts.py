"""What a run leaves behind in its output directory, read for its report."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gn_detect.settings import Settings
from gn_detect.visualize import read_curves

# The evaluations of a page, in the order in which it shows them, by their keys in metrics.json.
METRICS = {
    "segm/AP": "mask AP",
    "keypoints/AP": "keypoint AP",
    "bbox/AP": "box AP",
    "panoptic_seg/PQ": "panoptic quality",
    "sem_seg/mIoU": "semantic mIoU",
    "classification/top1_error": "top-1 error",
    "classification/top5_error": "top-5 error",
}
AVERAGED, AUGMENTED = " (EMA)", " (TTA)"
_RECORD = re.compile(r"^\[\d\d/\d\d \d\d:\d\d:\d\d\]", re.MULTILINE)  # begins one of the log
_COLOR = re.compile(r"\x1b\[[\d;]*m")
# Rows of Detectron2's table that say nothing of a run.
_LEFT_OUT = ("sys.platform", "detectron2._C", "Compiler ($CXX)", "DETECTRON2_ENV_MODULE", "cv2")
_LEFT_OUT += ("PyTorch debug build", "torch._C._GLIBCXX_USE_CXX11_ABI")
# Name -> a pattern of the value in the log.
_LOGGED = {
    "took, since its last start": r"Total training time: (\S+)",
    "GPU memory, at most, MB": r"max_mem: (\d+)M",
    "seconds per iteration": r"Overall training speed: .*\((\S+) s / it\)",
}


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What a report tells of a run; what is empty is left out.

    Attributes:
        curves: of :func:`gn_detect.visualize.read_curves`.
        max_iter: of the training; 0 where it is not known.
        best: what the best evaluation is called, and the iterations done at it, as the run decides
            (:class:`gn_detect.engine.best.Best`); None where there is none.
        schedule, environment: (name, value).
        data: (dataset, what was printed of it at the start).
        config: as YAML.
        notes: sentences on what the report lacks.
    """

    curves: dict[str, tuple[list[int], list[float]]] = dataclasses.field(default_factory=dict)
    max_iter: int = 0
    best: tuple[str, int] | None = None
    schedule: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    environment: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    data: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    config: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)

    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """(iterations done, key of metrics.json -> value), in order, of the ``METRICS``; of several
        test sets each with its name in front, those of the averaged weights after ``ema/``, and of
        test-time augmentation as ``bbox_TTA/AP``."""
        return self.by_iteration(sorted(filter(metric_name, self.curves), key=_order))

    def by_iteration(self, keys: Iterable[str]) -> list[tuple[int, dict[str, float]]]:
        """(iterations done, key -> value), in order, of ``keys`` of ``curves``."""
        found: dict[int, dict[str, float]] = {}
        for key in keys:
            for iteration, value in zip(*self.curves[key], strict=True):
                # Detectron2 counts from 0, but has the last evaluation after all iterations.
                done = min(iteration + 1, self.max_iter or iteration + 1)
                found.setdefault(done, {})[key] = value
        return sorted(found.items())


def metric_name(key: str) -> str:
    """``bbox/AP`` is "box AP", ``ema/photos/bbox/AP`` "photos: box AP (EMA)", and ``bbox_TTA/AP``
    "box AP (TTA)"; "" for others."""
    kind, test, metric = _split(key)
    name = METRICS.get(metric, "")
    test = f"{test}: " if test else ""
    return name and f"{test}{name}{kind}"


def _split(key: str) -> tuple[str, str, str]:
    """``AVERAGED``, ``AUGMENTED`` or "", the test set, and the metric."""
    *parts, task, metric = ["", *key.split("/")]
    kind = AVERAGED if parts[1:2] == ["ema"] else AUGMENTED if "_TTA/" in key else ""
    test = "/".join(parts[2 if kind == AVERAGED else 1 :])
    return kind, test.removesuffix("_TTA"), f"{task.removesuffix('_TTA')}/{metric}"


def _order(key: str) -> tuple:
    """Test set by test set, the metrics in their order."""
    kind, test, metric = _split(key)
    return kind, test, list(METRICS).index(metric)


def read_run(directory: str | os.PathLike, run: Settings, *, training: bool = True) -> RunFacts:
    """
    Args:
        directory: the output directory of a run; a file that is not there is told in ``notes``.
        run: its settings, as :func:`gn_detect.engine.prepare.prepare_run` has left them.
        training: False for an evaluation alone: its page has no curves and no schedule, though
            another run may have left some there.
    """
    directory, notes, facts = Path(directory), [], {}
    log = _COLOR.sub("", _read(directory / "log.txt", notes))
    starts = [match.start() for match in _RECORD.finditer(log)] + [len(log)]
    records = [log[a:b].rstrip() for a, b in zip(starts, starts[1:], strict=False)]
    environment = [r.partition("Environment info:")[2] for r in records]
    if training:
        try:
            facts["curves"] = read_curves(directory / "metrics.json")
        except ValueError as error:
            notes.append(f"No curves: {error}.")
        described = (
            re.search(r"describe_data INFO: data of (.+?): (.*)", r, re.S) for r in records
        )
        facts["data"] = list(dict(match.groups() for match in described if match).items())
        logged = {
            name: values[-1]
            for name, pattern in _LOGGED.items()
            if (values := re.findall(pattern, log))
        }
        steps = facts.get("curves", {}).get("total_loss", ([-1],))[0]
        for done in re.findall(r"the run ends early, after iteration (\d+) of", log)[-1:]:
            if steps[-1] < int(done):  # else it was resumed, and went on
                logged["ended early, after iteration"] = f"{int(done):,}"
        facts |= {"schedule": _schedule(run, logged), "max_iter": run["max_iter"]}
    return RunFacts(
        **facts,
        environment=_table(next(filter(None, reversed(environment)), "")),
        config=_read(directory / "config.yaml", notes),
        notes=notes,
    )


def _read(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror}).")
        return ""


def _schedule(run: Settings, logged: dict[str, str]) -> list[tuple[str, str]]:
    steps, accumulated = run["milestones"], run["accumulate_steps"] or 1
    if run["num_updates"] and steps:  # of a lazy config, which need not be in iterations
        steps = [round(step / run["num_updates"] * run["max_iter"]) for step in steps]
    passes = f" ({accumulated} forward passes)" * (accumulated > 1)
    rows = {
        "trained on": _names(run["train_data"] or run["train_folder"]),
        "evaluated on": _names(run["test_data"] or run["test_folder"]),
        "classes": run["num_classes"],
        "started from": run["weights"] or "random weights",
        "iterations": f"{run['max_iter']:,}",
        "images per iteration": f"{run['ims_per_batch']}{passes}",
        "learning rate": run["base_lr"] and f"{run['base_lr']:.4g}",
        "lowered at": ", ".join(f"{step:,}" for step in steps or ()),
        "warm-up, iterations": run["warmup_iters"],
        "precision": run["amp_dtype"] if run["amp"] else "float32",
        "device": run["device"],
        **logged,
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _names(datasets: Any) -> str:
    return datasets if isinstance(datasets, str) else ", ".join(datasets or ())


def _table(text: str) -> list[tuple[str, str]]:
    """The first table of Detectron2's ``collect_env_info``."""
    _, *parts = re.split(r"^-[ -]+$", text, flags=re.MULTILINE)
    rows = [re.split(r"\s{2,}", row.strip(), maxsplit=1) for row in "".join(parts[:1]).splitlines()]
    return [
        (name, value[0].partition(" @")[0])  # without the path
        for name, *value in rows
        if value and name not in _LEFT_OUT
    ]
