from .checkpointer import Checkpointer
from .origin import Origin, check_origin

__all__ = ["Checkpointer", "Origin", "check_origin"]
