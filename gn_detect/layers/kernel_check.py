"""Whether the Triton kernels run on a device, and give what they should: asked before their use."""

from __future__ import annotations

import functools
import textwrap

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from . import triton_kernels

# (N, C, H, W) and groups, each for one of the two ways of ``triton_kernels``
RESIDENT = (2, 16, 7, 7), 4
SPLIT = (2, 4, 50, 84), 2  # several programs share a channel
EPS = 1e-5


@functools.cache
def failure(device: torch.device, dtype: torch.dtype, channels_last: bool) -> str:
    """What the kernels did wrong with maps of this kind; "" if nothing.

    A resident and a split shape, forward and backward, with residual and ReLU, are compared with
    PyTorch's operations in float64, once per process. Exceptions (no C compiler, an error of
    Triton or of the driver) are told like differences.
    """
    maps = f"{dtype} maps in {'channels_last' if channels_last else 'NCHW'} on {device}"
    # The caller's gradient mode does not matter, nor what it keeps for its backward pass:
    # torch.utils.checkpoint would count what is saved in here.
    as_it_is = saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), as_it_is:
        for shape, num_groups in (RESIDENT, SPLIT):
            try:
                wrong = _difference(shape, num_groups, device, dtype, channels_last)
            except torch.OutOfMemoryError:  # says nothing of the kernels
                raise
            except Exception as error:
                # Triton's messages quote source code.
                message = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
                return f"the Triton kernels failed for {maps} of shape {list(shape)}: {message}"
            if wrong:
                return f"the Triton kernels are wrong for {maps} of shape {list(shape)}: {wrong}"
    return ""


def _difference(shape, num_groups, device, dtype, channels_last) -> str:
    random = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, dy = (random(shape).to(device, dtype, memory_format=layout) for _ in range(3))
    weight, bias = (random(shape[1]).to(device) for _ in range(2))
    y, mean, rstd = triton_kernels.forward(x, num_groups, weight, bias, EPS, residual, True)
    found = y, *triton_kernels.backward(dy, x, y, mean, rstd, weight, bias, True, dtype)

    leaves = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    z = F.group_norm(leaves[0], num_groups, leaves[1], leaves[2], EPS) + leaves[3]
    # The mask of y: another one where z is 0 but for rounding would be no fault.
    expected = z.relu(), *torch.autograd.grad(torch.where(y > 0, z, 0), leaves, dy.double())

    tolerance = 1e-4 + 2 * torch.finfo(dtype).eps
    of = "x", "gamma", "beta", "the residual"
    names = "output", *(f"gradient of {name}" for name in of)
    for name, a, b in zip(names, found, expected, strict=True):
        difference, largest = (t.abs().max().item() for t in (a.double() - b, b))
        if not difference <= tolerance * largest:  # NaN, too
            return (
                f"the {name} is off by {difference:.2g}, where its largest value is {largest:.2g}"
            )
    return ""
