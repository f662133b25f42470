"""From cfg to normalization layers: the one place that reads ``MODEL.GN``."""

from __future__ import annotations

import functools
import operator

from detectron2.config import CfgNode
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm


class GroupNormFactory:
    """A callable ``channels -> GroupNorm``, as Detectron2 takes for every ``norm`` argument.

    Detectron2 calls it deep inside its blocks, where the name of the layer is not known yet. So a
    layer that cannot be built is remembered, and :meth:`check` names all of them at once.

    Args:
        num_groups: groups of every layer.
        eps: added to the variance of every layer.
    """

    def __init__(self, num_groups: int = 32, eps: float = 1e-5):
        self.num_groups = num_groups
        self.eps = eps

    @classmethod
    def from_config(cls, cfg: CfgNode, key: str) -> GroupNormFactory:
        """Read ``MODEL.GN`` for the component whose norm is chosen by the config key ``key``.

        Raises:
            ConfigError: ``key`` (such as ``MODEL.FPN.NORM``) asks for something other than GN.
        """
        node, name = _find(cfg, key)
        if node[name] != "GN":
            raise ConfigError(
                f"{key} is {node[name]!r}, but this component builds GroupNorm: set it to 'GN', or "
                "use Detectron2's own component (of the same name without 'gn_' or 'GN')"
            )
        return cls(cfg.MODEL.GN.NUM_GROUPS, cfg.MODEL.GN.EPS)

    def __call__(self, channels: int) -> nn.Module:
        try:
            return GroupNorm(self.num_groups, channels, self.eps)
        except ValueError as error:
            return _Unbuilt(str(error))

    @staticmethod
    def check(module: nn.Module, name: str) -> None:
        """Refuse ``module``, called ``name`` in the model, if one of its norms could not be built.

        Raises:
            ConfigError: names each such layer, its channels, the groups, and values that work.
        """
        unbuilt = {n: m.reason for n, m in module.named_modules() if isinstance(m, _Unbuilt)}
        if unbuilt:
            layers = "; ".join(f"{name}.{n}: {reason}" for n, reason in unbuilt.items())
            raise ConfigError(f"MODEL.GN.NUM_GROUPS does not fit: {layers}")


class _Unbuilt(nn.Module):
    """In the place of a GroupNorm whose channels the groups do not divide, until ``check``."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def forward(self, x):
        raise ValueError(self.reason)


def with_gn_norms(cfg: CfgNode, *keys: str) -> CfgNode:
    """Return a copy of ``cfg`` in which the norm keys ``keys`` hold a factory, not a string.

    Detectron2's builders pass the value on to ``get_norm``, which takes either. A CfgNode refuses
    a callable as an attribute, not as an item.
    """
    copy = cfg.clone()
    for key in keys:
        node, name = _find(copy, key)
        node[name] = GroupNormFactory.from_config(cfg, key)
    return copy


def _find(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """The node of ``cfg`` that holds ``key``, and the last part of the key."""
    *path, name = key.split(".")
    return functools.reduce(operator.getitem, path, cfg), name
