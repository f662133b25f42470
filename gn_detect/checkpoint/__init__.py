from .checkpointer import Checkpointer
from .convert import Weights, read_weights
from .origin import Origin
from .safe_load import WeightsError
from .saving import CheckpointError
from .weight_guards import WeightGuards

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Origin",
    "WeightGuards",
    "Weights",
    "WeightsError",
    "read_weights",
]
