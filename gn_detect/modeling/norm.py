"""From cfg to normalization layers: the one place that reads ``MODEL.GN``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv, get_norm
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from gn_detect.config import ConfigError, locate
from gn_detect.env import warn_of_ignored_keys
from gn_detect.layers import GroupNorm
from gn_detect.layers.functional import KERNELS
from gn_detect.layers.group_norm import divisors
from gn_detect.layers.recompute import MODES
from gn_detect.layers.weight_std import VARIANTS

from .blocks import GNConv2d, before_group_norm, fuse_norms
from .padding import check_components, mask_paddings

logger = logging.getLogger(__name__)

# What Detectron2's ``get_norm`` builds; passed on as it is. Its "GN" and "LN" are not among them:
# GN has 32 groups and eps 1e-5 there, and LN normalizes each position alone, which is LN2d here.
_DETECTRON2_NORMS = ("", "BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# Same keys, eps and numbers as Detectron2's "LN" (ConvNeXt, ViTDet); but an nn.LayerNorm, so that
# Detectron2's optimizers exempt gamma and beta from weight decay (``get_default_optimizer_params``
# does not know its own class), and in the precision of PyTorch's operation under autocast.
_LAYER_NORM_2D = functools.partial(LayerNorm2d, eps=1e-6)
_DEFORMABLE = (DeformConv, ModulatedDeformConv)


class GroupNormFactory:
    """A callable ``channels -> GroupNorm``, as Detectron2 takes for every ``norm`` argument.

    Detectron2 calls it deep inside its blocks, where the name of the layer is not known yet. So a
    layer that cannot be built is remembered, and :func:`finish_norms` names all of them at once.

    Args:
        num_groups: groups of every layer; 0 where ``channels_per_group`` is given.
        eps: added to the variance of every layer.
        channels_per_group: channels of every group, in place of ``num_groups``.
        nearest_divisor: where these do not divide the channels of a layer, take the nearest number
            that does (the smaller of two), instead of refusing.
        kernel: of every layer: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ConfigError: both or neither of ``num_groups`` and ``channels_per_group`` are given, or
            ``kernel`` is unknown.
    """

    def __init__(
        self,
        num_groups: int = 32,
        eps: float = 1e-5,
        *,
        channels_per_group: int = 0,
        nearest_divisor: bool = False,
        kernel: str = "auto",
    ):
        if (num_groups > 0) == (channels_per_group > 0):
            raise ConfigError(
                f"MODEL.GN.NUM_GROUPS (num_groups) is {num_groups} and MODEL.GN.CHANNELS_PER_GROUP "
                f"(channels_per_group) is {channels_per_group}: exactly one of them must be "
                "positive, and the other 0"
            )
        if kernel not in KERNELS:
            known = ", ".join(KERNELS)
            raise ConfigError(f"MODEL.GN.KERNEL (kernel) is {kernel!r}; known: {known}")
        self.kernel = kernel
        self.num_groups = num_groups
        self.eps = eps
        self.channels_per_group = channels_per_group
        self.nearest_divisor = nearest_divisor

    def __call__(self, channels: int) -> nn.Module:
        asked = number = self.num_groups or self.channels_per_group
        what = "groups" if self.num_groups else "channels per group"
        if channels % asked:
            if not self.nearest_divisor:
                return _Unbuilt(
                    f"{channels} channels cannot be divided into {asked} {what}; "
                    f"numbers that work: {', '.join(map(str, divisors(channels)))}"
                )
            number = min(divisors(channels), key=lambda d: abs(d - asked))
        groups = number if self.num_groups else channels // number
        layer = GroupNorm(groups, channels, self.eps, kernel=self.kernel)
        if number != asked:
            layer.adapted = f"{number} {what} instead of {asked}, for {channels} channels"
        return layer


class _Unbuilt(nn.Module):
    """In the place of a GroupNorm whose channels the groups do not divide."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def forward(self, x):
        raise ValueError(self.reason)


