"""Group Normalization, a residual and an activation as one function."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from . import recompute

KERNELS = ("auto", "triton", "torch")
ACTIVATIONS = (None, "relu")


def group_norm_act(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    kernel: str = "auto",
) -> torch.Tensor:
    """``activation(group_norm(x) + residual)``, with the GN of https://arxiv.org/abs/1803.08494.

    There is no autocast rule: what comes in bfloat16 goes out in bfloat16, with statistics, gamma
    and beta in float32. (Autocast runs ``F.group_norm`` in float32, and so doubles its memory.)

    Args:
        x: (N, C, *), any floating dtype.
        num_groups: G; divides C.
        weight, bias: gamma and beta, (C,), of the dtype of ``x`` or float32; or None.
        eps: added to the variance.
        residual: of the shape of ``x``, added before the activation; or None.
        activation: ``"relu"`` or None.
        kernel: ``"torch"`` for PyTorch's own operations, on any device.

    Returns:
        Shape, dtype and memory format of ``x``.

    Raises:
        ValueError: G does not divide C, the shapes of ``x`` and ``residual`` differ, or
            ``activation`` or ``kernel`` is unknown.
    """
    _check(x, num_groups, residual, activation, kernel)
    return _reference(x, num_groups, weight, bias, eps, residual, activation)


def _check(x, num_groups, residual, activation, kernel) -> None:
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm_act takes (N, C, *) with C divisible by num_groups {num_groups}; "
            f"x has the shape {list(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"the residual has the shape {list(residual.shape)}, x {list(x.shape)}: they are added "
            "without broadcasting"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; one of: 'relu', None")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; one of: {', '.join(KERNELS)}")


def _reference(x, num_groups, weight, bias, eps, residual, activation) -> torch.Tensor:
    """Plain PyTorch: any device and dtype, differentiable twice, exported as it is."""
    with _without_autocast(x.device.type):
        y = _group_norm(x, num_groups, weight, bias, eps)
        if residual is not None:
            y.add_(residual)
        else:  # before the ReLU, which keeps its output
            recompute.offer(
                y,
                lambda x, weight, bias: _reference(
                    x, num_groups, weight, bias, eps, None, activation
                ),
                (x, weight, bias),
                in_place_operations=activation is not None,
            )
        # In place, as Detectron2's blocks do: GN does not keep its output.
        return y if activation is None else F.relu_(y)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _group_norm(x, num_groups, weight, bias, eps) -> torch.Tensor:
    mixed = any(p is not None and p.dtype != x.dtype for p in (weight, bias))
    if not mixed or x.device.type == "cpu":  # where PyTorch's kernel mixes dtypes
        return F.group_norm(x, num_groups, weight, bias, eps)
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.group_norm(x.float(), num_groups, weight, bias, eps).to(x.dtype)
