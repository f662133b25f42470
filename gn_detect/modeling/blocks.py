"""Layers and blocks of Detectron2 whose GroupNorm also adds a residual and applies a ReLU.

Same parameters, same keys, same numbers. Who runs a norm decides at each call what it asks of it,
so that any layer in the place of a GroupNorm, or of a convolution, is followed by the rest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from gn_detect.layers import GroupNorm, standardize_weight
from gn_detect.layers.recompute import rerun, run_block
from gn_detect.layers.weight_std import VARIANTS


def norm_act(
    norm: nn.Module | None,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: Callable | None = None,
) -> torch.Tensor:
    """``activation(norm(x) + residual)``: one pass over the map if ``norm`` is a GroupNorm.

    Args:
        norm: any layer, or None. A GroupNorm with a ``forward`` of its own, of its class or of the
            module, is any layer.
        residual: of the shape of the output, or None.
        activation: any function or module, or None. A ReLU is applied by a GroupNorm (hooks of an
            ``nn.ReLU`` do not run then), all others are called.
    """
    relu = type(activation) is nn.ReLU or activation is F.relu or activation is F.relu_
    forward = getattr(norm, "forward", None)
    if getattr(forward, "__func__", None) is GroupNorm.forward and (relu or activation is None):
        return norm(x, residual=residual, activation="relu" if relu else None)
    if norm is not None:
        x = norm(x)
    if residual is not None:
        x += residual  # in place, as in Detectron2's blocks
    return x if activation is None else activation(x)


class GNConv2d(Conv2d):
    """Detectron2's convolution, with norm and activation by :func:`norm_act`, and with weights that
    can be standardized."""

    weight_standardization: str = ""
    weight_eps: float | None = None
    # Variant -> eps in place of its own, of a convolution that is standardized wherever others are,
    # though no norm follows it (``modeling.resnetv2``).
    eps_of_variant: dict[str, float] | None = None
    activation_first: bool = False  # before the norm, not behind it (``modeling.tensorpack``)

    def standardize(self, variant: str, eps: float | None = None) -> None:
        """Convolve with standardized weights from now on. The parameter stays as it is trained.

        Args:
            variant, eps: of ``layers.standardize_weight``.

        Raises:
            ValueError: unknown ``variant``, or filters of a single weight, which have no deviation.
        """
        if variant not in VARIANTS:
            raise ValueError(
                f"weight standardization {variant!r} is unknown; one of: {', '.join(VARIANTS)}"
            )
        if self.weight[0].numel() == 1:
            raise ValueError("filters of a single weight cannot be standardized")
        self.weight_standardization, self.weight_eps = variant, eps

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: Callable | None = None,
        lean: bool = False,
    ) -> torch.Tensor:
        """``activation(self.activation(norm(convolution)) + residual)``; or, where
        ``activation_first``, ``activation(norm(self.activation(convolution)) + residual)``.

        Args:
            x: (N, in, H, W).
            residual, activation: of :func:`norm_act`.
            lean: a 1x1 convolution runs again in the backward pass, so that the norm needs not keep
                its input (``layers.recompute.rerun``).
        """
        weight = self.weight
        if self.weight_standardization:
            weight = standardize_weight(weight, self.weight_standardization, self.weight_eps)
        if lean and self.kernel_size == (1, 1):
            x = rerun(self._conv_forward, x, weight, self.bias)
        else:
            x = self._conv_forward(x, weight, self.bias)
        if self.activation is None or self.activation_first:
            x = self.activation(x) if self.activation_first else x
            return norm_act(self.norm, x, residual, activation)
        return norm_act(None, norm_act(self.norm, x, None, self.activation), residual, activation)

    def extra_repr(self) -> str:
        kind = self.weight_standardization
        return super().extra_repr() + (f", weight_standardization={kind}" if kind else "")


def conv_act(
    conv: nn.Module,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: Callable | None = None,
    lean: bool = False,
) -> torch.Tensor:
    """``activation(conv(x) + residual)`` of any layer; a :class:`GNConv2d` does it all."""
    if isinstance(conv, GNConv2d):
        return conv(x, residual=residual, activation=activation, lean=lean)
    return norm_act(conv, x, residual, activation)


def run_layers(layers: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """``x`` through one layer after the other, a ReLU together with the layer before it."""
    todo = list(layers)[::-1]
    while todo:
        layer = todo.pop()
        relu = todo.pop() if todo and type(todo[-1]) is nn.ReLU else None
        x = conv_act(layer, x, activation=relu)
    return x


class GNSequential(nn.Sequential):
    forward = run_layers


class Block:
    """What the backward pass of a component keeps: ``memory``, a mode of ``layers.recompute``."""

    memory: str = "fast"


def in_memory_mode(method: Callable) -> Callable:
    """Run a method of a :class:`Block` in its mode."""

    @functools.wraps(method)
    def run(self, *inputs, **named):
        return run_block(self.memory, functools.partial(method, self, **named), *inputs)

    return run


class GNBasicStem(Block, BasicStem):
    """7x7 convolution, GN and ReLU, max pooling."""

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, C, about H/4, about W/4)."""
        x = conv_act(self.conv1, x, activation=F.relu_)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class _ResidualBlock(Block):
    """Over a block of Detectron2: the convolutions of the names ``convs``, and the sum with the
    shortcut."""

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, about H/stride, about W/stride)."""
        *first, last = map(self.get_submodule, self.convs)
        out, lean = x, self.memory == "lean"
        for conv in first:
            out = conv_act(conv, out, activation=F.relu_)
        if self.shortcut is not None:
            x = conv_act(self.shortcut, x, lean=lean)
        return conv_act(last, out, x, F.relu_, lean)


class GNBottleneckBlock(_ResidualBlock, BottleneckBlock):
    """1x1, 3x3 and 1x1 convolution with GN, and the sum with the shortcut before the last ReLU."""

    convs = "conv1", "conv2", "conv3"


class GNBasicBlock(_ResidualBlock, BasicBlock):
    """Two 3x3 convolutions with GN, and the sum with the shortcut before the last ReLU."""

    convs = "conv1", "conv2"


class GNRetinaNetHead(Block, RetinaNetHead):
    """Detectron2's head, in a mode of memory."""

    forward = in_memory_mode(RetinaNetHead.forward)


