"""The same Mask R-CNN as Detectron2 and as gn_detect build it, on synthetic images."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from gn_detect.config import ConfigError, load_config
from gn_detect.engine.train_loop import AMP_DTYPES
from gn_detect.layers.recompute import MODES

FROZEN_BN, DETECTRON2_GN = "detectron2-frozenbn", "detectron2-gn"
VARIANTS = (FROZEN_BN, DETECTRON2_GN, *(f"ours-{mode}" for mode in MODES))

# The components that a config of ours names, and their equals in Detectron2.
_DETECTRON2_NAMES = {
    "BACKBONE.NAME": ("build_gn_resnet_fpn_backbone", "build_resnet_fpn_backbone"),
    "RPN.HEAD_NAME": ("GNRPNHead", "StandardRPNHead"),
    "ROI_HEADS.NAME": ("StandardROIHeads", "StandardROIHeads"),
    "ROI_BOX_HEAD.NAME": ("GNFastRCNNConvFCHead", "FastRCNNConvFCHead"),
    "ROI_MASK_HEAD.NAME": ("GNMaskRCNNConvUpsampleHead", "MaskRCNNConvUpsampleHead"),
}
# Of the loss with float16: small, so that no step of untrained weights overflows and is left out.
_SCALE = 16.0
_NORM_KEYS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all variants of a measurement share.

    Args:
        config_file: a Mask R-CNN with FPN and GN.
        opts: more of it, KEY VALUE.
        device: ``"cpu"`` or ``"cuda"``.
        amp: ``"none"``, or autocast to ``"float16"`` (with a gradient scaler) or ``"bfloat16"``.
        channels_last: have weights and maps of ``"all"`` variants, or of ``"ours"``, in
            ``torch.channels_last``; ``""``: of none.
        images: of a step.
        size: height and width of each, in pixels.
        rois: of each image, a quarter of them with masks, for the heads in training.
        freeze_at: ``MODEL.BACKBONE.FREEZE_AT``.
        seed: of weights, images and sampling.
    """

    config_file: str
    opts: tuple[str, ...] = ()
    device: str = "cpu"
    amp: str = "none"
    channels_last: str = ""
    images: int = 2
    size: tuple[int, int] = (256, 320)
    rois: int = 64
    freeze_at: int = 0
    seed: int = 0

    @property
    def kernel(self) -> str:
        """``MODEL.GN.KERNEL`` of ours: what auto takes, or an error in place of another one."""
        return "triton" if self.device == "cuda" else "torch"

    def autocast(self) -> contextlib.AbstractContextManager:
        """As in ``engine.AccumulatingTrainer``."""
        return torch.autocast(
            self.device, dtype=AMP_DTYPES.get(self.amp), enabled=self.amp in AMP_DTYPES
        )


def variant_config(variant: str, settings: Settings) -> CfgNode:
    """The config of one of ``VARIANTS``.

    All have the same architecture, head and batch. Detectron2's FrozenBN has it in the backbone,
    and no norm in FPN and heads, as Detectron2's configs with FrozenBN.

    Raises:
        ConfigError: the config is wrong, or no Mask R-CNN with FPN.
    """
    ours = variant.startswith("ours-")
    fixed = {
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": settings.device,
        "SEED": settings.seed,
        "MODEL.BACKBONE.FREEZE_AT": settings.freeze_at,
        "MODEL.ROI_HEADS.NUM_CLASSES": 80,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": settings.rois,
        "SOLVER.BASE_LR": 1e-9,  # so that the work of each step is the same
        # Detectron2 has no other GN, and no norms in more places.
        "MODEL.GN.NUM_GROUPS": 32,
        "MODEL.GN.CHANNELS_PER_GROUP": 0,
        "MODEL.GN.EPS": 1e-5,
        "MODEL.GN.ZERO_INIT_RESIDUAL": False,
        "MODEL.GN.WEIGHT_STANDARDIZATION": "",
        "MODEL.RPN.NORM": "",
        "MODEL.ROI_BOX_HEAD.FC_NORM": "",
        "MODEL.ROI_MASK_HEAD.DECONV_NORM": "",
        **{f"MODEL.{key}.NORM": "" if variant == FROZEN_BN else "GN" for key in _NORM_KEYS},
        **{f"MODEL.{key}": names[not ours] for key, names in _DETECTRON2_NAMES.items()},
        "MODEL.GN.MEMORY": variant.removeprefix("ours-") if ours else "fast",
        "MODEL.GN.KERNEL": settings.kernel,
        "MODEL.CHANNELS_LAST": ours and bool(settings.channels_last),
    }
    if variant == FROZEN_BN:
        fixed["MODEL.RESNETS.NORM"] = "FrozenBN"
    for key in fixed.keys() & set(settings.opts[::2]):
        raise ConfigError(
            f"the command line: {key} is set by the benchmark itself, so that its variants differ "
            "in nothing else; leave it out (some such keys have an option: --help)"
        )
    cfg = load_config(settings.config_file, list(settings.opts))
    for key, (expected, _) in _DETECTRON2_NAMES.items():
        node, name = key.split(".")
        if not cfg.MODEL.MASK_ON or cfg.MODEL[node][name] != expected:
            raise ConfigError(
                f"{settings.config_file}: MODEL.{key} is {cfg.MODEL[node][name]!r} and "
                f"MODEL.MASK_ON {cfg.MODEL.MASK_ON}; the benchmark compares Mask R-CNNs with FPN, "
                f"which have {expected!r}, with Detectron2's"
            )
    words = [word for pair in fixed.items() for word in pair]
    return load_config(settings.config_file, [*settings.opts, *words])


