"""Each GN layer of a detector alone: GN, residual and ReLU, by several implementations."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from gn_detect.layers import GroupNorm, group_norm_act

from . import peers
from .detectors import Detector, Settings

# "copy": Tensor.copy_ of as many bytes as the layer has to read and write at the least.
VARIANTS = ("eager", "autocast", "frozenbn", "ours", "copy")
PASSES = ("forward", "forward+backward")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A GN layer with what follows it, and the shape of its input.

    Args:
        shape: (N, C, H, W).
        num_groups: G.
        relu: a ReLU follows.
        residual: a tensor of the same shape is added before that.
    """

    shape: tuple[int, int, int, int]
    num_groups: int
    relu: bool
    residual: bool

    def minimum_bytes(self, itemsize: int, backward: bool) -> int:
        """Of the maps that a pass has to read and write, each once.

        Forward: x, the residual, y. Backward: dy, x, dx, and with a residual also y, which knows
        where the ReLU was 0, and the gradient of the residual. (Without ReLU that is dy.)
        """
        maps = 2 + self.residual
        if backward:
            maps += 3 + 2 * (self.residual and self.relu)
        return maps * math.prod(self.shape) * itemsize

    def __str__(self) -> str:
        kind = "+add" * self.residual + "+relu" * self.relu
        return f"{'x'.join(map(str, self.shape))} GN{kind}"


def gn_layers(settings: Settings) -> dict[Layer, int]:
    """The distinct GN layers in a training step of ours, in the order in which they run, and how
    many of each there are."""
    detector, layers = Detector("ours-fast", settings), collections.Counter()

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        relu, residual = kwargs.get("activation") == "relu", kwargs.get("residual") is not None
        layers[Layer(tuple(args[0].shape), module.num_groups, relu, residual)] += 1

    for module in detector.model.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note, with_kwargs=True)
    detector.forward()
    return layers


def layer_run(name: str, kind: str, layer: Layer, settings: Settings) -> Callable[[], object]:
    """One pass of a layer as a variant runs it, on random maps.

    Args:
        name: one of ``VARIANTS`` or ``peers.PEERS``; the latter are checked first.

    Returns:
        a function that gives y, or for forward+backward the gradients of x, the residual (where
        there is one), gamma and beta (where they are trained).

    Raises:
        Unfit, or any exception: of a peer.
    """
    device, dtype = settings.device, DTYPES[settings.dtype]
    if name == "copy":
        half = layer.minimum_bytes(dtype.itemsize, kind != "forward") // 2
        source, target = torch.zeros(2, half, dtype=torch.uint8, device=device)
        return lambda: target.copy_(source)

    def new() -> torch.Tensor:
        x = torch.randn(layer.shape, device=device, dtype=dtype)
        return x.to(memory_format=LAYOUTS[settings.layout])

    x, gradient = new().requires_grad_(), new()
    residual = new().requires_grad_() if layer.residual else None
    # Under autocast parameters are float32, as ours always; F.group_norm alone wants them as x.
    of_norm = dtype if name in ("eager", *peers.COMPILED) else None
    if name == "frozenbn":
        norm = FrozenBatchNorm2d(layer.shape[1]).to(device)
    elif name in peers.LIBRARIES:
        norm = peers.library_norm(name, layer.num_groups, x)
    else:
        norm = nn.GroupNorm(layer.num_groups, layer.shape[1], device=device, dtype=of_norm)

    in_place = name != "liger"  # whose output is a view, which autograd lets nobody change

    def detectron2() -> torch.Tensor:  # what its convolutions and blocks do
        y = norm(x)
        if residual is not None:
            y = y.add_(residual) if in_place else y + residual
        return F.relu(y, in_place) if layer.relu else y

    def autocast() -> torch.Tensor:
        with torch.autocast(device, dtype, enabled=dtype.itemsize == 2, cache_enabled=False):
            return detectron2().to(dtype)  # as the next convolution does

    def ours() -> torch.Tensor:
        fixed = norm.num_groups, norm.weight, norm.bias, norm.eps
        activation = "relu" if layer.relu else None
        return group_norm_act(x, *fixed, residual, activation, kernel=settings.kernel)

    forward = {"autocast": autocast, "ours": ours}.get(name, detectron2)
    if name in peers.COMPILED:
        forward = peers.compiled(name, detectron2)
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]
    if name in peers.PEERS:
        of_y = None if kind == "forward" else gradient
        peers.check(forward, inputs, layer.num_groups, layer.relu, of_y)
    if kind == "forward":
        return forward
    return lambda: torch.autograd.grad(forward(), inputs, gradient)
