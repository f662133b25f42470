"""An exported detector, as a :class:`gn_detect.Predictor`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from gn_detect.config import ConfigError
from gn_detect.predict.pixels import AnyImage, read_rgb


class OnnxPredictor:
    """A detector that ``tools/export.py`` has written, run by ONNX Runtime.

    Args:
        path: of the ONNX file.
        device: ``"cpu"`` or ``"cuda"``; None for CUDA where ONNX Runtime has it.

    Raises:
        ConfigError: it is no such file, or ONNX Runtime lacks the device.
    """

    def __init__(self, path: str | os.PathLike, device: str | None = None):
        try:
            import onnxruntime

            from .runtime import Detector
        except ImportError as error:
            raise ConfigError(
                f"{path}: ONNX Runtime runs it, which cannot be imported ({error}): pip install "
                "onnxruntime"
            ) from None
        usable = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
        available = onnxruntime.get_available_providers()
        known = {name: provider for name, provider in usable.items() if provider in available}
        if device and device not in known:
            raise ConfigError(
                f"device (--device) {device}: ONNX Runtime has {', '.join(known)} here"
            )
        try:
            self._detector = Detector(path, [known[device]] if device else None)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        metadata = self._detector.metadata
        self.class_names = self._detector.class_names
        self.keypoint_names = metadata.get("keypoint_names", [])
        self.bit_depth_range = tuple(metadata["bit_depth_range"])

    def __call__(self, images: AnyImage | list[AnyImage]) -> Instances | list[Instances]:
        if not isinstance(images, (list, tuple)):
            return next(self.stream([images]))
        return list(self.stream(images))

    def stream(self, images: Iterable[AnyImage]) -> Iterator[Instances]:
        for image in images:
            pixels = self.read(image)
            found, result = self._detector(pixels), Instances(pixels.shape[:2])
            result.pred_boxes = Boxes(torch.from_numpy(found.boxes))
            result.scores = torch.from_numpy(found.scores)
            result.pred_classes = torch.from_numpy(found.classes)
            if found.masks is not None:
                result.pred_masks = torch.from_numpy(found.masks)
            if found.keypoints is not None:
                result.pred_keypoints = torch.from_numpy(found.keypoints)
            yield result

    def read(self, image: AnyImage, **options) -> np.ndarray:
        """:func:`gn_detect.predict.pixels.read_rgb`, with the range of the detector's training."""
        return read_rgb(image, bit_depth_range=self.bit_depth_range, **options)
