"""RetinaNet (Lin et al., ICCV 2017) and the semantic head of Panoptic FPN (Kirillov et al., CVPR
2019) with any norm; and whole detectors from components."""

from __future__ import annotations

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from .blocks import Block, in_memory_mode
from .norm import finish_from_config, finish_norms, with_norms


@META_ARCH_REGISTRY.register()
class GNRetinaNet(RetinaNet):
    """Detectron2's RetinaNet with our norms in its head, which all levels share.

    Raises:
        ConfigError: ``MODEL.RETINANET.NORM`` is unknown, or the groups do not divide a layer's
            channels.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(with_norms(cfg, "MODEL.RETINANET.NORM"))
        args["head"] = finish_norms(args["head"], "head", **finish_from_config(cfg))
        return args


@SEM_SEG_HEADS_REGISTRY.register()
class GNSemSegFPNHead(Block, SemSegFPNHead):
    """Detectron2's head with our norms (GN in the paper, section 4.1).

    Args:
        *args, **kwargs: of ``SemSegFPNHead``.
        finish: ``weight_standardization``, ``memory`` and ``channels_last`` of ``finish_norms``.

    Raises:
        ConfigError: ``MODEL.SEM_SEG_HEAD.NORM`` is unknown, or the groups do not divide a layer's
            channels.
    """

    @configurable
    def __init__(
        self,
        *args,
        finish: dict[str, str | bool] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        finish_norms(self, "sem_seg_head", **finish or {})

    layers = in_memory_mode(SemSegFPNHead.layers)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]):
        return {
            **super().from_config(with_norms(cfg, "MODEL.SEM_SEG_HEAD.NORM"), input_shape),
            "finish": finish_from_config(cfg),
        }


def build_detector(
    meta_arch: type[nn.Module],
    *,
    weight_standardization: str = "",
    memory: str = "fast",
    channels_last: bool = False,
    **components,
) -> nn.Module:
    """Build a detector from components of Detectron2 whose norms come from a ``GroupNormFactory``.

    What our YAML builders do component by component, for lazy configs (``configs/lazy``) and
    plain Python.

    Args:
        meta_arch: such as ``GeneralizedRCNN``.
        weight_standardization: of every convolution before a GN (``layers.standardize_weight``).
        memory: what the backward pass of all components keeps (``layers.recompute.MODES``).
        channels_last: lay the weights, and with them the maps, out so.
        **components: arguments of ``meta_arch``.

    Raises:
        ConfigError: the groups do not divide a layer's channels.
    """
    model = meta_arch(**components)
    return finish_norms(model, "model", weight_standardization, memory, channels_last)
