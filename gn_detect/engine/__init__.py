from .prepare import errors_as_sentences, prepare_run, sentence
from .trainer import Trainer

__all__ = ["Trainer", "errors_as_sentences", "prepare_run", "sentence"]
