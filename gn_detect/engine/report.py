"""The page of a run that has come to its end: ``report.html``, from the files that it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from gn_detect import __version__
from gn_detect.settings import Settings

from .best import best_of
from .errors import quiet, sentence
from .prepare import dataset_names

logger = logging.getLogger(__name__)
RESULTS = "coco_instances_results.json"
_PICTURES = 6  # beside those of the worst images


class Report(HookBase):
    """Writes the report after the last iteration, also of a run that was finished before and is
    resumed. Registered last, in the first process alone; the others wait where they end.

    Args:
        run: its settings, as :func:`.prepare.prepare_run` has left them.
    """

    def __init__(self, run: Settings):
        self._run = run

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # else it has failed, or was stopped
            report_run(self._run)


def report_run(run: Settings, *, training: bool = True) -> None:
    """Write the report of ``run`` in the first process, unless ``TEST.REPORT`` is False. What is in
    the way is a warning, and no error: the run itself has done all that it should.

    Args:
        training: False after an evaluation alone, whose page lies with its results, in
            ``inference/report.html``, so that it replaces none of a training.
    """
    if not comm.is_main_process() or run["report"] is False:
        return
    start = time.monotonic()
    path = Path(run["output_dir"], *([] if training else ["inference"]), "report.html")
    try:
        notes = _write(run, path, training)
    except Exception as error:
        logger.warning(f"{path} was not written: {_reason(error)}")
    else:
        for note in notes:
            logger.warning(f"{path}: {note}")
        logger.info(f"report of the run: {path} ({time.monotonic() - start:.1f} s)")


def _write(run: Settings, path: Path, training: bool) -> list[str]:
    """Returns what the report lacks, in sentences."""
    # Matplotlib and supervision, which nothing else in a training needs.
    from gn_detect.evaluation.report import write_report
    from gn_detect.evaluation.run_facts import read_run

    output_dir = Path(run["output_dir"])
    facts = read_run(output_dir, run, training=training)
    here = [("gn_detect", __version__), ("command", shlex.join(sys.argv)), ("CPU", _cpu())]
    here.append(("processes", str(comm.get_world_size())))
    names = dataset_names(run, "test")
    tests = [_test_set(run, name, _results(run, name, len(names)), facts.notes) for name in names]
    best = _best(run, facts.by_iteration(facts.curves))
    facts = dataclasses.replace(facts, best=best, environment=[*here, *facts.environment])
    write_report(path, title=output_dir.resolve().name, tests=tests, run=facts)
    return facts.notes


def _best(
    run: Settings, evaluations: Iterable[tuple[int, dict[str, float]]]
) -> tuple[str, int] | None:
    from gn_detect.evaluation.run_facts import AVERAGED, METRICS

    best = best_of(run)
    for done, metrics in evaluations:
        best.take(done, metrics)
    name = METRICS.get(best.metric, best.metric) + AVERAGED * best.ema
    return (name, best.best_done) if best.best_done else None


def _results(run: Settings, name: str, count: int) -> Path:
    """Where the evaluation of a test set, of ``count``, writes what was predicted."""
    directory = Path(run["output_dir"], "inference", *([name] if count > 1 else []))
    if isinstance(run.cfg, DictConfig):
        directory = OmegaConf.select(run.cfg, "dataloader.evaluator.output_dir") or directory
    return Path(directory) / RESULTS


def _test_set(run: Settings, name: str, results: Path, notes: list[str]):
    from gn_detect.evaluation.errors import analyze
    from gn_detect.evaluation.report import TestSet
    from gn_detect.evaluation.report_pictures import draw_report_pictures

    metadata, analysis, pictures = MetadataCatalog.get(name), None, []
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not results.is_file():
        lacking = f"there is no {results}" if json_file else "it is no COCO JSON"
        notes.append(f"No analysis of {name}: {lacking}.")
        return TestSet(name, None)
    with quiet():  # the run has said it of its data
        try:
            analysis = analyze(json_file, str(results))
        except Exception as error:
            notes.append(f"No analysis of {name}: {_reason(error)}.")
        try:
            pictures = draw_report_pictures(
                *(json_file, image_root, str(results), analysis),
                others=_PICTURES,
                bit_depth_range=run["bit_depth_range"] or (),
            )
        except Exception as error:
            reason = _reason(error)
            if not any(reason in note for note in notes):
                notes.append(f"No pictures of {name}: {reason}.")
    return TestSet(name, analysis, pictures)


def _reason(error: Exception) -> str:
    return (sentence(error) or f"{type(error).__name__}: {error}").rstrip(".")


def _cpu() -> str:
    """Its name, where the system tells it, and how many cores there are."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{name}, {os.cpu_count()} cores"
