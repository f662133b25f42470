"""An exponential moving average of the weights of a training (EMA), evaluated beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable

from detectron2.engine import HookBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

logger = logging.getLogger(__name__)


class EMA(HookBase):
    """After each optimizer step, ``average = d * average + (1 - d) * weights``; saved with the
    trainer's hooks. All processes have the same one, as they have the same weights.

    After t updates, ``d = min(decay, (1 + t) / (10 + t))``, as of TensorFlow's
    ``ExponentialMovingAverage``: until it reaches ``decay``, it averages about the last tenth of
    the training, however short that is, and forgets where that began. It depends on t alone, so
    that a run that is resumed, or made longer, goes on with the same average.

    GN has no running statistics, so that the average is a network like any other. Those of BN are
    averaged as the weights are. An iteration whose step the gradient scaler left out counts, too.

    Args:
        model: not wrapped for several processes; copied, which costs the memory of its weights.
        decay: below 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._decay = decay
        statistics = any(isinstance(module, _BatchNorm) for module in model.modules())
        self._averaged = AveragedModel(model, use_buffers=statistics).requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._averaged.module

    def before_train(self) -> None:
        if self._averaged.n_averaged:
            return
        if self.trainer.start_iter:
            logger.warning("the checkpoint has no average of its weights: EMA starts with them")
        self.model.load_state_dict(self._model.state_dict())

    def after_step(self) -> None:
        updates = int(self._averaged.n_averaged)
        decay = min(self._decay, (1 + updates) / (10 + updates))
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._averaged.update_parameters(self._model)

    def state_dict(self) -> dict:
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self._averaged.load_state_dict(state)


def evaluate_both(
    evaluate: Callable[[nn.Module], dict], model: nn.Module, ema: EMA | None
) -> dict[str, dict]:
    """The results of ``model``, and under ``"ema"`` those of its average, where there is one. What
    an evaluation writes to files is in the end of ``model``."""
    averaged = {}
    if ema:
        logger.info("evaluating the average of the weights (EMA); its metrics are under ema/")
        averaged = evaluate(ema.model)
        logger.info("evaluating the weights themselves")
    results = evaluate(model)
    return {**results, "ema": averaged} if averaged else results
