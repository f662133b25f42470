from .functional import group_norm_act
from .group_norm import GroupNorm
from .weight_std import standardize_weight

__all__ = ["GroupNorm", "group_norm_act", "standardize_weight"]
