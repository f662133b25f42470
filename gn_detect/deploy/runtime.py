"""Runs a detector that gn_detect exported: ``python runtime.py model.onnx photo.jpg``.

This file needs NumPy, Pillow and ONNX Runtime alone; it may be copied beside the model.

The graph takes ``image``, (height, width, 3) uint8 RGB, resized as here, and gives, in its pixels
and sorted by score, ``boxes`` (N, 4) XYXY, ``scores`` (N,), ``classes`` (N,), and of models that
have them ``masks`` (N, M, M), probabilities within the boxes, and ``keypoints`` (N, K, 3) of x, y
and score. Its metadata, all JSON, say the rest.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, Union

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

AnyImage = Union[str, os.PathLike, np.ndarray, Image.Image]  # noqa: UP007  # an alias, at run time

_NEEDED = ("class_names", "min_size", "max_size", "static_size", "bit_depth_range")
_NEEDED += ("input_format", "pixel_mean")


class Detections(NamedTuple):
    """Objects in an image, sorted by score, in pixels of the image.

    ``boxes`` (N, 4) float32 XYXY, ``scores`` (N,) float32, ``classes`` (N,) int64; of models that
    have them ``masks`` (N, height, width) bool, and ``keypoints`` (N, K, 3) float32 of x, y, score.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None
    keypoints: np.ndarray | None = None


