"""Weight Standardization (Qiao et al., https://arxiv.org/abs/1903.10520)."""

from __future__ import annotations

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


class WSConv2d(nn.Conv2d):
    """A convolution with standardized weights, then a norm and an activation, if given.

    The parameter stays as it is trained; it is standardized in each forward.

    Args:
        *args, **kwargs: of ``nn.Conv2d``.
        variant, eps: of :func:`standardize_weight`.
        norm: applied to the output. The scale of the weights is meaningless without one.
        activation: applied last.

    Raises:
        ValueError: unknown ``variant``, or filters of a single weight, which have no deviation.
    """

    def __init__(
        self,
        *args,
        variant: str = "authors",
        eps: float | None = None,
        norm: nn.Module | None = None,
        activation=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        _check(self.weight, variant)
        self.variant = variant
        self.eps = eps
        self.norm = norm
        self.activation = activation

    @classmethod
    def convert_(cls, conv: nn.Conv2d, variant: str, eps: float | None = None) -> None:
        """Make ``conv`` a ``WSConv2d``, in place: the modules that hold it (a model may, in lists
        beside its attributes) keep it, and it keeps its parameters, norm and activation.

        Raises:
            ValueError: as for a new one.
        """
        _check(conv.weight, variant)
        conv.__class__ = cls
        conv.variant, conv.eps = variant, eps
        for name in ("norm", "activation"):
            if not hasattr(conv, name):
                setattr(conv, name, None)

    def standardized(self) -> torch.Tensor:
        """The weights that it convolves with."""
        return standardize_weight(self.weight, self.variant, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) to (N, out, H', W')."""
        x = self._conv_forward(x, self.standardized(), self.bias)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, variant={self.variant}"


def _check(weight: torch.Tensor, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"weight standardization {variant!r} is unknown; one of: {', '.join(VARIANTS)}"
        )
    if weight[0].numel() == 1:
        raise ValueError("filters of a single weight cannot be standardized")
