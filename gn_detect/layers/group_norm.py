"""Group Normalization (Wu & He, ECCV 2018, https://arxiv.org/abs/1803.08494)."""

from __future__ import annotations

import torch
from torch import nn

from .functional import group_norm_act
from .padding import extents_of


class GroupNorm(nn.GroupNorm):
    """Group Normalization over (N, C, *) as in the GN paper, section 3.

    An ``nn.GroupNorm`` by type, because optimizers and converters find norm layers by type
    (Detectron2's ``solver/build.py`` exempts their gamma and beta from weight decay).

    Args:
        num_groups: G. Each of the G groups of C/G channels of each image has its own mean and
            variance. G=1 is LayerNorm over (C, H, W), G=C is InstanceNorm (GN paper, section 3.1).
        num_channels: C.
        eps: added to the variance.
        affine: learn a gamma and a beta of shape (C,).
        kernel: of :func:`~gn_detect.layers.functional.group_norm_act`.
        mask_padding: normalize what is image of the maps of a padded batch
            (:func:`~gn_detect.layers.padding.images_in_batch`), each as if it was alone.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_channels``; the message lists the values
            that do. Or, in a call, ``activation`` or ``kernel`` is unknown.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        kernel: str = "auto",
        mask_padding: bool = False,
    ):
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be divided into {num_groups} groups; "
                f"numbers of groups that work: {', '.join(map(str, divisors(num_channels)))}"
            )
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.kernel = kernel
        self.mask_padding = mask_padding

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, activation: str | None = None
    ) -> torch.Tensor:
        """(N, C, *) to its shape; in the same pass over the map, what is to follow.

        Args:
            residual: of the shape of ``x``, added to the result; or None.
            activation: ``"relu"`` or None, applied last.
        """
        layer = self.num_groups, self.weight, self.bias, self.eps
        extents = extents_of(x) if self.mask_padding else None
        return group_norm_act(x, *layer, residual, activation, extents=extents, kernel=self.kernel)


def divisors(num_channels: int) -> list[int]:
    """The numbers of groups, or of channels per group, that ``num_channels`` can have."""
    return [d for d in range(1, num_channels + 1) if num_channels % d == 0]
