"""What our trainer watches: losses that are not finite, and progress on a terminal."""

from __future__ import annotations

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from tqdm import tqdm


class FiniteLossCheck(HookBase):
    """Stop before the optimizer takes a step on a loss that is infinite or NaN.

    Detectron2 checks the mean over all processes, on the first one. Here each process checks its
    own losses, so that the error names the images that caused it.

    Args:
        model: the model that is trained, as the trainer calls it (a DDP wrapper included).
    """

    def __init__(self, model: nn.Module):
        self._batch: list[dict] = []
        self._losses: dict[str, torch.Tensor] = {}
        self._previous: dict[str, torch.Tensor] = {}
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    def _before_forward(self, model, inputs):
        if model.training:
            self._batch, self._previous, self._losses = inputs[0], self._losses, {}

    def _after_forward(self, model, inputs, losses):
        if model.training:  # a dict, or one tensor, as SimpleTrainer accepts
            losses = losses if isinstance(losses, dict) else {"total_loss": losses}
            self._losses = {name: loss.detach() for name, loss in losses.items()}

    def after_backward(self) -> None:
        """
        Raises:
            FloatingPointError: a loss is not finite.
        """
        losses = torch.stack([loss.float() for loss in self._losses.values()])
        if not torch.isfinite(losses).all():
            raise FloatingPointError("a loss is not finite")

    def describe(self, iteration: int, cause: Exception) -> str:
        """The sentence for a user whose training diverged at ``iteration``."""
        files = ", ".join(d.get("file_name", "(no file)") for d in self._batch)
        # Predicted boxes can be found infinite before this iteration has any loss.
        which, losses = ("", self._losses) if self._losses else ("previous ", self._previous)
        terms = ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items()) or "none"
        return (
            f"training diverged at iteration {iteration} ({cause}); {which}losses: {terms}; "
            f"images: {files}. Earlier checkpoints are intact; lower SOLVER.BASE_LR, raise "
            "SOLVER.WARMUP_ITERS or enable SOLVER.CLIP_GRADIENTS, and look at these images"
        )


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
