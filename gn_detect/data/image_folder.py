"""Images for classification, in a folder for each class (torchvision's ``ImageFolder``), in the
loaders of detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torchvision.datasets import ImageFolder

from gn_detect.config import ConfigError

from . import DataError
from .images import read_image


def read_image_folder(root: str) -> list[dict]:
    """The images below ``root``, in Detectron2's format: ``"file_name"``, and ``"label"``, the
    place of the class among the sorted names of the folders.

    Raises:
        DataError: ``root`` is no such folder, or a class has no images.
    """
    try:
        samples = ImageFolder(root).samples
    except OSError as error:
        raise DataError(
            f"{root}: {error.strerror or error}; it must have a folder of images for each class"
        ) from None
    return [{"file_name": file, "label": label} for file, label in samples]


class ClassificationMapper:
    """Reads an image and augments it.

    Args:
        augmentations: of (3, H, W) uint8, RGB, one after the other, to one size: those of
            ``torchvision.transforms.v2``.
        image_format: of the result, ``"BGR"`` or ``"RGB"``.

    Raises:
        ConfigError: ``image_format`` is neither.
    """

    def __init__(self, augmentations: Sequence[Callable], image_format: str = "BGR"):
        if image_format not in ("BGR", "RGB"):
            raise ConfigError(f"image_format of a classifier is {image_format!r}; known: BGR, RGB")
        self.augmentations = list(augmentations)
        self.image_format = image_format

    def __call__(self, dataset_dict: dict) -> dict:
        """``dataset_dict`` with ``"image"``, (3, H, W) uint8.

        Raises:
            DataError: the image cannot be decoded.
        """
        pixels = read_image(dataset_dict["file_name"], "RGB")
        image = torch.tensor(pixels).permute(2, 0, 1).contiguous()
        for augment in self.augmentations:
            image = augment(image)
        return {**dataset_dict, "image": image.flip(0) if self.image_format == "BGR" else image}
