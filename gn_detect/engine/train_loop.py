"""One iteration: an optimizer step on the mean gradient of one or more forward passes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterable

import torch
from detectron2.engine import SimpleTrainer, TrainerBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_detect.config import ConfigError

logger = logging.getLogger(__name__)

# The values of SOLVER.AMP.DTYPE.
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class EarlyStop(BaseException):
    """Ends a training before its last iteration, as one that is finished: what raises it has set
    ``iter`` and ``max_iter`` of the trainer. No ``Exception``, as it is no error."""


class EndsEarly(TrainerBase):
    """Detectron2's loop, which :class:`EarlyStop` ends."""

    def train(self, start_iter: int, max_iter: int) -> None:
        with contextlib.suppress(EarlyStop):
            super().train(start_iter, max_iter)


class AccumulatingTrainer(SimpleTrainer, EndsEarly):
    """Detectron2's SimpleTrainer and AMPTrainer in one, with gradient accumulation.

    An iteration draws ``accumulate_steps`` batches, runs the model forward and backward on each,
    and takes one optimizer step on the mean of their gradients, so that schedules and hooks count
    optimizer steps. Batches of one iteration weigh the same, as processes do in data parallel
    training (Goyal et al., https://arxiv.org/abs/1706.02677, section 3.1): with a loss that is a
    mean over images this is the gradient of one large batch.

    Args:
        model: takes a batch and returns a dict of scalar losses, or one scalar loss.
        data_loader: yields the batches.
        optimizer: clips gradients in its ``step``, if at all, as Detectron2's do: there they are
            averaged, and no longer scaled.
        accumulate_steps: batches of an iteration, in each process.
        amp_dtype: run the forward pass under autocast to this dtype; with float16, scale the loss
            so that small gradients do not vanish (Micikevicius et al.,
            https://arxiv.org/abs/1710.03740, section 3.2), and leave out the steps whose gradients
            overflow. None: no mixed precision.
        check_gradients: where the loss is not scaled, stop before a step on gradients that are
            infinite or NaN. Their clipping by value is reason to switch it off: it mends the
            infinite ones.
        remedy: what the message of a run that diverged advises.

    Attributes:
        batches: what the iteration has drawn so far.
        losses: of each of ``batches`` that has passed the model: name -> scalar tensor, detached.
        grad_scaler: None, except with float16.

    Raises:
        ValueError: ``accumulate_steps`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        accumulate_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        check_gradients: bool = True,
        remedy: str = "lower the learning rate",
    ):
        super().__init__(model, data_loader, optimizer)
        if accumulate_steps < 1:
            raise ValueError(f"accumulate_steps is {accumulate_steps}; it must be at least 1")
        self.accumulate_steps = accumulate_steps
        self.amp_dtype = amp_dtype
        self.check_gradients = check_gradients
        self.remedy = remedy
        self.batches: list = []
        self.losses: list[dict[str, torch.Tensor]] = []
        self._device_type = next(model.parameters()).device.type
        unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
        names = {parameter: name for name, parameter in unwrapped.named_parameters()}
        for group in optimizer.param_groups:  # saved with its state
            group["param_names"] = [names[parameter] for parameter in group["params"]]
        self.grad_scaler: torch.amp.GradScaler | None = None
        if amp_dtype == torch.float16:
            self.grad_scaler = torch.amp.GradScaler(self._device_type)

    def run_step(self) -> None:
        """
        Raises:
            FloatingPointError: a loss, a predicted box or an unscaled gradient is infinite or NaN;
                the message names the images. The optimizer has not taken the step.
        """
        previous = self.losses[-1] if self.losses else {}
        try:
            self._run_step()
        except FloatingPointError as error:
            raise FloatingPointError(self._describe(error, previous)) from None

    def _run_step(self) -> None:
        assert self.model.training, "[AccumulatingTrainer] model was changed to eval mode!"
        self.batches, self.losses = [], []
        data_time = 0.0
        self.optimizer.zero_grad()
        for step in range(self.accumulate_steps):
            start = time.perf_counter()
            self.batches.append(next(self._data_loader_iter))
            data_time += time.perf_counter() - start
            # Processes exchange what they have accumulated, once, in the last backward pass.
            last = step == self.accumulate_steps - 1
            parallel = isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if last or not parallel else self.model.no_sync():
                self._forward_backward(self.batches[-1])

        self.after_backward()
        # Detectron2 checks the mean over all processes, on the first one. Here each process checks
        # its own losses, so that the error names the images that caused it.
        losses = [loss.float() for losses in self.losses for loss in losses.values()]
        if not torch.stack(losses).isfinite().all():
            raise FloatingPointError("a loss is not finite")
        # Gathers the losses of all processes: past it, those of each one have been finite.
        self._write_metrics(self.mean_losses(), data_time)

        if self.grad_scaler:
            self.grad_scaler.step(self.optimizer)  # unscales the gradients first
            self.grad_scaler.update()
        else:
            if self.check_gradients:
                # The norm costs a few kernels for all parameters, and one wait for the device.
                gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
                if not nn.utils.get_total_norm(gradients).isfinite():
                    raise FloatingPointError("a gradient is not finite")
            self.optimizer.step()

    def _forward_backward(self, batch) -> None:
        enabled = self.amp_dtype is not None
        with torch.autocast(self._device_type, dtype=self.amp_dtype, enabled=enabled):
            losses = self.model(batch)
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        self.losses.append({name: loss.detach() for name, loss in losses.items()})
        loss = sum(losses.values()) / self.accumulate_steps
        if self.grad_scaler:
            loss = self.grad_scaler.scale(loss)
        loss.backward()

    def mean_losses(self) -> dict[str, torch.Tensor]:
        """The losses of this process, averaged over the batches of the iteration."""
        return {
            name: torch.stack([losses[name].double() for losses in self.losses]).mean()
            for name in self.losses[0]
        }

    def _describe(self, cause: FloatingPointError, previous: dict[str, torch.Tensor]) -> str:
        """The sentence for a user whose training diverged, with the images at fault."""
        batch, which, losses = self._culprit(previous)
        files = ", ".join(d.get("file_name", "(no file)") for d in batch)
        terms = ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items()) or "none"
        return (
            f"training diverged at iteration {self.iter} ({cause}); {which}losses: {terms}; "
            f"images: {files}. Earlier checkpoints are intact; {self.remedy}, and look at these "
            "images"
        )

    def _culprit(self, previous: dict) -> tuple[list[dict], str, dict[str, torch.Tensor]]:
        """The images at fault, and the losses to show, with what to call them; ``previous`` are
        those of the last pass of the iteration before."""
        for batch, losses in zip(self.batches, self.losses, strict=False):
            if not all(loss.isfinite() for loss in losses.values()):
                return batch, "", losses
        if len(self.losses) < len(self.batches):  # predicted boxes were infinite before the loss
            return self.batches[-1], "previous ", self.losses[-1] if self.losses else previous
        # The gradient is that of all batches.
        return list(itertools.chain(*self.batches)), "", self.mean_losses()

    def state_dict(self) -> dict:
        """SimpleTrainer's, with ``grad_scaler`` as in AMPTrainer's."""
        state = super().state_dict()
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Load the state of a run with, or without, mixed precision.

        The optimizer takes what it has gathered (momentum), parameter by parameter, and keeps its
        options (rates, weight decay), which are those of this run.

        Raises:
            ConfigError: the state is of another number of parameters, and does not name them.
        """
        super().load_state_dict({**state, "optimizer": self._with_our_options(state["optimizer"])})
        if self.grad_scaler and "grad_scaler" in state:
            self.grad_scaler.load_state_dict(state["grad_scaler"])

    def _with_our_options(self, theirs: dict) -> dict:
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as a scheduler does
        ours = self.optimizer.state_dict()
        names = list(itertools.chain(*(g["param_names"] for g in ours["param_groups"])))
        indices = list(itertools.chain(*(g["params"] for g in theirs["param_groups"])))
        if all("param_names" in group for group in theirs["param_groups"]):
            named = itertools.chain(*(g["param_names"] for g in theirs["param_groups"]))
        elif len(indices) == len(names):  # of Detectron2, in the order of its groups
            named = names
        else:
            raise ConfigError(
                f"the checkpoint's optimizer has {len(indices)} parameters, this run's "
                f"{len(names)}; start a new run, in another directory, from its weights"
            )
        index = dict(zip(named, indices, strict=True))
        gathered = {name: theirs["state"].get(index.get(name)) for name in names}
        fresh = [name for name in names if name not in index]
        if fresh:
            logger.warning(
                f"the checkpoint's optimizer does not know {len(fresh)} parameters of this run, "
                f"such as {fresh[0]}; they start without momentum"
            )
        state = {i: value for i, value in enumerate(gathered.values()) if value is not None}
        return {"state": state, "param_groups": ours["param_groups"]}
