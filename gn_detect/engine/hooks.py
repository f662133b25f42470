"""What our trainer watches: losses that are not finite, and progress on a terminal."""

from __future__ import annotations

import itertools

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage
from tqdm import tqdm


class FiniteLossCheck(HookBase):
    """Stop before the optimizer takes a step on a loss that is infinite or NaN.

    Detectron2 checks the mean over all processes, on the first one. Here each process checks its
    own losses, so that the error names the images that caused it. For an
    :class:`~gn_detect.engine.train_loop.AccumulatingTrainer`.
    """

    def __init__(self):
        self._previous: dict[str, torch.Tensor] = {}

    def after_backward(self) -> None:
        """
        Raises:
            FloatingPointError: a loss is not finite.
        """
        losses = [loss.float() for step in self.trainer.losses for loss in step.values()]
        if not torch.stack(losses).isfinite().all():
            raise FloatingPointError("a loss is not finite")
        self._previous = self.trainer.losses[-1]

    def describe(self, iteration: int, cause: Exception, remedy: str) -> str:
        """The sentence for a user whose training diverged at ``iteration``; ``remedy`` names the
        keys to change."""
        batch, which, losses = self._culprit()
        files = ", ".join(d.get("file_name", "(no file)") for d in batch)
        terms = ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items()) or "none"
        return (
            f"training diverged at iteration {iteration} ({cause}); {which}losses: {terms}; "
            f"images: {files}. Earlier checkpoints are intact; {remedy}, and look at these images"
        )

    def _culprit(self) -> tuple[list[dict], str, dict[str, torch.Tensor]]:
        """The images at fault, and the losses to show, with what to call them."""
        batches, losses = self.trainer.batches, self.trainer.losses
        for batch, terms in zip(batches, losses, strict=False):
            if not all(loss.isfinite() for loss in terms.values()):
                return batch, "", terms
        if len(losses) < len(batches):  # predicted boxes were found infinite before the loss
            return batches[-1], "previous ", losses[-1] if losses else self._previous
        # The gradient is that of all batches.
        return list(itertools.chain(*batches)), "", self.trainer.mean_losses()


class FirstIterations(HookBase):
    """Print the metrics of iterations 1, 2, 5 and 10, too: the 20 of Detectron2's writers can be
    minutes away.

    Args:
        max_iter: of the run.
    """

    def __init__(self, max_iter: int):
        self._printer = CommonMetricPrinter(max_iter)

    def after_step(self) -> None:
        if self.trainer.iter + 1 - self.trainer.start_iter in (1, 2, 5, 10):
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