def norm_from_config(cfg: CfgNode, key: str) -> Callable[[int], nn.Module] | str:
    """What the config key ``key`` (such as ``MODEL.FPN.NORM``) asks for, as ``get_norm`` takes it.

    ``GN`` follows ``MODEL.GN``; ``LN`` is GN with one group and ``IN`` with one channel per group
    (GN paper, section 3.1); ``LN2d`` normalizes the channels of each position by themselves, which
    Detectron2 calls LN; the others are Detectron2's: BN, SyncBN, FrozenBN, "".

    Raises:
        ConfigError: the value is unknown, the groups of ``MODEL.GN`` are not stated once, or its
            kernel is not for the device.
    """
    warn_of_ignored_keys(cfg)
    node, name = locate(cfg, key)
    norm, gn = node[name], cfg.MODEL.GN
    if gn.KERNEL == "triton" and cfg.MODEL.DEVICE == "cpu":
        raise ConfigError(
            "MODEL.GN.KERNEL is 'triton', whose kernels are for CUDA devices, and MODEL.DEVICE is "
            "'cpu'; set it to 'auto'"
        )
    groups = {"GN": (gn.NUM_GROUPS, gn.CHANNELS_PER_GROUP), "LN": (1, 0), "IN": (0, 1)}
    if norm in groups:
        num_groups, channels_per_group = groups[norm]
        return GroupNormFactory(
            num_groups,
            gn.EPS,
            channels_per_group=channels_per_group,
            nearest_divisor=gn.NEAREST_DIVISOR,
            kernel=gn.KERNEL,
        )
    if norm == "LN2d":
        return _LAYER_NORM_2D
    if norm in _DETECTRON2_NORMS:
        return norm
    known = ", ".join(map(repr, (*groups, "LN2d", *_DETECTRON2_NORMS)))
    raise ConfigError(f"{key} is {norm!r}; known: {known}")


def with_norms(cfg: CfgNode, *keys: str) -> CfgNode:
    """Return a copy of ``cfg`` in which the norm keys ``keys`` hold what Detectron2 can build.

    Detectron2's builders pass the value on to ``get_norm``, which takes a string or a callable. A
    CfgNode refuses a callable as an attribute, not as an item.
    """
    copy = cfg.clone()
    for key in keys:
        node, name = locate(copy, key)
        node[name] = norm_from_config(cfg, key)
    return copy


def weight_standardization_from_config(cfg: CfgNode) -> str:
    """The variant of ``layers.standardize_weight`` that ``MODEL.GN.WEIGHT_STANDARDIZATION`` asks
    for, or "" for none.

    Raises:
        ConfigError: the value is unknown.
    """
    value = cfg.MODEL.GN.WEIGHT_STANDARDIZATION
    if value == "auto":
        grouped = cfg.MODEL.RESNETS.NUM_GROUPS > 1 and cfg.MODEL.RESNETS.NORM == "GN"
        return "authors" if grouped else ""
    if value and value not in VARIANTS:
        known = ", ".join(map(repr, ("auto", "", *VARIANTS)))
        raise ConfigError(f"MODEL.GN.WEIGHT_STANDARDIZATION is {value!r}; known: {known}")
    return value


def finish_from_config(cfg: CfgNode, of_rois: bool = False) -> dict[str, str | bool]:
    """The last arguments of :func:`finish_norms`.

    Args:
        of_rois: the component has maps of RoIs, which are never padded.

    Raises:
        ConfigError: a value is unknown, or other components of ``cfg`` do not know of padding.
    """
    if cfg.MODEL.GN.MASK_PADDING:
        check_components(cfg)
    return {
        "weight_standardization": weight_standardization_from_config(cfg),
        "memory": cfg.MODEL.GN.MEMORY,
        "channels_last": cfg.MODEL.CHANNELS_LAST,
        "mask_padding": cfg.MODEL.GN.MASK_PADDING and not of_rois,
    }