_OURS = {
    nn.Conv2d: GNConv2d,
    Conv2d: GNConv2d,
    nn.Sequential: GNSequential,
    BasicStem: GNBasicStem,
    BottleneckBlock: GNBottleneckBlock,
    BasicBlock: GNBasicBlock,
    RetinaNetHead: GNRetinaNetHead,
}


def fuse_norms(module: nn.Module, memory: str = "fast") -> nn.Module:
    """Put our layers and blocks in the place of Detectron2's and PyTorch's where there is a
    GroupNorm, and have all components with one in the mode ``memory``.

    Subclasses of these go on as they are, with our layers in them.

    Returns:
        ``module``, or what stands in its place, with the same parameters, children and hooks.
    """
    before = set(before_group_norm(module))
    places = list(module.named_modules(remove_duplicate=False))
    ours = {}
    for _, child in places:
        if type(child) in _OURS and child not in ours:
            if child in before or _has_group_norm(child):
                ours[child] = like(child, _OURS[type(child)])
    for name, child in places:
        if name and child in ours:
            module.set_submodule(name, ours[child])
    module = ours.get(module, module)
    for child in module.modules():
        for value in vars(child).values():  # Detectron2 has layers also in lists, by which it runs
            if isinstance(value, list):
                value[:] = [ours.get(v, v) if isinstance(v, nn.Module) else v for v in value]
        if isinstance(child, Block) and _has_group_norm(child):
            child.memory = memory
    return module


def like(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module of ``cls`` that shares all that ``module`` has, as ``copy.copy`` would make it."""
    ours = cls.__new__(cls)
    ours.__setstate__(vars(module))
    if type(module) is nn.Conv2d:
        ours.norm = ours.activation = None
    return ours


def _has_group_norm(module: nn.Module) -> bool:
    return any(isinstance(m, GroupNorm) for m in module.modules())


def before_group_norm(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in ``module`` whose output a GroupNorm takes."""
    for child in module.modules():
        if isinstance(getattr(child, "norm", None), GroupNorm):
            yield child
        elif isinstance(child, nn.Sequential):
            for layer, norm in itertools.pairwise(child):
                if isinstance(norm, GroupNorm):
                    yield layer
