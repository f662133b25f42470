"""Detectron2's detectors as functions of tensors alone, which hold for images of any size.

Detectron2 is made to be traced, and nearly all of it is right for other sizes than that of the
trace. What is not, or would be slow, is exchanged here, for the time of an export.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import nonzero_tuple
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, poolers
from detectron2.modeling.meta_arch import dense_detector, rcnn, retinanet
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import fast_rcnn, keypoint_head
from torch import Tensor, nn
from torchvision.ops import batched_nms

from gn_detect.config import ConfigError
from gn_detect.layers import standardize_weight

# torchvision keeps boxes of different classes apart by large offsets up to these coordinates, where
# float32 rounds them, and above runs class by class.
_MAX_COORDINATES = 4000


class Detector(nn.Module):
    """A detector as a function of one image.

    Args:
        model: of Detectron2. It is copied; the weights of the copy are standardized once for all.
        bgr: whether it takes blue first.

    Raises:
        ConfigError: it gives other things than instances.
    """

    def __init__(self, model: nn.Module, *, bgr: bool):
        super().__init__()
        if isinstance(model, PanopticFPN) or not isinstance(model, (GeneralizedRCNN, RetinaNet)):
            raise ConfigError(
                f"a {type(model).__name__} cannot be exported: only RetinaNet and Faster, Mask, "
                "Cascade and Keypoint R-CNN can"
            )
        self.model, self.bgr = copy.deepcopy(model).cpu().eval(), bgr
        for module in self.model.modules():
            if variant := getattr(module, "weight_standardization", ""):
                weight = standardize_weight(module.weight.detach(), variant, module.weight_eps)
                module.weight = nn.Parameter(weight)
                module.weight_standardization = ""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            image: (height, width, 3) uint8 RGB.

        Returns:
            sorted by score, in pixels of ``image``: boxes (N, 4) XYXY, scores (N,), classes (N,)
            int64, and of models that have them masks (N, M, M), probabilities within the boxes, and
            keypoints (N, K, 3) of x, y and score.
        """
        image = image.permute(2, 0, 1)
        found = self.model([{"image": image.flip(0) if self.bgr else image}])[0]["instances"]
        outputs = [found.pred_boxes.tensor, found.scores, found.pred_classes]
        if found.has("pred_masks"):
            outputs.append(found.pred_masks[:, 0])
        if found.has("pred_keypoints"):
            outputs.append(found.pred_keypoints)
        return tuple(outputs)

    @property
    def output_names(self) -> list[str]:
        heads = getattr(self.model, "roi_heads", None)
        optional = {"masks": "mask_on", "keypoints": "keypoint_on"}
        optional = [name for name, switch in optional.items() if getattr(heads, switch, False)]
        return ["boxes", "scores", "classes", *optional]


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` and the :class:`Detector` of it can be traced for images of any size.
    Masks are not pasted into the image."""
    heads = getattr(model, "roi_heads", model)
    levels = len(getattr(getattr(model, "proposal_generator", None), "in_features", ""))
    patches = [
        (rcnn, "detector_postprocess", lambda found, *_: found),
        (dense_detector, "detector_postprocess", lambda found, *_: found),
        (proposal_utils, "batched_nms", _nms_of(levels)),
        (fast_rcnn, "batched_nms", _nms_of(heads.num_classes)),
        (retinanet, "batched_nms", _nms_of(heads.num_classes)),
        (keypoint_head, "heatmaps_to_keypoints", _heatmaps_to_keypoints),
        (poolers.ROIPooler, "forward", _pool),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, ours in patches:
            stack.enter_context(mock.patch.object(owner, name, ours))
        stack.enter_context(patch_builtin_len())
        stack.enter_context(torch.no_grad())
        yield


def _nms_of(num_classes: int) -> Callable:
    """torchvision's ``batched_nms``, of so many classes: the boxes that a trace would keep are
    those of the offsets, and all of them."""

    def nms(boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float) -> Tensor:
        few = torch.as_tensor(boxes.shape[0]) * 4 <= _MAX_COORDINATES
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
        shifted = boxes + (classes * few).to(boxes)[:, None] * (largest + 1)
        kept = _NonMaxSuppression.apply(shifted, scores, classes, iou_threshold, num_classes)
        kept = kept.sort().values  # so that of equal scores the first is the first
        return kept[scores[kept].sort(descending=True).indices]

    return nms


class _NonMaxSuppression(torch.autograd.Function):
    """The indices of the boxes that are kept, class by class; ONNX has an operator for it."""

    @staticmethod
    def forward(ctx, boxes, scores, classes, iou_threshold, num_classes):
        return batched_nms(boxes.float(), scores, classes, iou_threshold)

    @staticmethod
    def symbolic(g, boxes, scores, classes, iou_threshold, num_classes):
        def constant(value, dtype=torch.int64):
            return g.op("Constant", value_t=torch.as_tensor(value, dtype=dtype))

        first, lowest = constant([0]), torch.finfo(torch.float32).min
        own = g.op("Equal", constant([[c] for c in range(num_classes)]), classes)
        scores = g.op("Where", own, scores, constant(-torch.inf, torch.float32))
        found = g.op(
            "NonMaxSuppression",
            g.op("Unsqueeze", boxes, first),
            g.op("Unsqueeze", scores, first),
            constant(torch.iinfo(torch.int64).max),
            constant(iou_threshold, torch.float32),
            constant(lowest, torch.float32),  # above that of the other classes
        )
        return g.op("Gather", found, constant(2), axis_i=1)


def _pool(self, features: list[Tensor], box_lists: list) -> Tensor:
    """``ROIPooler.forward`` without a map of zeros that each level writes to."""
    rois = poolers.convert_boxes_to_pooler_format(box_lists)
    if len(features) == 1:
        return self.level_poolers[0](features[0], rois)
    levels = poolers.assign_boxes_to_levels(
        box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
    )
    of_level = [nonzero_tuple(levels == level)[0] for level in range(len(features))]
    pooled = [
        pooler(feature, rois[indices])
        for pooler, feature, indices in zip(self.level_poolers, features, of_level, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(of_level).argsort()]


@torch.jit.script_if_tracing
def _heatmaps_to_keypoints(maps: Tensor, boxes: Tensor) -> Tensor:
    """Detectron2's, of (N, K, M, M) logits and (N, 4) boxes: (N, K, 4) of x, y, logit and score.

    In operations that ONNX has within a loop. Its cubic Resize takes ten times PyTorch's time; two
    products of matrices do the same.
    """
    num_keypoints, count = maps.shape[1], maps.shape[2]
    found = torch.zeros([0, num_keypoints, 4], dtype=torch.float32)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    # Two cells beyond each border, which are as those at it.
    cells = torch.arange(-2, count + 2)
    inside = cells.clamp(min=0, max=count - 1)
    padded = maps.index_select(2, inside).index_select(3, inside)
    for i in range(maps.shape[0]):
        width, height = sides[i].ceil().to(torch.int64).unbind()
        weights_x = _cubic_weights(int(width), count, cells)
        weights_y = _cubic_weights(int(height), count, cells)
        heatmap = weights_y @ padded[i] @ weights_x.transpose(0, 1)
        logit, position = heatmap.reshape([num_keypoints, -1]).max(dim=1)
        score = (maps[i] - logit[:, None, None]).exp().sum(dim=[1, 2]).reciprocal()
        x = position % width
        y = (position - x) // width
        center = torch.stack([x.float(), y.float()], dim=1) + 0.5
        pixels = center * (sides[i] / sides[i].ceil()) + boxes[i, :2]
        found = torch.cat([found, torch.cat([pixels, logit[:, None], score[:, None]], dim=1)[None]])
    return found


@torch.jit.script_if_tracing
def _cubic_weights(size: int, count: int, cells: Tensor) -> Tensor:
    """(size, C) weights of ``cells``, (C,) places, in the bicubic resizing of ``count`` to
    ``size``, with PyTorch's parameter of -0.75."""
    places = (torch.arange(size).float() + 0.5) * (float(count) / float(size)) - 0.5
    d = (places[:, None] - cells.float()[None]).abs()
    near = (1.25 * d - 2.25) * d * d + 1.0
    far = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    return near * (d <= 1).float() + far * ((d > 1) & (d < 2)).float()
