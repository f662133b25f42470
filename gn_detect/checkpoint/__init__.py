from .checkpointer import Checkpointer
from .origin import Origin
from .weight_guards import WeightGuards

__all__ = ["Checkpointer", "Origin", "WeightGuards"]