class Detector:
    """A variant, its optimizer, and the batch that it works on.

    Args:
        variant: one of ``VARIANTS``.
        settings: weights are those that ``settings.seed`` gives, the same in all variants.

    Attributes:
        model: in training mode.
        batch: as Detectron2's models take it.
        rois: (RoIs of the box head, RoIs of the mask head) in the last pass.
    """

    def __init__(self, variant: str, settings: Settings):
        cfg = variant_config(variant, settings)
        self.use(settings)
        torch.manual_seed(settings.seed)
        self.model = build_model(cfg)
        if variant == FROZEN_BN:  # has biases where others have norms, which shift random numbers
            torch.manual_seed(settings.seed)
            others = build_model(variant_config(DETECTRON2_GN, settings))
            self.model.load_state_dict(others.state_dict(), strict=False)
        ours = variant.startswith("ours-")
        if settings.channels_last == "all" and not ours:
            self.model.to(memory_format=torch.channels_last)
        _set_statistics(self.model, self.batch)
        _detect_one_class(self.model)
        self.optimizer = build_optimizer(cfg, self.model)
        self.rois = [0, 0]
        heads = self.model.roi_heads
        for index, head in enumerate((heads.box_head, heads.mask_head)):
            head.register_forward_pre_hook(
                lambda _, inputs, index=index: self.rois.__setitem__(index, len(inputs[0]))
            )

    def use(self, settings: Settings) -> None:
        """Go on with the images of other settings, which differ in nothing else."""
        self.settings, self.batch = settings, synthetic_batch(settings)
        self.scaler = torch.amp.GradScaler(
            settings.device, init_scale=_SCALE, enabled=settings.amp == "float16"
        )

    def forward(self) -> torch.Tensor:
        """The sum of the losses in training; () float32, scaled for float16."""
        torch.manual_seed(self.settings.seed)  # of the sampling of anchors and proposals
        with EventStorage(), self.settings.autocast():
            losses = self.model(self.batch)
        return self.scaler.scale(sum(losses.values()))

    def step(self) -> None:
        """Forward, backward and optimizer step. No gradients stay behind, as other variants share
        the memory."""
        try:
            self.forward().backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        finally:
            self.optimizer.zero_grad()

    def check_no_step_was_left_out(self) -> None:
        """
        Raises:
            FloatingPointError: gradients have overflowed float16, so that some steps were shorter.
        """
        if self.settings.amp == "float16" and self.scaler.get_scale() < _SCALE:
            raise FloatingPointError(
                "gradients overflowed float16, so that the optimizer left steps out; measure "
                "--amp bfloat16"
            )

    @torch.no_grad()
    def infer(self) -> list[dict]:
        """The detections of ``model.eval()`` in the batch, with masks in the size of the images."""
        with self.settings.autocast():
            return self.model([{"image": item["image"]} for item in self.batch])

    def state_bytes(self) -> int:
        """Of weights, buffers and optimizer state, which stay from step to step."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def peak_bytes(detector: Detector) -> int | None:
    """The most memory that a step of ``detector`` had, as if it were alone on its GPU: what the
    step adds to the allocated, and the detector's own state. None on a CPU."""
    if detector.settings.device != "cuda":
        return None
    detector.step()  # its optimizer has its state afterwards
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    detector.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + detector.state_bytes()


def synthetic_batch(settings: Settings) -> list[dict]:
    """Images of noise, each with as many objects as the heads take masks.

    An object is a proposal of itself, so that all variants have the same RoIs and masks,
    whatever their untrained RPNs propose.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    height, width = settings.size
    number = max(1, settings.rois // 4)  # MODEL.ROI_HEADS.POSITIVE_FRACTION 0.25
    batch = []
    for _ in range(settings.images):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        center, half = torch.rand(2, number, 2, generator=generator)
        center = center * torch.tensor([width, height])
        half = 8 * (min(height, width) / 32) ** half  # sides of 16 pixels to half of the image
        boxes = Boxes(torch.cat([center - half, center + half], dim=1))
        boxes.clip((height, width))
        instances = Instances((height, width), gt_boxes=boxes)
        instances.gt_classes = torch.randint(0, 80, (number,), generator=generator)
        instances.gt_masks = PolygonMasks([[_octagon(box)] for box in boxes.tensor.tolist()])
        instances = instances.to(settings.device)
        batch.append({"image": image.to(settings.device), "instances": instances})
    return batch


def _octagon(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = box
    angles = [math.tau * k / 8 for k in range(8)]
    points = [((1 + math.cos(a)) / 2, (1 + math.sin(a)) / 2) for a in angles]
    return [c for u, v in points for c in (x0 + u * (x1 - x0), y0 + v * (y1 - y0))]


@torch.no_grad()
def _set_statistics(model: nn.Module, batch: list[dict]) -> None:
    """Give each FrozenBN the statistics of the batch, as training BN would have: without, untrained
    weights overflow float16."""

    def take(module: FrozenBatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(take) for norm in norms]
    if norms:
        model.backbone(model.preprocess_image(batch).tensor)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _detect_one_class(model: nn.Module) -> None:
    """Let the untrained predictor be sure of class 0 everywhere, so that inference has as many
    boxes with masks as it allows."""
    model.roi_heads.box_predictor.cls_score.bias[0] = 8.0
