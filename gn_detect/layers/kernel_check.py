"""Whether the Triton kernels take an input, run on its device, and give what they should: asked
before their use."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from . import triton_kernels
from .padding import Extents
from .reference import deviation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, C, H, W) and groups, each for one of the two ways of ``triton_kernels``
RESIDENT = (2, 16, 6, 8), 4  # NCHW reads 16 pixels at a time
SPLIT = (2, 4, 50, 84), 2  # several programs share a channel
EPS = 1e-5


def unsupported(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    padded: bool = False,
) -> str:
    """Why the kernels cannot take this input, whose shapes are right; "" if they can.

    Args:
        padded: whether they are to be told what of the maps is image.
    """
    if not x.is_cuda and isinstance(triton_kernels.device.apply, triton.JITFunction):
        return f"the input is on {x.device}, not on a CUDA device"
    for name, t in (("input", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        dtypes = (torch.float32, x.dtype) if name in ("weight", "bias") else DTYPES
        if t.dtype not in dtypes:
            return f"the {name} is {t.dtype}, not {' or '.join(map(str, dict.fromkeys(dtypes)))}"
        if t.device != x.device:
            return f"the {name} is on {t.device}, the input on {x.device}"
        if name in ("weight", "bias") and (t.shape != x.shape[1:2] or not t.is_contiguous()):
            return f"the {name} is not a contiguous vector of {x.shape[1]} channels"
    last = triton_kernels.CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=last)):
        return f"the strides {x.stride()} of the input are neither NCHW nor channels_last"
    if math.prod(x.shape[1:]) >= 2**30:
        return "one image has 2^30 or more elements"
    if padded and x.shape[-1] > 2**15:
        return "the map is padded, and has more than 2^15 columns"
    return ""


@functools.cache
def failure(
    device: torch.device, dtype: torch.dtype, channels_last: bool, padded: bool = False
) -> str:
    """What the kernels did wrong with maps of this kind; "" if nothing.

    A resident and a split shape, forward, rebuilt and backward, with ReLU, with and without
    residual, are compared with PyTorch's operations in float64, once per process; with ``padded``,
    as maps of images of two sizes, for which the kernels are compiled anew. All twice: what was
    compiled is launched in another way (``triton_launch``). Exceptions (no C compiler, an error of
    Triton or of the driver) are told like differences.
    """
    maps = f"{dtype} maps in {'channels_last' if channels_last else 'NCHW'} on {device}"
    maps = f"padded {maps}" if padded else maps
    # The caller's gradient mode does not matter, nor what it keeps for its backward pass:
    # torch.utils.checkpoint would count what is saved in here.
    as_it_is = saved_tensors_hooks(lambda t: t, lambda t: t)
    with torch.inference_mode(False), torch.enable_grad(), as_it_is:
        for with_residual, case in [*itertools.product((True, False), (RESIDENT, SPLIT))] * 2:
            shape = case[0]
            try:
                wrong = _difference(*case, with_residual, device, dtype, channels_last, padded)
            except torch.OutOfMemoryError:  # says nothing of the kernels
                raise
            except Exception as error:
                # Triton's messages quote source code.
                message = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
                return f"the Triton kernels failed for {maps} of shape {list(shape)}: {message}"
            if wrong:
                return f"the Triton kernels are wrong for {maps} of shape {list(shape)}: {wrong}"
    return ""


def _difference(shape, num_groups, with_residual, device, dtype, channels_last, padded) -> str:
    random = functools.partial(
        torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, residual, dy = (random(shape).to(device, dtype, memory_format=layout) for _ in range(3))
    weight, bias = (random(shape[1]).to(device) for _ in range(2))
    height, width = shape[2:]
    sizes = [(height - padded, width // (1 + padded)), (height // (1 + padded), width)]
    extents = Extents(sizes, height, width)
    residual = extents.join(extents.crops(residual)) if with_residual else None
    valid = torch.tensor(sizes, dtype=torch.int32, device=device) if padded else None
    y, mean, rstd = triton_kernels.forward(x, num_groups, weight, bias, EPS, residual, True, valid)
    gradients = triton_kernels.backward(
        dy, x, y, mean, rstd, weight, bias, True, dtype if with_residual else None, valid=valid
    )
    found = [t for t in (y, *gradients) if t is not None]

    inputs = (t for t in (x, weight, bias, residual) if t is not None)
    leaves = [t.double().requires_grad_() for t in inputs]
    crops = (
        F.group_norm(crop, num_groups, leaves[1], leaves[2], EPS)
        for crop in extents.crops(leaves[0])
    )
    z = sum(leaves[3:], extents.join(list(crops)))
    # The mask of y: another one where z is 0 but for rounding would be no fault.
    expected = z.relu(), *torch.autograd.grad(torch.where(y > 0, z, 0), leaves, dy.double())

    of = "x", "gamma", "beta", "the residual"
    names = "output", *(f"gradient of {name}" for name in of)
    wrong = deviation(names[: len(expected)], found, expected, dtype)
    if wrong or with_residual:
        return wrong
    rebuilt = triton_kernels.apply(x, mean, rstd, weight, bias, True, valid)
    return "" if torch.equal(rebuilt, y) else "the output is another one where it is rebuilt"
