"""Components of Detectron2 in which GroupNorm, residual and ReLU are one operation.

Same parameters, same keys, same numbers. Modules are changed in place, by their class, so that
whoever holds them (a model may, in lists beside its attributes) keeps them.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from gn_detect.layers import GroupNorm, WSConv2d
from gn_detect.layers.recompute import rerun, run_block


class Block:
    """What the backward pass of a component keeps: ``memory``, a mode of ``layers.recompute``."""

    memory: str = "fast"

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``, for which this becomes a module of Detectron2 for good.
        To go on training it in its mode, script a deep copy."""
        return _plain(self, Block)


def _plain(module: nn.Module, ours: type) -> nn.Module:
    """Take back the class that :func:`fuse_norms` gave a module, a subclass of ``ours``."""
    bases = (c for c in type(module).__mro__ if issubclass(c, nn.Module))
    module.__class__ = next(c for c in bases if not issubclass(c, ours))
    return module


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
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class _NormedConv:
    """Over a convolution of ``norm``: adds a residual before the activation of the norm."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, run_again: bool = False
    ) -> torch.Tensor:
        """
        Args:
            x: (N, in, H, W).
            residual: of the shape of the output, or None.
            run_again: in the backward pass, so that the norm needs not keep its input
                (``layers.recompute.rerun``).
        """
        weight = self.standardized() if isinstance(self, WSConv2d) else self.weight
        convolve = rerun if run_again else _call
        return self.norm(convolve(self._conv_forward, x, weight, self.bias), residual=residual)

    def __prepare_scriptable__(self) -> nn.Module:
        return _plain(self, _NormedConv)


def _call(function: Callable, *inputs: torch.Tensor | None) -> torch.Tensor:
    return function(*inputs)


class _NormedConv2d(_NormedConv, Conv2d):
    pass


class _NormedWSConv2d(_NormedConv, WSConv2d):
    pass


class _ResidualBlock(Block):
    """Over a block of Detectron2: the convolutions of ``convs``, and the sum with the shortcut."""

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, about H/stride, about W/stride)."""
        *first, last = self.convs()
        out = x
        for conv in first:
            out = conv(out)
        lean = self.memory == "lean"
        if self.shortcut is not None:
            x = self.shortcut(x, run_again=lean)
        return last(out, residual=x, run_again=lean and last.kernel_size == (1, 1))

    def __prepare_scriptable__(self) -> nn.Module:
        self.convs()[-1].norm.activation = None  # it comes behind the sum
        return super().__prepare_scriptable__()


class GNBottleneckBlock(_ResidualBlock, BottleneckBlock):
    """1x1, 3x3 and 1x1 convolution with GN, and the sum with the shortcut before the last ReLU."""

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv1, self.conv2, self.conv3]


class GNBasicBlock(_ResidualBlock, BasicBlock):
    """Two 3x3 convolutions with GN, and the sum with the shortcut before the last ReLU."""

    def convs(self) -> list[nn.Conv2d]:
        return [self.conv1, self.conv2]


class GNRetinaNetHead(Block, RetinaNetHead):
    """Detectron2's head, in a mode of memory."""

    @in_memory_mode
    def forward(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        return super().forward(features)


_BLOCKS = {BottleneckBlock: GNBottleneckBlock, BasicBlock: GNBasicBlock}
_CONVS = {Conv2d: _NormedConv2d, WSConv2d: _NormedWSConv2d}


def fuse_norms(module: nn.Module, memory: str) -> None:
    """Let the GroupNorms of a component apply the ReLUs and residuals that follow them, and its
    :class:`Block` components have the mode ``memory``. In place.

    Knows ReLUs in Detectron2's ``Conv2d`` and in ``nn.Sequential``, the blocks of the ResNet and
    RetinaNet's head. What it does not know, such as subclasses of these, and norms in several
    places, is computed as before.
    """
    places = collections.Counter(m for _, m in module.named_modules(remove_duplicate=False))
    alone = {m for m, count in places.items() if type(m) is GroupNorm and count == 1}
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and _is_relu(getattr(child, "activation", None)):
            if getattr(child, "norm", None) in alone:
                child.norm.activation, child.activation = "relu", None
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            if type(child).forward is nn.Sequential.forward or isinstance(child, Block):
                _fuse_sequential(child, alone)
        elif type(child) in _BLOCKS:
            if all(
                type(c) in _CONVS and c.norm in alone and c.activation is None
                for c in child.children()
            ):
                child.__class__ = _BLOCKS[type(child)]
                convs = child.convs()
                for conv in convs:
                    conv.norm.activation = "relu"
                for conv in {convs[-1], child.shortcut} - {None}:
                    conv.__class__ = _CONVS[type(conv)]
        elif type(child) is BasicStem and child.conv1.norm in alone:
            child.__class__ = GNBasicStem
            child.conv1.norm.activation = "relu"
        elif type(child) is RetinaNetHead:
            child.__class__ = GNRetinaNetHead
    for child in module.modules():
        if isinstance(child, Block) and any(isinstance(m, GroupNorm) for m in child.modules()):
            child.memory = memory


def _fuse_sequential(module: nn.Sequential, alone: set[nn.Module]) -> None:
    for (_, child), (name, after) in itertools.pairwise(list(module._modules.items())):
        norm = child
        if isinstance(child, nn.Conv2d) and getattr(child, "activation", None) is None:
            norm = getattr(child, "norm", None)
        if norm in alone and type(after) is nn.ReLU:
            norm.activation = "relu"
            setattr(module, name, nn.Identity())


def _is_relu(activation) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_)
