from .errors import errors_as_sentences, sentence
from .prepare import prepare_run
from .trainer import Trainer

__all__ = ["Trainer", "errors_as_sentences", "prepare_run", "sentence"]
