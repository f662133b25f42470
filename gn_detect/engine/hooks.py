"""When a training is saved, evaluated and stopped."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import (
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.logger import log_first_n

from gn_detect.checkpoint import Checkpointer
from gn_detect.checkpoint.saving import remove_checkpoints
from gn_detect.distributed import from_first_process

from .agreement import check_weights_same
from .best import Best
from .resume import Resume
from .stopping import request
from .train_loop import EarlyStop

logger = logging.getLogger(__name__)
LATEST = "model_latest"
GO_ON = "go on with --resume (same command)"


class Saving(HookBase):
    """Saves the run, in its first process, and stops it where it was asked to.

    As Detectron2's PeriodicCheckpointer, with the same names, after every ``period`` iterations and
    the last one. Besides, before each evaluation, so that nothing that happens in one costs the
    training; where the last save was ``seconds`` ago; and before it stops. Where that is not an
    iteration of ``period``, the file is ``model_latest.pth``, replaced each time and removed with
    the next periodic checkpoint: of those, a run leaves what it would have left without it.

    All processes register it, before the hook that evaluates.

    Args:
        checkpointer: of the run.
        resume: gathers what the processes need to go on.
        period: iterations; 0: save after the last one alone.
        seconds: 0: save by iterations alone.
        eval_period: of the EvalHook; 0 where there is nothing to evaluate.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        resume: Resume,
        period: int,
        *,
        seconds: float = 0,
        eval_period: int = 0,
    ):
        self._checkpointer = checkpointer
        self._resume = resume
        self._period = period
        self._seconds = seconds
        self._eval_period = eval_period
        self.directory = checkpointer.save_dir

    def before_train(self) -> None:
        """
        Raises:
            Stopped: one of the processes was asked to.
        """
        if start := self.trainer.start_iter:
            request.so_far = (
                f"before the first step of this run; the checkpoint of iteration {start} is as it "
                f"was: {GO_ON}"
            )
        check_weights_same(self._checkpointer.model, start)
        request.waits = True  # from here on
        request.stop_together()
        self._saved_at = time.monotonic()

    def after_step(self) -> None:
        """
        Raises:
            Stopped: one of the processes was asked to, and the run is saved.
            CheckpointError: the first process could not save it.
        """
        done = self.trainer.iter + 1
        names = self._names(done, done >= self.trainer.max_iter)
        if names:
            check_weights_same(self._checkpointer.model, done)
        due = 0 < self._seconds <= time.monotonic() - self._saved_at
        # The clock of the first process counts.
        stops, due = request.agree(due and comm.is_main_process())
        if not names and (stops or due or _every(self._eval_period, done)):
            names = [LATEST]
        if names:
            self._write(names, done, {})
            request.stop_together()

    def evaluated(self, best: Best, is_best: bool, final: bool) -> None:
        """Save, once more, what was evaluated, with its metrics. All processes call it.

        Args:
            best: has taken the evaluation.
            is_best: save the weights as ``model_best``, first, so that a run that is killed
                before it is saved once more evaluates again, and finds the same.
            final: the run ends with it.

        Raises:
            CheckpointError: the first process could not save it.
        """
        if is_best:
            options = {"iteration": best.done - 1, "metrics": best.metrics, "ema": best.ema}
            save = functools.partial(self._checkpointer.save_weights, "model_best", pth=True)
            from_first_process(lambda: save(**options))
        self._write(self._names(best.done, final) or [LATEST], best.done, best.metrics)

    def _names(self, done: int, final: bool) -> list[str]:
        names = [f"model_{done - 1:07d}"] if _every(self._period, done) else []
        return [*names, *["model_final"] * final]

    def _write(self, names: list[str], done: int, metrics: dict[str, float]) -> None:
        self._resume.gather_random_states()
        # An evaluation may be before the first step, or after the last one: iter, which the
        # checkpoint has, is beyond what is done.
        iteration, self.trainer.iter = self.trainer.iter, done - 1
        try:
            from_first_process(lambda: self._save(names, done - 1, metrics))
        finally:
            self.trainer.iter = iteration
        self._saved_at = time.monotonic()
        file = os.path.join(self.directory, f"{names[-1]}.pth")
        request.so_far = f"after iteration {done}; {file} has it: {GO_ON}"

    def _save(self, names: list[str], iteration: int, metrics: dict[str, float]) -> None:
        for name in names:
            self._checkpointer.save(name, iteration=iteration, metrics=metrics)
        latest, path_manager = f"{LATEST}.pth", self._checkpointer.path_manager
        if names != [LATEST] and path_manager.exists(os.path.join(self.directory, latest)):
            remove_checkpoints(path_manager, self.directory, [latest])

    def after_train(self) -> None:
        request.waits = False


