from .prepare import prepare_run, sentence
from .trainer import Trainer

__all__ = ["Trainer", "prepare_run", "sentence"]