class Detector:
    """An exported detector.

    Args:
        path: of the ONNX file.
        providers: of ONNX Runtime; None for CUDA where it is available, and else the CPU.
        options: of ONNX Runtime, such as the number of threads.

    Attributes:
        class_names: in the order of ``Detections.classes``.
        metadata: all that the file says of the detector.

    Raises:
        ValueError: the file is no ONNX file, or not one of gn_detect.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        providers: Sequence[str] | None = None,
        options: ort.SessionOptions | None = None,
    ):
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise ValueError(f"{path} does not exist: name an ONNX file of tools/export.py")
        usable = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = providers or [p for p in usable if p in ort.get_available_providers()]
        try:
            self._session = ort.InferenceSession(path, options, providers=list(providers))
        except Exception as error:  # ONNX Runtime has no base class for them
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be run by ONNX Runtime ({reason})") from None
        found = self._session.get_modelmeta()
        if found.producer_name != "gn_detect":
            raise ValueError(
                f"{path} was written by {found.producer_name or 'an unknown program'}, not by "
                "gn_detect: export the weights by its tools/export.py"
            )
        values = found.custom_metadata_map
        try:
            self.metadata = {name: json.loads(values[name]) for name in (*_NEEDED, *values)}
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{path} has lost metadata, or has others than gn_detect gives ({error!r}), as "
                "after an optimizer: export the weights again, and keep metadata_props"
            ) from None
        self.class_names: list[str] = self.metadata["class_names"]

    def __call__(self, image: AnyImage) -> Detections:
        """Detect objects.

        Args:
            image: of :meth:`read`.

        Raises:
            ValueError: it cannot be read, or is of another kind.
        """
        pixels = self.read(image)
        height, width = pixels.shape[:2]
        resized, (scale_y, scale_x) = self._resize(pixels)
        names = [output.name for output in self._session.get_outputs()]
        outputs = self._session.run(None, {"image": resized})
        found = Detections(**dict(zip(names, outputs, strict=True)))
        found.boxes[:, 0::2] = (found.boxes[:, 0::2] * scale_x).clip(0, width)
        found.boxes[:, 1::2] = (found.boxes[:, 1::2] * scale_y).clip(0, height)
        if found.keypoints is not None:
            found.keypoints[:, :, :2] *= np.float32([scale_x, scale_y])
        inside = (found.boxes[:, :2] < found.boxes[:, 2:]).all(axis=1)
        found = Detections(*(None if value is None else value[inside] for value in found))
        if found.masks is None:
            return found
        masks = np.zeros((len(found.boxes), height, width), dtype=bool)
        for mask, box, probability in zip(masks, found.boxes, found.masks, strict=True):
            paste(mask, box, probability)
        return found._replace(masks=masks)

    def read(self, image: AnyImage) -> np.ndarray:
        """(height, width, 3) uint8 RGB.

        Args:
            image: a path or an image of Pillow, whose EXIF orientation is applied, and of which one
                channel of 16 bits, or of floats, is scaled to 8 as the metadata
                ``bit_depth_range`` say (empty: all 16 bits, or 0 to 1), and colors of 16 bits are
                cut to 8; or an array of RGB pixels, (height, width, 3) uint8, or (height, width) of
                gray ones.

        Raises:
            ValueError: it cannot be read, or is of another kind.
        """
        if isinstance(image, (str, os.PathLike)):
            try:
                with Image.open(image) as opened:
                    return self.read(opened)
            except ValueError:
                raise
            except Exception as error:  # anything, in Pillow
                raise ValueError(f"cannot read the image {os.fspath(image)} ({error})") from None
        if isinstance(image, Image.Image):
            deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
            full = 1 if image.mode == "F" else 65535
            image = ImageOps.exif_transpose(image)
            if deep:
                values = np.asarray(image, dtype=np.float64)
                low, high = self.metadata["bit_depth_range"] or (0, full)
                if not low <= values.min() <= values.max() <= high:
                    raise ValueError(
                        f"the image has values of {values.min():g} to {values.max():g}, beyond the "
                        f"{low:g} to {high:g} that the detector was trained on"
                    )
                values = (values - low) * (255 / (high - low))
                image = Image.fromarray(np.rint(values).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
        image = np.asarray(image)
        gray, color = image.ndim == 2, image.ndim == 3 and image.shape[2] == 3
        if image.dtype != np.uint8 or not (gray or color) or 0 in image.shape:
            raise ValueError(
                f"an array of {image.dtype} {image.shape} is no image; give RGB pixels, uint8 of 0 "
                "to 255, (height, width, 3), or (height, width) of gray ones"
            )
        return np.repeat(image[..., None], 3, axis=2) if gray else image

    def _resize(self, pixels: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """What the graph takes, and how many pixels of the image one of its is, in y and x."""
        size, (height, width) = self.metadata["static_size"], pixels.shape[:2]
        if size:  # fits into it; the rest is of the mean color, which becomes 0
            scale = min(size[0] / height, size[1] / width)
            new_height, new_width = height * scale, width * scale
        else:  # as Detectron2's ResizeShortestEdge
            scale = (self.metadata["min_size"] or min(height, width)) / min(height, width)
            new_height, new_width = height * scale, width * scale
            if self.metadata["min_size"]:
                scale = min(1, self.metadata["max_size"] / max(new_height, new_width))
                new_height, new_width = new_height * scale, new_width * scale
        new_height, new_width = max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))
        resized = Image.fromarray(pixels).resize((new_width, new_height), Image.BILINEAR)
        resized = np.asarray(resized)
        if size:
            mean = np.rint(self.metadata["pixel_mean"]).astype(np.uint8)
            if self.metadata["input_format"] == "BGR":
                mean = mean[::-1]
            canvas = np.full((*size, 3), mean)
            canvas[:new_height, :new_width] = resized
            resized = canvas
        return resized, (height / new_height, width / new_width)


def paste(mask: np.ndarray, box: np.ndarray, probability: np.ndarray) -> None:
    """Set the pixels of an object: where its probability, bilinear between the centers of its cells
    and 0 beyond the box, is 1/2 or more, as Detectron2's ``paste_masks_in_image``.

    Args:
        mask: (height, width) bool, of False; changed.
        box: (4,) float32 XYXY.
        probability: (M, M) float32, within the box.
    """
    height, width = mask.shape
    x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(box[2:]).astype(int) + 1, (width, height))
    places = []
    for first, last, low, high, count in (
        (y0, y1, *box[1::2], probability.shape[0]),
        (x0, x1, *box[::2], probability.shape[1]),
    ):  # rounded as PyTorch's grid_sample rounds
        centers = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
        position = (((centers - low) / (high - low) * 2 - 1) + 1) * (count / 2) - 0.5
        position = position.clip(-1, count)
        cell = np.minimum(np.floor(position), count - 1)
        places.append((cell.astype(int) + 1, 1 - (position - cell), position - cell))
    (y, top, bottom), (x, left, right) = places
    cells = np.pad(probability, 1)  # with what is beyond the box
    upper, lower = cells[y], cells[y + 1]
    values = upper[:, x] * (top[:, None] * left)
    values += upper[:, x + 1] * (top[:, None] * right)
    values += lower[:, x] * (bottom[:, None] * left)
    values += lower[:, x + 1] * (bottom[:, None] * right)
    mask[y0:y1, x0:x1] = values >= 0.5


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        sys.exit("usage: python runtime.py MODEL.onnx IMAGE...")
    try:
        detector = Detector(arguments[0])
        for name in arguments[1:]:
            for line in to_json(detector(name), detector.class_names):
                print(json.dumps({"image": name, **line}))
    except ValueError as error:
        sys.exit(f"error: {error}")


def to_json(found: Detections, class_names: Sequence[str]) -> list[dict]:
    """An object each; the mask as the uncompressed run lengths of COCO."""
    lines = []
    for i, (box, score, label) in enumerate(zip(*found[:3], strict=True)):
        line = {"class": class_names[label], "score": float(score), "box": box.tolist()}
        if found.masks is not None:
            pixels = np.concatenate([[False], found.masks[i].ravel(order="F"), [False]])
            ends = np.flatnonzero(pixels[1:] != pixels[:-1])
            counts = np.diff([0, *ends.tolist(), found.masks[i].size]).tolist()
            line["mask"] = {"size": list(found.masks[i].shape), "counts": counts}
        if found.keypoints is not None:
            line["keypoints"] = found.keypoints[i].tolist()
        lines.append(line)
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
