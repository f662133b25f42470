"""Weight Standardization (Qiao et al., https://arxiv.org/abs/1903.10520)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

# The eps of each variant, as its source has it.
VARIANTS = {"authors": 1e-5, "timm": 1e-6}


def standardize_weight(
    weight: torch.Tensor, variant: str = "authors", eps: float | None = None
) -> torch.Tensor:
    """Give each filter zero mean and unit deviation over its (in, kh, kw).

    Two variants are in use, and weights trained with one are off by a factor of
    ``sqrt(n / (n - 1))``, n = in * kh * kw, in the other:

    - ``"authors"``: ``(w - mean) / (std + eps)`` with the unbiased std and eps 1e-5
      (github.com/joe-siyuan-qiao/WeightStandardization; mmcv's ``ConvWS2d``).
    - ``"timm"``: ``(w - mean) / sqrt(var + eps)`` with the biased variance and eps 1e-6
      (timm's ``StdConv2d``; BiT).

    Args:
        weight: (out, in, kh, kw), any floating dtype.
        variant: ``"authors"`` or ``"timm"``.
        eps: in place of the variant's own.

    Returns:
        Shape and dtype of ``weight``.
    """
    eps = VARIANTS[variant] if eps is None else eps
    dims = (1, 2, 3)
    if variant == "authors":
        std, mean = torch.std_mean(weight, dims, keepdim=True, correction=1)
        return (weight - mean) / (std + eps)
    var, mean = torch.var_mean(weight, dims, keepdim=True, correction=0)
    return (weight - mean) * torch.rsqrt(var + eps)


def variants_in(modules: Iterable[nn.Module]) -> set[str]:
    """The variants that convolutions among ``modules`` have, by ``weight_standardization``; {""} if
    none has one."""
    return {getattr(m, "weight_standardization", "") for m in modules} - {""} or {""}
