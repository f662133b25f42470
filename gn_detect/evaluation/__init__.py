"""How the predictions on a dataset are scored."""

from .evaluators import EVALUATORS, build_evaluator, check_evaluator

__all__ = ["EVALUATORS", "build_evaluator", "check_evaluator"]
