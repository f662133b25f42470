from .checkpointer import Checkpointer
from .convert import Weights, read_weights
from .newest import CheckpointError, describe_last, newest_checkpoint
from .origin import Origin
from .safe_load import WeightsError
from .weight_guards import WeightGuards

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Origin",
    "WeightGuards",
    "Weights",
    "WeightsError",
    "describe_last",
    "newest_checkpoint",
    "read_weights",
]
