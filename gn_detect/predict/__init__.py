"""Trained weights, used: on images, folders and videos."""

from .predictor import Predictor

__all__ = ["Predictor"]
