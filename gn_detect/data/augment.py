"""Augmentation for few images, beside the mapper's: simple copy-paste and colour jitter, which the
end of a run closes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.data import MapDataset
from detectron2.structures import BitMasks, Instances
from torch.utils.data import Dataset

from gn_detect.config import ConfigError

# Fewer of its pixels than this are left of an object that is hidden: it is no longer one.
_MIN_VISIBLE = 0.1
# ITU-R BT.601, by INPUT.FORMAT.
_LUMA = {"RGB": (0.299, 0.587, 0.114), "BGR": (0.114, 0.587, 0.299), "L": (1.0,)}


class AugmentedDataset(Dataset):
    """The samples of a mapper, with more augmentation: ``self[i]`` of the image ``i``; ``self[~i]``
    is what the mapper makes of it alone.

    Args:
        dicts: in Detectron2's format.
        mapper: as Detectron2's DatasetMapper; maps the images that objects are taken from, too, so
            that they are scaled and flipped on their own.
        copy_paste: paste objects of another image (:func:`paste`): a random subset, which may be
            empty, of those that are no crowd regions.
        color_jitter: the strength of :func:`jitter_colors`; 0 for none.

    Raises:
        ConfigError: an argument has no such value, or the samples have what cannot be pasted.
    """

    def __init__(
        self,
        dicts: Sequence[dict],
        mapper: Callable[[dict], dict | None],
        *,
        copy_paste: bool,
        color_jitter: float,
    ):
        self.dicts = dicts
        self.mapper = mapper
        self.samples = MapDataset(dicts, mapper)
        self.copy_paste = copy_paste
        self.color_jitter = color_jitter
        self.image_format = getattr(mapper, "image_format", None)
        self._check()

    def _check(self) -> None:
        name = "INPUT.COLOR_JITTER (in lazy configs dataloader.train.color_jitter)"
        if not 0 <= self.color_jitter < 1:
            raise ConfigError(
                f"{name} is {self.color_jitter}; it must be a strength of at least 0 and below 1"
            )
        if self.color_jitter and self.image_format not in _LUMA:
            raise ConfigError(
                f"{name} is {self.color_jitter}, which is for images in {', '.join(_LUMA)}, and "
                f"INPUT.FORMAT is {self.image_format}; set it to 0"
            )
        if not self.copy_paste:
            return
        for attribute, without, what, key in (
            ("use_instance_mask", False, "cuts objects out by their masks", "MODEL.MASK_ON False"),
            ("use_keypoint", True, "does not know which keypoints it hides", "MODEL.KEYPOINT_ON"),
            ("proposal_topk", True, "needs proposals of its objects", "MODEL.LOAD_PROPOSALS"),
        ):
            if bool(getattr(self.mapper, attribute, not without)) == without:
                raise ConfigError(
                    "INPUT.COPY_PASTE.ENABLED (in lazy configs dataloader.train.copy_paste) is "
                    f"True, but copy-paste {what}, and the config has {key}; set it to False"
                )

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> dict:
        if index < 0:
            return self.samples[~index]
        sample = self._jittered(self.samples[index])
        if self.copy_paste and (donor := self._donor(index)):
            paste(sample, self._jittered(donor))
        return sample

    def _donor(self, index: int) -> dict | None:
        """A sample of another image, at random, with some of its objects; None if with none."""
        donor = self.dicts[(index + np.random.randint(1, max(2, len(self)))) % len(self)]
        objects = [a for a in donor.get("annotations", ()) if not a.get("iscrowd", 0)]
        number = np.random.randint(len(objects) + 1)
        if not number:
            return None
        chosen = np.random.choice(len(objects), number, replace=False)
        # Only these, before the mapper decodes and transforms their masks.
        return self.mapper({**donor, "annotations": [objects[i] for i in chosen]})

    def _jittered(self, sample: dict) -> dict:
        if self.color_jitter:
            sample["image"] = jitter_colors(sample["image"], self.color_jitter, self.image_format)
        return sample


def paste(sample: dict, donor: dict) -> None:
    """Paste the objects of ``donor`` into ``sample``, in place, as Ghiasi et al.
    (https://arxiv.org/abs/2012.07177, section 3) do: without blending; masks and boxes of what
    they hide become those of the visible part, and what is hidden nearly whole is left out.

    Both are samples as Detectron2's DatasetMapper makes them: ``image`` (C, H, W) in uint8,
    ``instances`` with masks, perhaps ``sem_seg`` (H, W). Where the donor is smaller it is put
    anywhere, where it is larger a random part of it is taken; with large-scale jitter, if it pads,
    both are of one size. Masks become bitmaps.
    """
    size = sample["image"].shape[1:]
    here, there = [...], [...]  # where they lie over each other, in the sample and in the donor
    for length, other in zip(size, donor["image"].shape[1:], strict=True):
        low, high = sorted((0, length - other))
        start = np.random.randint(low, high + 1)
        here.append(slice(max(start, 0), start + other))
        there.append(slice(max(-start, 0), length - start))
    here, there = tuple(here), tuple(there)

    whole = _bitmaps(donor["instances"])
    pasted = torch.zeros(len(whole), *size, dtype=torch.bool)
    pasted[here] = whole[there]
    pasted = _visible(donor["instances"], whole, pasted)
    hides = pasted.gt_masks.tensor.any(0)
    behind = _bitmaps(sample["instances"])
    behind = _visible(sample["instances"], behind, behind & ~hides)
    sample["instances"] = Instances.cat([behind, pasted])

    for name in ("image", "sem_seg"):
        if name in sample:
            image = sample[name].clone()  # it may be the memory of another
            image[here] = torch.where(hides[here], donor[name][there], image[here])
            sample[name] = image


def _bitmaps(instances: Instances) -> torch.Tensor:
    """The masks, (N, H, W) in bool, as polygons or bitmaps; of no objects, Detectron2 has none."""
    masks = instances.get_fields().get("gt_masks")
    if masks is None:
        return torch.zeros(0, *instances.image_size, dtype=torch.bool)
    if not isinstance(masks, BitMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor


def _visible(instances: Instances, whole: torch.Tensor, masks: torch.Tensor) -> Instances:
    """``instances`` with ``masks`` (N, H, W), which are what is left of those in ``whole``, without
    those of which little is."""
    # Many times as fast as a sum in torch.
    before, after = (torch.tensor([*map(np.count_nonzero, m.numpy())]) for m in (whole, masks))
    boxes = instances.gt_boxes.clone()
    changed = (before != after) | (whole.shape != masks.shape)  # cut, or put elsewhere
    boxes.tensor[changed] = BitMasks(masks[changed]).get_bounding_boxes().tensor
    fields = {**instances.get_fields(), "gt_boxes": boxes, "gt_masks": BitMasks(masks)}
    return Instances(masks.shape[1:], **fields)[(after > 0) & (after >= _MIN_VISIBLE * before)]


def jitter_colors(image: torch.Tensor, strength: float, image_format: str) -> torch.Tensor:
    """Change brightness, contrast and saturation by random factors within ``1 +- strength``, and
    the hue by a tenth of that share of a turn.

    They are what torchvision's ColorJitter does, as one affine map of the colours: it takes a
    twentieth of the time (hue: a rotation about the axis of grays), and clips once.

    Args:
        image: (C, H, W) in uint8.
        image_format: the order of its channels, "RGB", "BGR" or "L".
    """
    luma = torch.tensor([_LUMA[image_format]])
    channels = luma.shape[1]
    brightness, contrast, saturation = 1 + np.random.uniform(-strength, strength, 3)
    turn = 2 * np.pi * np.random.uniform(-strength, strength) / 10
    pixels = image.flatten(1).float()
    matrix = saturation * torch.eye(channels) + (1 - saturation) * luma
    if channels == 3:
        axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
        matrix = torch.linalg.matrix_exp(turn * axis) @ matrix
    gray = luma @ pixels.mean(1, keepdim=True)
    pixels = torch.addmm(brightness * (1 - contrast) * gray, brightness * contrast * matrix, pixels)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).view_as(image)
