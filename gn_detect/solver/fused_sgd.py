"""SGD that updates a parameter in one pass over it, on CPUs.

PyTorch's fused kernel computes what its other SGD does, up to rounding. As of 2.14 it reads
parameter, gradient and momentum side by side, in the order in which each lies in memory, and does
not look whether that is the same; and it cannot start where some parameters have a momentum and
others, whose first gradient comes later, have none. Both are settled here before each step.
"""

from __future__ import annotations

import torch


def fuse_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Let an SGD use PyTorch's fused kernel, in place, for parameters on the CPU.

    Left as they are: other optimizers; and groups on CUDA, where PyTorch's ``foreach`` has few
    kernels, with dampening, with a sparse gradient, or with a parameter that shares its memory with
    others. Checkpoints and copies do not show it, so they go on with and without, anywhere. It is
    not told of a gradient scaler, which therefore unscales the gradients before the step, where
    clipping sees them.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    flags: list[dict[str, bool | None]] = []

    def before(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not flags:  # else this step is nested in another, or the last one has failed
            flags.extend({k: g[k] for k in ("fused", "foreach")} for g in optimizer.param_groups)
        for group in filter(_is_for_the_kernel, optimizer.param_groups):
            group.update(fused=True, foreach=False)
            _prepare(optimizer, group)

    def after(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # Where Detectron2 clips gradients, one step is nested in another: the inner has done it.
        for group, own in zip(optimizer.param_groups, flags, strict=False):
            group.update(own)
        flags.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _is_for_the_kernel(group: dict) -> bool:
    return not group["dampening"] and all(
        p.device.type == "cpu"
        and p.is_floating_point()
        and (p.grad is None or not p.grad.is_sparse)
        and p.stride() == torch.empty_like(p, device="meta").stride()  # no gaps, no overlap
        for p in group["params"]
    )


def _prepare(optimizer: torch.optim.Optimizer, group: dict) -> None:
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        parameter.grad = _like(parameter, parameter.grad)
        if group["momentum"]:
            state = optimizer.state[parameter]
            momentum = state.get("momentum_buffer")
            if momentum is None:  # from which the first momentum is the gradient
                momentum = torch.zeros_like(parameter)
            state["momentum_buffer"] = _like(parameter, momentum)


def _like(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, laid out in memory as ``parameter`` is."""
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter).copy_(tensor)
