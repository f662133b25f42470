"""How the predictions on a dataset are scored."""

from .evaluators import EVALUATORS, build_evaluator, check_evaluator
from .masks import masks_one_by_one, takes_items

__all__ = ["EVALUATORS", "build_evaluator", "check_evaluator", "masks_one_by_one", "takes_items"]
