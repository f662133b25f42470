from .functional import group_norm_act
from .group_norm import GroupNorm
from .weight_std import WSConv2d, standardize_weight

__all__ = ["GroupNorm", "WSConv2d", "group_norm_act", "standardize_weight"]
