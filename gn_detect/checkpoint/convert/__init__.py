"""One file for each format of weights that is not Detectron2's own."""

from .weights import Weights

__all__ = ["Weights"]
