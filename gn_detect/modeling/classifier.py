"""A ResNet that classifies images, in the loop, the recipe and the files of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling import ResNet

from .resnet import zero_init_residual


class ResNetClassifier(ResNet):
    """Detectron2's ResNet from images to losses or scores. Its parameters have the names of a
    backbone (``stem``, ``res2`` to ``res5``) and ``linear``, so that its checkpoint is the weights
    of a detector's as it is.

    Args:
        num_classes: of the images.
        input_format: order of the channels, ``"BGR"`` or ``"RGB"``; what the data mapper gives.
        pixel_mean, pixel_std: of each channel, of pixels from 0 to 255.
        zero_init: start the last norm of each block at gamma 0 (Goyal et al.,
            https://arxiv.org/abs/1706.02677, section 5.1, and the GN paper, section 4.1).
        label_smoothing: of the cross entropy.
        mix: of images and labels of a batch to those to train on, such as torchvision's MixUp.
        **resnet: of Detectron2's ResNet.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        input_format: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        zero_init: bool = True,
        label_smoothing: float = 0.0,
        mix: Callable | None = None,
        **resnet,
    ):
        super().__init__(num_classes=num_classes, **resnet)
        self.input_format = input_format
        self.label_smoothing, self.mix = label_smoothing, mix
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        if zero_init:
            zero_init_residual(self)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor] | torch.Tensor:
        """
        Args:
            batch: of each image ``"image"``, (3, H, W) uint8, all of one size, and for training its
                class, ``"label"``.

        Returns:
            in training the loss; else scores, (N, num_classes).
        """
        images = torch.stack([x["image"] for x in batch]).to(self.pixel_mean.device)
        images = (images - self.pixel_mean) / self.pixel_std
        if not self.training:
            return super().forward(images)["linear"]
        labels = torch.tensor([x["label"] for x in batch], device=images.device)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        scores = super().forward(images)["linear"]
        return {"loss_cls": F.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)}
