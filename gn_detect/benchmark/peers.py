"""Other kernels of GroupNorm beside ours: checked against float64, and only then timed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import textwrap
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.layers.reference import deviation

from .timing import Unfit

# Where they are installed: https://github.com/linkedin/Liger-Kernel, for NCHW, and
# https://github.com/NVIDIA/apex, for channels_last and the channels of its list, from 128 on.
LIBRARIES = {"liger": "liger_kernel.ops.group_norm", "apex": "apex.contrib.group_norm"}
# torch.compile of "eager", as PyTorch has it, and without an optimization that it has got in 2026:
# TORCHINDUCTOR_LOOP_REINDEXING_AFTER_FUSION, https://github.com/pytorch/pytorch/pull/176927
COMPILED = {"compiled": {}, "compiled-no-reindexing": {"loop_reindexing_after_fusion": False}}
PEERS = (*LIBRARIES, *COMPILED)


@functools.cache
def installed() -> tuple[str, ...]:
    """Of ``LIBRARIES``."""
    found = []
    for name, module in LIBRARIES.items():
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            found.append(name)
    return tuple(found)


class _Liger(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        function = importlib.import_module(LIBRARIES["liger"]).LigerGroupNormFunction
        sizes = self.num_channels, self.num_groups, self.eps
        # Its backward takes the last dimension for all of a channel.
        return function.apply(x.flatten(2), self.weight, self.bias, *sizes).view_as(x)


def library_norm(name: str, num_groups: int, x: Tensor) -> nn.Module:
    """The layer of one of ``LIBRARIES``, float32 parameters, for x (N, C, H, W).

    Raises:
        ImportError: it is not installed.
        Unfit: it would copy x to another layout, or give it to PyTorch's kernels.
    """
    if name == "apex":
        norm = importlib.import_module(LIBRARIES[name]).GroupNorm(
            num_groups, x.shape[1], device=x.device
        )
        if not norm._check_legality(x):
            raise Unfit("apex leaves this layer to PyTorch")
        return norm
    if not x.is_contiguous():
        raise Unfit("Liger's kernels take NCHW alone")
    return _Liger(num_groups, x.shape[1], device=x.device)


def compiled(name: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function of one layer by ``torch.compile``, for its very shape."""
    torch._dynamo.reset()  # the layers before are the same code: too many, and it would give up
    return torch.compile(function, fullgraph=True, dynamic=False, options=COMPILED[name])


@contextlib.contextmanager
def marked(name: str) -> Iterator[None]:
    """Whatever goes wrong with a peer is :class:`Unfit`, and leaves the other variants."""
    try:
        yield
    except (torch.OutOfMemoryError, Unfit):
        raise
    except Exception as error:
        if name not in PEERS:
            raise
        raise Unfit(textwrap.shorten(f"{type(error).__name__}: {error}", 200)) from error


def check(
    forward: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    num_groups: int,
    relu: bool,
    gradient: Tensor | None,
) -> None:
    """Compare a pass with PyTorch's operations in float64.

    Args:
        forward: gives y.
        inputs: x, the residual (where there is one), gamma and beta; these get random values.
        gradient: of y, where the gradients of the inputs are compared, too.

    Raises:
        Unfit: something is wrong (:func:`deviation`).
    """
    for parameter in inputs[-2:]:
        nn.init.normal_(parameter)
    y = forward()
    x, *residual, weight, bias = leaves = [t.detach().double().requires_grad_() for t in inputs]
    z = F.group_norm(x, num_groups, weight, bias)
    z = z + residual[0] if residual else z
    found, expected = [y], [z.relu() if relu else z]
    if gradient is not None:
        # The mask of y: another one where z is 0 but for rounding would be no fault.
        z = torch.where(y > 0, z, 0) if relu else z
        found += torch.autograd.grad(y, inputs, gradient)
        expected += torch.autograd.grad(z, leaves, gradient.double())
    names = "x", *["the residual"] * len(residual), "gamma", "beta"
    names = "output", *(f"gradient of {name}" for name in names)
    if wrong := deviation(names[: len(found)], found, expected, inputs[0].dtype):
        raise Unfit(f"wrong: {wrong}")
