"""SGD that updates a parameter in one pass over it, on CPUs.

PyTorch's fused kernel computes what its other SGD does, up to rounding. As of 2.14 it reads
parameter, gradient and momentum side by side, in the order in which each lies in memory, and does
not look whether that is the same; and it cannot start where some parameters have a momentum and
others, whose first gradient comes later, have none. Both are settled here before each step.
"""

from __future__ import annotations

import torch


def fuse_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Let an SGD whose parameters are all on the CPU use PyTorch's fused kernel, in place.

    Others are left as they are: CUDA, where PyTorch's ``foreach`` has few kernels, other
    optimizers, and SGD with dampening. Checkpoints do not show it, so they can be resumed with
    and without, anywhere. It is not told of a gradient scaler, which therefore unscales the
    gradients before the step, where clipping sees them.
    """
    groups = optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    if not isinstance(optimizer, torch.optim.SGD) or any(g["dampening"] for g in groups):
        return
    if any(p.device.type != "cpu" or not p.is_floating_point() for p in parameters):
        return
    optimizer.register_step_pre_hook(_prepare_step)
    optimizer.register_state_dict_post_hook(_hide)


def _prepare_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)  # each time: loading a state overwrites them
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


def _hide(optimizer: torch.optim.Optimizer, state: dict) -> None:
    for group in state["param_groups"]:
        group.update(fused=None, foreach=None)