def finish_norms(
    module: nn.Module,
    name: str,
    weight_standardization: str = "",
    memory: str = "fast",
    channels_last: bool = False,
    mask_padding: bool = False,
) -> nn.Module:
    """Complete a component whose norms came from a :class:`GroupNormFactory`.

    Logs each layer that got other groups than asked for, fuses the norms with what follows them
    (``blocks.fuse_norms``), and standardizes the weights of the convolutions before a GroupNorm,
    and of all in the pre-activation ResNet.

    Args:
        module: the component.
        name: its name in the model.
        weight_standardization: a variant of ``layers.standardize_weight``, or "" for none.
        memory: what its backward pass keeps, one of ``layers.recompute.MODES``.
        channels_last: lay the weights of its convolutions out so (``torch.channels_last``). A
            convolution with such weights puts out such a map, whatever it gets, and norms,
            activations, sums, poolings and resampling keep the format.
        mask_padding: keep what is padding of its maps at 0, and out of statistics
            (``padding.mask_paddings``). Not for maps of RoIs.

    Returns:
        ``module``; but if it is a layer or block of Detectron2's itself, what stands in its place.

    Raises:
        ConfigError: a norm could not be built; names each such layer, its channels, the groups,
            and values that work. Or ``memory`` is unknown, or ``channels_last`` finds a deformable
            convolution.
    """
    unbuilt = {n: m.reason for n, m in module.named_modules() if isinstance(m, _Unbuilt)}
    if unbuilt:
        layers = "; ".join(f"{name}.{n}: {reason}" for n, reason in unbuilt.items())
        raise ConfigError(
            f"MODEL.GN.NUM_GROUPS (or CHANNELS_PER_GROUP) does not fit: {layers}. "
            "MODEL.GN.NEAREST_DIVISOR True takes the nearest number in each of these layers "
            "(in a lazy config: num_groups and nearest_divisor of GroupNormFactory)"
        )
    for child_name, child in module.named_modules():
        if hasattr(child, "adapted"):
            logger.info(f"{name}.{child_name}: {child.adapted}")
            del child.adapted
    if memory == "auto":  # of a model that is not trained (engine/memory.py)
        memory = "fast"
    if memory not in MODES:
        raise ConfigError(f"MODEL.GN.MEMORY (memory) is {memory!r}; known: {', '.join(MODES)}")
    module = fuse_norms(module, memory)
    if weight_standardization:
        _standardize_weights(module, name, weight_standardization)
    if channels_last:
        for child_name, child in module.named_modules():
            if isinstance(child, _DEFORMABLE):
                raise ConfigError(
                    f"MODEL.CHANNELS_LAST is True, but {name}.{child_name} is a deformable "
                    "convolution, whose kernel takes NCHW alone; set it to False"
                )
        module.to(memory_format=torch.channels_last)
    if mask_padding:
        mask_paddings(module)
    return module


def _standardize_weights(module: nn.Module, name: str, variant: str) -> None:
    before = set(before_group_norm(module))
    for child_name, child in module.named_modules():
        eps_of_variant = getattr(child, "eps_of_variant", None)
        if child not in before and eps_of_variant is None:
            continue
        if isinstance(child, GNConv2d):
            try:
                child.standardize(variant, (eps_of_variant or {}).get(variant))
            except ValueError as error:
                raise ConfigError(
                    f"MODEL.GN.WEIGHT_STANDARDIZATION: {name}.{child_name}: {error}"
                ) from None
        elif isinstance(child, (nn.Conv2d, *_DEFORMABLE)):
            logger.warning(
                f"{name}.{child_name}: the weights of a {type(child).__name__} are not standardized"
            )


def add_norms(module: nn.Module, norm: GroupNormFactory | str) -> None:
    """Put a norm, as ``get_norm`` takes it, behind the convolutions that Detectron2 built without
    one, and drop their biases, as Detectron2 does wherever it knows of the norm."""
    for conv in module.modules():
        if norm and isinstance(conv, Conv2d):
            conv.norm, conv.bias = get_norm(norm, conv.out_channels), None


def insert_after(sequential: nn.Sequential, name: str, new_name: str, new: nn.Module) -> None:
    """Add ``new`` to ``sequential`` under ``new_name``, right behind its child ``name``."""
    children = list(sequential.named_children())
    for child_name, _ in children:
        delattr(sequential, child_name)
    for child_name, child in children:
        sequential.add_module(child_name, child)
        if child_name == name:
            sequential.add_module(new_name, new)
