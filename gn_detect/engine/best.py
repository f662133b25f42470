"""Which evaluation of a run is the best, and when there is no use in going on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from gn_detect.checkpoint import WeightsError, metrics_of
from gn_detect.checkpoint.newest import iteration_of
from gn_detect.config import ConfigError
from gn_detect.data.coco import output_names
from gn_detect.evaluation import build_evaluator
from gn_detect.settings import Settings

logger = logging.getLogger(__name__)

_OF_COCO = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


@dataclasses.dataclass
class Best:
    """The best of the evaluations of a run so far, by the better of its weights and their average.

    One of iteration 0, or whose metric is nan (as where nothing is detected), is never the best;
    of equal ones it is the first, and the weights before their average.

    Args:
        metric: a name such as ``"bbox/AP50"``, of which the greater is the better; but of an error,
            ``"classification/top1_error"``, the smaller.
        early_stop: the evaluations without gain after which to stop; 0: none. Before the first
            that is not nan, none counts.
        min_delta: a gain is a value greater than that of the last gain by more than this.

    Attributes:
        done: iterations done at the last evaluation; 0: none yet.
        metrics: of that, by their flat names, ``bbox/AP`` or ``ema/bbox/AP``.
        value: of the best evaluation, as is ``gained``; negative of an error.
        best_done: iterations done at the best evaluation; 0: none yet.
        ema: the best weights are the average.
        gained: value of the last gain.
        without_gain: evaluations after it.
    """

    metric: str
    early_stop: int = 0
    min_delta: float = 0.0
    done: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    value: float = -math.inf
    best_done: int = 0
    ema: bool = False
    gained: float = -math.inf
    without_gain: int = 0

    def take(self, done: int, metrics: Mapping[str, float]) -> bool:
        """Take the metrics of an evaluation after ``done`` iterations. Whether it is the best."""
        self.done, self.metrics = done, dict(metrics)
        found = {ema: self._value(metrics_of(metrics, ema=ema)) for ema in (False, True)}
        finite = [(v, ema) for ema, v in found.items() if v is not None and math.isfinite(v)]
        if done == 0 or not finite:
            self.without_gain += self.best_done > 0
            return False
        value, ema = max(finite, key=lambda x: x[0])
        self.without_gain += 1
        if value > self.gained + self.min_delta:
            self.gained, self.without_gain = value, 0
        if value <= self.value:
            return False
        self.value, self.best_done, self.ema = value, done, ema
        return True

    def _value(self, metrics: Mapping[str, float]) -> float | None:
        """The mean over the test sets, of which Detectron2 puts the names, if there are several,
        before those of the metrics, negative of an error; None where there is no such metric."""
        values = [v for k, v in metrics.items() if f"/{k}".endswith(f"/{self.metric}")]
        sign = -1 if self.metric.endswith("error") else 1
        return sign * sum(values) / len(values) if values else None

    def unknown(self) -> str:
        """The names of the metrics of the last evaluation where the one that counts is none of
        them, and they are not all nan; "" otherwise."""
        if self._value(self.metrics) is None and any(map(math.isfinite, self.metrics.values())):
            return ", ".join(name for name in self.metrics if "/AP-" not in name)
        return ""

    @property
    def stops(self) -> bool:
        return 0 < self.early_stop <= self.without_gain

    def describe(self) -> str:
        of = "the average of the weights" if self.ema else "the weights"
        return f"{self.metric} {abs(self.value):.3f} of {of} after iteration {self.best_done}"

    def look_for_others(self, directory: str, start: int) -> None:
        """Warn where ``model_best.pth`` in ``directory`` is not of this run, which begins after
        ``start`` iterations: it goes on from an earlier checkpoint, or another one was there."""
        path = os.path.join(directory, "model_best.pth")
        found = 0
        if os.path.isfile(path):
            with contextlib.suppress(WeightsError):
                found = iteration_of(path) + 1
        # That of start was perhaps saved before it counted: the run evaluates again.
        if found not in (self.best_done, start) and "://" not in directory:
            logger.warning(
                f"{path} is of iteration {found}, but the best evaluation of this run is, so far, "
                f"that of iteration {self.best_done} (0: none): the next that is better replaces it"
            )

    def state_dict(self) -> dict:
        options = ("early_stop", "min_delta")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in options}

    def load_state_dict(self, state: Mapping) -> None:
        """With another metric than that of ``state``, none of it counts."""
        if state["metric"] != self.metric:
            logger.warning(
                f"the best evaluation was that by {state['metric']}; by {self.metric} it is looked "
                "for from here on"
            )
            return
        for name, value in state.items():
            setattr(self, name, value)


def best_of(run: Settings) -> Best:
    """What a run looks for, as its settings tell. "auto" is by masks, or by keypoints, or by boxes,
    whichever of them the model predicts."""
    metric = run["best_metric"]
    if metric == "auto":
        task = "segm" if run["masks"] else "keypoints" if run["keypoints"] else "bbox"
        metric = f"{task}/AP"
    return Best(metric, run["early_stop"], run["early_stop_min_delta"])


def check_best(run: Settings, test: Sequence[str]) -> None:
    """Check what a run says of evaluations and averages, once masks and keypoints are resolved.

    Args:
        test: names of the datasets to evaluate on.

    Raises:
        ConfigError: it cannot work.
    """
    cfg, keys = run.cfg, run.keys
    stop, delta, decay = (run[k] for k in ("early_stop", "early_stop_min_delta", "ema_decay"))
    if type(stop) is not int or stop < 0:
        raise ConfigError(
            f"{keys['early_stop']} is {stop!r}; it must be the evaluations without gain that end "
            "the run, or 0 for none"
        )
    if type(delta) not in (int, float) or not 0 <= delta < math.inf:
        raise ConfigError(
            f"{keys['early_stop_min_delta']} is {delta!r}; it must be the points of the metric "
            "(AP is of 100) beyond which a gain counts, or 0"
        )
    if type(decay) not in (int, float) or not 0 <= decay < 1:
        raise ConfigError(f"{keys['ema_decay']} is {decay!r}; it must be in [0, 1), such as 0.999")
    yaml = isinstance(cfg, CfgNode)
    counts = f"{keys['early_stop']} is {stop}, which counts evaluations during the training, but"
    if stop and not (test if yaml else OmegaConf.select(cfg, "dataloader.evaluator")):
        where = keys["test_data"] if yaml else "dataloader.evaluator"
        raise ConfigError(
            f"{counts} there is nothing to evaluate on; name data ({where}), or set it 0"
        )
    if stop and not run["eval_period"] > 0:
        raise ConfigError(
            f"{counts} {keys['eval_period']} is {run['eval_period']}; set it to the iterations "
            f"from one to the next, or {keys['early_stop']} 0"
        )
    ours = yaml or OmegaConf.select(cfg, "dataloader.evaluator._target_") is build_evaluator
    kinds = {MetadataCatalog.get(name).get("evaluator_type") for name in test}
    if ours and kinds == {"coco"}:  # of others it is seen in the first evaluation
        _check_metric(run, test)


def _check_metric(run: Settings, test: Sequence[str]) -> None:
    tasks = ["bbox", *["segm"] * bool(run["masks"]), *["keypoints"] * bool(run["keypoints"])]
    names = [f"{task}/{name}" for task in tasks for name in _OF_COCO[task]]
    classes = output_names(test, False).get("classes", [])
    of_classes = [f"{task}/AP-{c}" for task in tasks for c in classes if len(classes) > 1]
    metric = best_of(run).metric
    sets = [f"{name}/" for name in test] if len(test) > 1 else []
    if not any(metric == prefix + name for prefix in ["", *sets] for name in names + of_classes):
        example = f"; of a class: {of_classes[0]}, ..." if of_classes else ""
        raise ConfigError(
            f"{run.keys['best_metric']} is {metric!r}, which the evaluation does not measure; it "
            f"measures {', '.join(names)}{example}"
        )
