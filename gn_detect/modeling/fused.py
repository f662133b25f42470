"""Components of Detectron2 in which GroupNorm, residual and ReLU are one operation.

Same parameters, same keys, same numbers. Modules are changed in place, by their class, so that
whoever holds them (a model may, in lists beside its attributes) keeps them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from torch import nn

from gn_detect.layers import GroupNorm, WSConv2d
from gn_detect.layers.recompute import rerun, run_block


class Block:
    """What the backward pass of a component keeps: ``memory``, a mode of ``layers.recompute``."""

    memory: str = "fast"

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``, for which this becomes a module of Detectron2 again."""
        bases = (c for c in type(self).__mro__ if issubclass(c, nn.Module))
        self.__class__ = next(c for c in bases if not issubclass(c, Block))
        return self


def in_memory_mode(method: Callable) -> Callable:
    """Run a method of a :class:`Block` in its mode."""

    @functools.wraps(method)
    def run(self, *inputs):
        return run_block(self.memory, functools.partial(method, self), *inputs)

    return run


class GNBasicStem(Block, BasicStem):
    """7x7 convolution, GN and ReLU, max pooling."""

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, C, about H/4, about W/4)."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class _ResidualBlock(Block):
    """Over a block of Detectron2: the convolutions of ``convs``, and the sum with the shortcut."""

    @in_memory_mode
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, about H/stride, about W/stride)."""
        *first, last = self.convs()
        out = x
        for conv in first:
            out = conv(out)
        out = self._convolve(last, out)
        if self.shortcut is not None:
            x = self.shortcut.norm(self._convolve(self.shortcut, x))
        return last.norm(out, residual=x)

    def _convolve(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """The convolution without its norm; where memory is ``"lean"``, a 1x1 is run again."""

        def convolve(x: torch.Tensor) -> torch.Tensor:
            weight = conv.standardized() if isinstance(conv, WSConv2d) else conv.weight
            return conv._conv_forward(x, weight, conv.bias)

        again = self.memory == "lean" and conv.kernel_size == (1, 1)
        return rerun(convolve, x) if again else convolve(x)

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


def fuse_norms(module: nn.Module, memory: str) -> None:
    """Let the GroupNorms of a component apply the ReLUs and residuals that follow them, and its
    :class:`Block` components have the mode ``memory``. In place.

    Knows ReLUs in Detectron2's ``Conv2d`` and in ``nn.Sequential``, the blocks of the ResNet and
    RetinaNet's head. What it does not know is computed as before.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and _is_relu(getattr(child, "activation", None)):
            if isinstance(child.norm, GroupNorm):
                child.norm.activation, child.activation = "relu", None
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            _fuse_sequential(child)
        elif type(child) in _BLOCKS:
            if all(isinstance(c.norm, GroupNorm) for c in child.children()):
                child.__class__ = _BLOCKS[type(child)]
                for conv in child.convs():
                    conv.norm.activation = "relu"
        elif type(child) is BasicStem and isinstance(child.conv1.norm, GroupNorm):
            child.__class__ = GNBasicStem
            child.conv1.norm.activation = "relu"
        elif type(child) is RetinaNetHead:
            child.__class__ = GNRetinaNetHead
    for child in module.modules():
        if isinstance(child, Block) and any(isinstance(m, GroupNorm) for m in child.modules()):
            child.memory = memory


def _fuse_sequential(module: nn.Sequential) -> None:
    for (_, child), (name, after) in itertools.pairwise(list(module.named_children())):
        norm = child
        if isinstance(child, nn.Conv2d) and getattr(child, "activation", None) is None:
            norm = getattr(child, "norm", None)
        if isinstance(norm, GroupNorm) and isinstance(after, nn.ReLU):
            norm.activation = "relu"
            setattr(module, name, nn.Identity())


def _is_relu(activation) -> bool:
    return isinstance(activation, nn.ReLU) or activation in (F.relu, F.relu_)
