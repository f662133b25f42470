from .guards import prepare_run
from .trainer import Trainer

__all__ = ["Trainer", "prepare_run"]
