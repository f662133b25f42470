"""The same Mask R-CNN as Detectron2 and as gn_detect build it, on synthetic images."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils._pytree import tree_leaves

from gn_detect.config import ConfigError, get_config_file, load_config
from gn_detect.engine.train_loop import AMP_DTYPES
from gn_detect.layers.recompute import MODES

FROZEN_BN, DETECTRON2_GN = "detectron2-frozenbn", "detectron2-gn"
MASKED = "ours-masked"  # as ours-fast, with MODEL.GN.MASK_PADDING
VARIANTS = (FROZEN_BN, DETECTRON2_GN, *(f"ours-{mode}" for mode in MODES), MASKED)

_CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
# Its components, and their equals in Detectron2.
_COMPONENTS = {
    "MODEL.META_ARCHITECTURE": ("GNGeneralizedRCNN", "GeneralizedRCNN"),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("GNRPN", "RPN"),
    "MODEL.BACKBONE.NAME": ("build_gn_resnet_fpn_backbone", "build_resnet_fpn_backbone"),
    "MODEL.RPN.HEAD_NAME": ("GNRPNHead", "StandardRPNHead"),
    "MODEL.ROI_BOX_HEAD.NAME": ("GNFastRCNNConvFCHead", "FastRCNNConvFCHead"),
    "MODEL.ROI_MASK_HEAD.NAME": ("GNMaskRCNNConvUpsampleHead", "MaskRCNNConvUpsampleHead"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants of a measurement share.

    Args:
        opts: of the config of Mask R-CNN with R50-FPN, KEY VALUE.
        device: ``"cpu"`` or ``"cuda"``.
        amp: ``"none"``, or autocast to ``"float16"`` or ``"bfloat16"``.
        channels_last: have weights and maps of ``"all"`` variants, or of ``"ours"``, in
            ``torch.channels_last``; ``""``: of none.
        images: of a step.
        size: height and width of each, in pixels.
        mixed: every second one has the other orientation, so that all are padded.
        rois: of each image, a quarter of them with masks, for the heads in training.
        dtype, layout: of the maps, where GN layers are measured alone.
    """

    opts: tuple[str, ...] = ()
    device: str = "cpu"
    amp: str = "none"
    channels_last: str = ""
    images: int = 2
    size: tuple[int, int] = (256, 320)
    mixed: bool = False
    rois: int = 64
    dtype: str = "float32"
    layout: str = "nchw"

    @property
    def kernel(self) -> str:
        """``MODEL.GN.KERNEL`` of ours: what auto takes, or an error in place of another one."""
        return "triton" if self.device == "cuda" else "torch"

    def autocast(self) -> contextlib.AbstractContextManager:
        """As in our trainer, but also where the device is not there."""
        autocast = torch.autocast(self.device, dtype=AMP_DTYPES.get(self.amp), enabled=False)
        autocast._enabled = self.amp in AMP_DTYPES  # past the look for the device
        return autocast


def variant_config(variant: str, settings: Settings) -> CfgNode:
    """The config of one of ``VARIANTS``.

    All have the same architecture, head and batch. Detectron2's FrozenBN has it in the backbone,
    and no norm in FPN and heads, as Detectron2's configs with FrozenBN.

    Raises:
        ConfigError: a key of ``settings.opts`` is unknown, or not the same for all variants.
    """
    ours, norm = variant.startswith("ours-"), "" if variant == FROZEN_BN else "GN"
    fixed = {
        **{key: names[not ours] for key, names in _COMPONENTS.items()},
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.MASK_ON": True,
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": settings.device,
        "MODEL.ROI_HEADS.NUM_CLASSES": 80,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": settings.rois,
        "MODEL.RESNETS.NORM": norm or "FrozenBN",
        "MODEL.FPN.NORM": norm,
        "MODEL.ROI_BOX_HEAD.NORM": norm,
        "MODEL.ROI_MASK_HEAD.NORM": norm,
        "MODEL.GN.MEMORY": variant.removeprefix("ours-") if ours and variant != MASKED else "fast",
        "MODEL.GN.MASK_PADDING": variant == MASKED,
        "MODEL.GN.KERNEL": settings.kernel,
        "MODEL.CHANNELS_LAST": ours and bool(settings.channels_last),
        "SOLVER.BASE_LR": 1e-9,  # so that the work of each step is the same
    }
    for key in settings.opts[::2]:
        # Detectron2 has no other GN, and no norms in more places.
        if key in fixed or key.startswith("MODEL.GN.") or key.endswith("NORM"):
            raise ConfigError(
                f"the command line: {key} is set by the benchmark itself, so that its variants "
                "differ in nothing else; leave it out (some such keys have an option: --help)"
            )
    words = [word for pair in fixed.items() for word in pair]
    opts = ["MODEL.BACKBONE.FREEZE_AT", "0", *settings.opts, *words]
    return load_config(get_config_file(_CONFIG), opts)


