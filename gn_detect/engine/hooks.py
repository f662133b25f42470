"""What a training shows of its progress, and when it is saved."""

from __future__ import annotations

import os

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from tqdm import tqdm

from gn_detect.checkpoint.saving import remove_checkpoints

BEFORE_EVALUATION = "model_before_evaluation"


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


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, which also saves before each evaluation, so that nothing that happens in one
    costs the training.

    Where that is not an iteration of ``period``, the file is one of its own, replaced before the
    next evaluation and removed with the next periodic checkpoint: of those, a run leaves what it
    would have left without it.

    Args:
        checkpointer, period: of Detectron2's.
        eval_period: of its EvalHook; 0 where there is nothing to evaluate.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, eval_period: int, **arguments):
        super().__init__(checkpointer, period, **arguments)
        self._eval_period = eval_period

    def step(self, iteration: int, **state) -> None:
        super().step(iteration, **state)
        done = iteration + 1
        if done % self.period == 0 or done >= self.max_iter:
            directory, name = self.checkpointer.save_dir, f"{BEFORE_EVALUATION}.pth"
            if self.path_manager.exists(os.path.join(directory, name)):
                remove_checkpoints(self.path_manager, directory, [name])
        elif self._eval_period > 0 and done % self._eval_period == 0:
            self.checkpointer.save(BEFORE_EVALUATION, iteration=iteration, **state)


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
