"""How the predictions on a dataset are scored."""

from .evaluators import EVALUATORS, build_evaluator, check_evaluator
from .masks import masks_one_by_one, takes_items
from .tta import check_tta, describe_tta, with_tta

__all__ = [
    "EVALUATORS",
    "build_evaluator",
    "check_evaluator",
    "check_tta",
    "describe_tta",
    "masks_one_by_one",
    "takes_items",
    "with_tta",
]