class Detector:
    """One of ``VARIANTS`` in training mode, its optimizer, and the batch that it works on. Ours and
    Detectron2's with GN have the same weights."""

    def __init__(self, variant: str, settings: Settings):
        cfg = variant_config(variant, settings)
        self.settings, self.batch = settings, synthetic_batch(settings)
        torch.manual_seed(0)
        self.model = build_model(cfg)
        if settings.channels_last == "all":
            self.model.to(memory_format=torch.channels_last)
        # So that untrained residual blocks, which have no norm then, do not overflow float16.
        for module in self.model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.weight.fill_(0.25)
        # The untrained predictor is sure of class 0, so that inference has boxes to make masks of.
        nn.init.constant_(self.model.roi_heads.box_predictor.cls_score.bias[:1], 8.0)
        self.optimizer = build_optimizer(cfg, self.model)

    def forward(self) -> torch.Tensor:
        """The sum of the losses in training; () float32."""
        torch.manual_seed(0)  # of the sampling of anchors and proposals
        with EventStorage(), self.settings.autocast():
            return sum(self.model(self.batch).values())

    def step(self) -> None:
        """Forward, backward and optimizer step. No gradients stay behind, as other variants share
        the memory.

        Raises:
            FloatingPointError: by Detectron2, after a step whose gradients overflowed float16.
        """
        try:
            self.forward().backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad()

    @torch.no_grad()
    def infer(self) -> list[dict]:
        """The detections of ``model.eval()`` in the batch, with masks in the size of the images."""
        with self.settings.autocast():
            return self.model([{"image": item["image"]} for item in self.batch])

    def peak_bytes(self) -> int:
        """The most memory that a step has on a GPU, as if the detector were alone there: what the
        step adds to the allocated, and the weights, buffers and optimizer state."""
        self.step()  # makes the momentum
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        own = tree_leaves((self.model.state_dict(), self.optimizer.state_dict()["state"]))
        return torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in own)


def synthetic_batch(settings: Settings) -> list[dict]:
    """Images of noise, each with as many objects as the heads take masks. An object is a proposal
    of itself, so that all variants have the same RoIs, whatever their untrained RPNs propose."""
    generator = torch.Generator().manual_seed(0)
    number = max(1, settings.rois // 4)  # MODEL.ROI_HEADS.POSITIVE_FRACTION 0.25
    batch = []
    for i in range(settings.images):
        height, width = settings.size[:: -1 if settings.mixed and i % 2 else 1]
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        center, half = torch.rand(2, number, 2, generator=generator)
        center = center * torch.tensor([width, height])
        half = 8 * (min(height, width) / 32) ** half  # sides of 16 pixels to half of the image
        boxes = Boxes(torch.cat([center - half, center + half], dim=1))
        boxes.clip((height, width))
        instances = Instances((height, width), gt_boxes=boxes)
        instances.gt_classes = torch.randint(0, 80, (number,), generator=generator)
        polygons = boxes.tensor[:, [0, 1, 2, 1, 2, 3, 0, 3]].tolist()
        instances.gt_masks = PolygonMasks([[polygon] for polygon in polygons])
        instances = instances.to(settings.device)
        batch.append({"image": image.to(settings.device), "instances": instances})
    return batch
