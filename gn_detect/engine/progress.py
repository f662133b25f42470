"""What a training shows of its progress."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from tqdm import tqdm


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
