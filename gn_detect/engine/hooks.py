"""What a training shows of its progress, and when it is saved, evaluated and stopped."""

from __future__ import annotations

import os
import time

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from tqdm import tqdm

from gn_detect.checkpoint import Checkpointer
from gn_detect.checkpoint.saving import remove_checkpoints
from gn_detect.distributed import from_first_process

from .agreement import check_weights_same
from .resume import Resume
from .stopping import request

LATEST = "model_latest"
GO_ON = "go on with --resume (same command)"


class FirstIterations(HookBase):
    """Print the metrics of iterations 1, 2, 5 and 10, too: the 20 of Detectron2's writers can be
    minutes away.

    Args:
        max_iter: of the run.
        period: of the writers, which print the last iteration, too.
    """

    def __init__(self, max_iter: int, period: int = 20):
        self._printer = CommonMetricPrinter(max_iter)
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        written = done % self._period == 0 or done == self.trainer.max_iter
        if done - self.trainer.start_iter in (1, 2, 5, 10) and not written:
            self._printer.write()


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
        iteration, done = self.trainer.iter, self.trainer.iter + 1
        names = [f"model_{iteration:07d}"] if _every(self._period, done) else []
        if done >= self.trainer.max_iter:
            names.append("model_final")
        if names:
            check_weights_same(self._checkpointer.model, done)
        due = 0 < self._seconds <= time.monotonic() - self._saved_at
        # The clock of the first process counts.
        stops, due = request.agree(due and comm.is_main_process())
        if not names and (stops or due or _every(self._eval_period, done)):
            names = [LATEST]
        if names:
            self._resume.gather_random_states()
            from_first_process(lambda: self._save(names, iteration))
            self._saved_at = time.monotonic()
            file = os.path.join(self._checkpointer.save_dir, f"{names[-1]}.pth")
            request.so_far = f"after iteration {done}; {file} has it: {GO_ON}"
            request.stop_together()

    def _save(self, names: list[str], iteration: int) -> None:
        for name in names:
            self._checkpointer.save(name, iteration=iteration)
        directory, latest = self._checkpointer.save_dir, f"{LATEST}.pth"
        path_manager = self._checkpointer.path_manager
        if names != [LATEST] and path_manager.exists(os.path.join(directory, latest)):
            remove_checkpoints(path_manager, directory, [latest])

    def after_train(self) -> None:
        request.waits = False


class EvalHook(hooks.EvalHook):
    """Detectron2's, which does not wait to be stopped.

    A checkpoint is of before its evaluation: a run that is resumed from one begins with that.
    """

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if 0 < start < self.trainer.max_iter and _every(self._period, start):
            self.trainer.storage.iter = start - 1  # in metrics.json it belongs to that iteration
            self._do_eval()

    def _do_eval(self) -> None:
        with request.immediately("in the evaluation "):
            super()._do_eval()

    def after_train(self) -> None:
        # Detectron2's also evaluates a run that has failed, or was stopped, in the last iteration.
        finished = self.trainer.iter >= max(self.trainer.max_iter, self.trainer.start_iter + 1)
        self._eval_after_train &= finished
        super().after_train()


def _every(period: int, done: int) -> bool:
    return period > 0 and done % period == 0


class ProgressBar(EventWriter):
    """Iteration, losses and remaining time in one line of a terminal.

    Args:
        start_iter, max_iter: range of the iterations.
    """

    def __init__(self, start_iter: int, max_iter: int):
        self._bar = tqdm(total=max_iter, initial=start_iter, unit="it", dynamic_ncols=True)

    def write(self) -> None:
        storage = get_event_storage()
        losses = {
            name.removeprefix("loss_"): f"{buffer.median(20):.3g}"
            for name, buffer in storage.histories().items()
            if name.startswith("loss_") or name == "total_loss"
        }
        self._bar.set_postfix(losses, refresh=False)
        # After the last iteration Detectron2 writes once more, as if there was another one.
        self._bar.update(min(storage.iter + 1, self._bar.total) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
