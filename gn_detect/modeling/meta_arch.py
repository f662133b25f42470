"""Meta-architectures that tell their layers what of a batch is image: Mask R-CNN, Panoptic FPN
(Kirillov et al., CVPR 2019), with its semantic head, and RetinaNet (Lin et al., ICCV 2017), with
any norm; and whole detectors from components."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    RetinaNet,
)
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers.padding import Extents, extend_images, images_in_batch, set_images

from .blocks import Block, in_memory_mode
from .norm import finish_from_config, finish_norms, with_norms
from .normalizer import running_mean
from .padding import check_masked, extend_pooled, mask_paddings
from .rpn import inside, label_inside


def _of_a_batch(method: Callable) -> Callable:
    """Run a method, which calls ``preprocess_image``, with the extents of its images."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with images_in_batch():
            return method(self, *args, **kwargs)

    return run


class TellsExtents:
    """Over a meta-architecture of Detectron2."""

    masks_padding = True  # where a component is built so (MODEL.GN.MASK_PADDING)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        """
        Raises:
            ConfigError: with ``MODEL.GN.MASK_PADDING``, a component does not mask padding.
        """
        args = super().from_config(cfg)
        if cfg.MODEL.GN.MASK_PADDING:
            check_masked(cfg, "MODEL.BACKBONE.NAME", args["backbone"])
            if "sem_seg_head" in args:
                check_masked(cfg, "MODEL.SEM_SEG_HEAD.NAME", args["sem_seg_head"])
            if "roi_heads" in args:
                extend_pooled(args["roi_heads"])
        return args

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = super().preprocess_image(batched_inputs)
        set_images(Extents(images.image_sizes, *images.tensor.shape[-2:]))
        return images


@META_ARCH_REGISTRY.register()
class GNGeneralizedRCNN(TellsExtents, GeneralizedRCNN):
    """Detectron2's, for components that mask padding."""

    forward = _of_a_batch(GeneralizedRCNN.forward)
    inference = _of_a_batch(GeneralizedRCNN.inference)


@META_ARCH_REGISTRY.register()
class GNPanopticFPN(TellsExtents, PanopticFPN):
    """Detectron2's, for components that mask padding."""

    forward = _of_a_batch(PanopticFPN.forward)
    inference = _of_a_batch(PanopticFPN.inference)


@META_ARCH_REGISTRY.register()
class GNRetinaNet(TellsExtents, RetinaNet):
    """Detectron2's RetinaNet with our norms in its head, which all levels share.

    Args:
        mask_padding: anchors whose centre is in the padding of an image are neither positive nor
            negative, and detect nothing.
        loss_normalizer: "batch": the losses are divided by Detectron2's mean of the positive
            anchors, which each pass changes; "running": by one per image
            (``normalizer.RunningMean``), and the images.
        **kwargs: of ``RetinaNet``.

    Raises:
        ConfigError: ``MODEL.RETINANET.NORM`` or ``loss_normalizer`` is unknown, or the groups do
            not divide a layer's channels.
    """

    @configurable
    def __init__(self, *, mask_padding: bool = False, loss_normalizer: str = "batch", **kwargs):
        super().__init__(**kwargs)
        self.mask_padding = mask_padding
        key = "MODEL.RETINANET.LOSS_NORMALIZER"
        # Of an image; Detectron2's, of a pass, starts there.
        self.normalizer = running_mean(loss_normalizer, key, 100)

    @classmethod
    def from_config(cls, cfg: CfgNode):
        args = super().from_config(with_norms(cfg, "MODEL.RETINANET.NORM"))
        args["head"] = finish_norms(args["head"], "head", **finish_from_config(cfg))
        args["mask_padding"] = cfg.MODEL.GN.MASK_PADDING
        args["loss_normalizer"] = cfg.MODEL.RETINANET.LOSS_NORMALIZER
        return args

    forward = _of_a_batch(RetinaNet.forward)

    @torch.no_grad()
    def label_anchors(self, anchors: list[Boxes], gt_instances: list[Instances]):
        label = super().label_anchors
        if self.mask_padding:
            return label_inside(label, anchors, gt_instances)
        return label(anchors, gt_instances)

    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes):
        if self.normalizer:
            labels = torch.stack(gt_labels)
            positives = (labels >= 0) & (labels != self.num_classes)
            self._counts = int(positives.sum()), len(labels)
        return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9):
        if self.normalizer:  # not ``value``, which is 1 also where a pass has no positives
            return self.normalizer(*self._counts)
        return super()._ema_update(name, value, initial_value, momentum)

    def inference_single_image(self, anchors, box_cls, box_delta, image_size) -> Instances:
        levels = anchors, box_cls, box_delta
        if self.mask_padding:
            kept = inside(anchors, [image_size])
            levels = ([x[k[0]] for x, k in zip(level, kept, strict=True)] for level in levels)
        return super().inference_single_image(*levels, image_size)


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

    mask_padding = False

    @configurable
    def __init__(
        self,
        *args,
        finish: dict[str, str | bool] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        finish_norms(self, "sem_seg_head", **finish or {})

    @in_memory_mode
    def layers(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        x = super().layers(features)
        return extend_images(x) if self.mask_padding else x

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
    mask_padding: bool = False,
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
        mask_padding: what of a batch is padding changes nothing (``MODEL.GN.MASK_PADDING``).
        **components: arguments of ``meta_arch``.

    Raises:
        ConfigError: the groups do not divide a layer's channels, or ``mask_padding`` is asked of a
            component that does not know of it.
    """
    model = meta_arch(**components)
    if mask_padding:
        for part in (model, getattr(model, "proposal_generator", None) or model):
            if not hasattr(part, "masks_padding"):
                raise ConfigError(
                    f"model.mask_padding is True, but a {type(part).__name__} does not know of it; "
                    "take that of gn_detect.modeling (GNGeneralizedRCNN, GNPanopticFPN, "
                    "GNRetinaNet, GNRPN), or set it to False"
                )
    model = finish_norms(model, "model", weight_standardization, memory, channels_last)
    if mask_padding:
        heads = getattr(model, "roi_heads", nn.Identity())
        mask_paddings(model, but=heads)
        extend_pooled(heads)
    return model
