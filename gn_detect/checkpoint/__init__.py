from .checkpointer import Checkpointer
from .convert import Weights, read_weights
from .lock import lock_output, unlock_output
from .newest import CheckpointError, describe_last, newest_checkpoint
from .origin import Origin
from .safe_load import WeightsError
from .saving import metrics_of
from .weight_guards import WeightGuards

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Origin",
    "WeightGuards",
    "Weights",
    "WeightsError",
    "describe_last",
    "lock_output",
    "metrics_of",
    "newest_checkpoint",
    "read_weights",
    "unlock_output",
]
