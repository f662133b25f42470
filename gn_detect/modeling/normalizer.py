"""What a loss is divided by, held over the passes of an iteration."""

from __future__ import annotations

from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from torch import nn

from gn_detect.config import ConfigError

NORMALIZERS = ("batch", "running")
MOMENTUM = 0.9  # of RetinaNet's, in Detectron2


class RunningMean:
    """Of objects per image. An iteration divides by what it was before; all its passes, in all
    processes, then enter it together, so that several are as one of all their images.

    Detectron2's RetinaNet has such a mean, which each pass changes (``DenseDetector._ema_update``).

    Args:
        value: to start with.
    """

    def __init__(self, value: float):
        self.value = value
        self._objects = self._images = 0

    def __call__(self, objects: int, images: int) -> float:
        """What to divide a sum over the ``objects`` of so many ``images`` by; they are counted."""
        self._objects += objects
        self._images += images
        return self.value * images

    def update(self) -> None:
        """At the end of an iteration, in all processes."""
        counts = comm.all_gather((self._objects, self._images))
        objects, images = map(sum, zip(*counts, strict=True))
        self._objects = self._images = 0
        if images:
            self.value += (1 - MOMENTUM) * (max(objects, 1) / images - self.value)


def running_mean(kind: str, key: str, value: float) -> RunningMean | None:
    """For one of ``NORMALIZERS``, of the config key ``key``; None for "batch".

    Raises:
        ConfigError: ``kind`` is unknown.
    """
    if kind not in NORMALIZERS:
        raise ConfigError(f"{key} is {kind!r}; known: {', '.join(NORMALIZERS)}")
    return RunningMean(value) if kind == "running" else None


class RunningMeans(HookBase):
    """Updates those of a model after each iteration, and keeps them in checkpoints; also the mean
    that Detectron2's RetinaNet and FCOS have as a plain attribute, of several processes that of the
    first."""

    def __init__(self, model: nn.Module):
        modules = dict(getattr(model, "module", model).named_modules())  # without DDP
        self._means = {
            f"{name}.{key}": value
            for name, module in modules.items()
            for key, value in vars(module).items()
            if isinstance(value, RunningMean)
        }
        self._dense = {n: m for n, m in modules.items() if isinstance(m, DenseDetector)}

    def after_step(self) -> None:
        for mean in self._means.values():
            mean.update()

    def state_dict(self) -> dict[str, float]:
        means = {name: mean.value for name, mean in self._means.items()}
        for name, module in self._dense.items():
            if hasattr(module, "loss_normalizer"):  # from its first pass on
                means[f"{name}.loss_normalizer"] = module.loss_normalizer
        return means

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in self._means.keys() & state.keys():
            self._means[name].value = state[name]
        for name, module in self._dense.items():
            if (key := f"{name}.loss_normalizer") in state:
                module.loss_normalizer = state[key]