class EvalHook(hooks.EvalHook):
    """Detectron2's, which does not wait to be stopped, and looks for the best evaluation.

    A checkpoint is of before its evaluation, and then once more, with its metrics, of after it: a
    run that is resumed from the first begins with the evaluation.

    Args:
        period, evaluate: of Detectron2's; ``evaluate`` returns nothing in other processes than the
            first.
        best: takes the evaluations; saved with the trainer's hooks.
        saving: registered before it.
        keys: of the settings ``early_stop`` and ``best_metric``, for messages.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        best: Best | None = None,
        saving: Saving | None = None,
        keys: Mapping[str, str] | None = None,
    ):
        super().__init__(period, evaluate)
        self._best = best
        self._saving = saving
        self._keys = keys or {}

    def state_dict(self) -> dict:
        return self._best.state_dict() if self._best else {}

    def load_state_dict(self, state: dict) -> None:
        if self._best:
            self._best.load_state_dict(state)

    def before_train(self) -> None:
        start, best = self.trainer.start_iter, self._best
        if best and comm.is_main_process():
            best.look_for_others(self._saving.directory, start)
        if best and best.stops and best.done == start < self.trainer.max_iter:
            self._stop()
        if 0 < start < self.trainer.max_iter and _every(self._period, start):
            self.trainer.storage.iter = start - 1  # in metrics.json it belongs to that iteration
            if best and best.done == start:
                self.trainer.storage.put_scalars(**best.metrics, smoothing_hint=False)
            else:
                self._do_eval()

    def _do_eval(self) -> None:
        with request.immediately("in the evaluation "):
            found = flatten_results_dict(self._func() or {})
            metrics = {name: float(value) for name, value in found.items()}
            self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)
            if self.trainer.iter < self.trainer.max_iter:  # at the end, the writers do
                self._write()
            comm.synchronize()
        if self._best:
            self._judge(from_first_process(lambda: metrics))

    def _write(self) -> None:
        """To the files, at once: of the evaluations within a period of the writers, Detectron2's
        write the last alone."""
        periodic = (h for h in self.trainer._hooks if isinstance(h, hooks.PeriodicWriter))
        for writer in (writer for hook in periodic for writer in hook._writers):
            if isinstance(writer, (JSONWriter, TensorboardXWriter)):
                writer.write()

    def _judge(self, metrics: dict[str, float]) -> None:
        """In all processes, with the metrics of the first."""
        best, last = self._best, self.trainer.max_iter
        done = min(self.trainer.storage.iter + 1, last)  # it is beyond the end after that
        if not metrics or done in (0, best.done):  # of a finished run, that one is resumed
            return
        is_best = best.take(done, metrics)
        if is_best:
            logger.info(f"the best evaluation so far: {best.describe()}; saved as model_best")
        elif names := best.unknown():
            text = f"{self._keys['best_metric']}: {best.metric} is not measured, so that no "
            text += f"evaluation is the best; there are {names}"
            log_first_n(logging.WARNING, text, key="message")
        if best.stops and done < last:
            self._stop(is_best)
        self._saving.evaluated(best, is_best, final=done == last)

    def _stop(self, is_best: bool = False) -> None:
        best, trainer, key = self._best, self.trainer, self._keys["early_stop"]
        logger.info(
            f"the run ends early, after iteration {best.done} of {trainer.max_iter}: the last "
            f"{best.without_gain} evaluations brought no gain ({key} is {best.early_stop}; with a "
            "greater one --resume goes on)"
        )
        self._saving.evaluated(best, is_best, final=True)
        self._eval_after_train = False
        self._conclude()
        trainer.iter = trainer.max_iter = best.done
        raise EarlyStop

    def _conclude(self) -> None:
        best = self._best
        if best and best.best_done:
            logger.info(f"the best evaluation: {best.describe()}; model_best has it")
        elif best and best.done and not best.unknown():  # which was said
            logger.warning(f"{best.metric} was nan in each evaluation: there is no model_best")

    def after_train(self) -> None:
        # Detectron2's also evaluates a run that has failed, or was stopped, in the last iteration.
        finished = self.trainer.iter >= max(self.trainer.max_iter, self.trainer.start_iter + 1)
        self._eval_after_train &= finished
        super().after_train()
        if self._eval_after_train:
            self._conclude()


def _every(period: int, done: int) -> bool:
    return period > 0 and done % period == 0
