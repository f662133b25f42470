"""What of a batch is image: images of different sizes are padded with zeros to one, at the right and
at the bottom. Statistics that count the padding depend on the batch, and so does what beta makes of
it, which the next convolution reads at the border of an image."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Extents:
    """The parts of the maps in a batch, at their top left, that belong to its images.

    Args:
        sizes: height and width of each image, in pixels or positions of a map.
        height, width: of the batch.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], height: int, width: int):
        self.sizes = tuple((h, w) for h, w in sizes)
        self.height, self.width = height, width
        self._of_maps: dict[tuple[int, int], Extents] = {}
        self._tensors: dict[object, Tensor] = {}

    @property
    def padded(self) -> bool:
        """Whether there is anything beside the images."""
        return any(size != (self.height, self.width) for size in self.sizes)

    def of(self, x: Tensor) -> Extents:
        """Those of a map (N, C, H, W) of the batch, ``ceil(size / stride)``.

        Raises:
            ValueError: N is not the number of images, or no stride, a power of 2, takes the batch
                to H x W.
        """
        n, (height, width) = x.shape[0], x.shape[-2:]
        key = int(height), int(width)
        if key not in self._of_maps:
            stride = 1
            while (-(-self.height // stride), -(-self.width // stride)) != key and stride < 4096:
                stride *= 2
            self._of_maps[key] = Extents(
                [(-(-h // stride), -(-w // stride)) for h, w in self.sizes], *key
            )
            if stride == 4096:
                raise ValueError(
                    f"a map of {key[0]} x {key[1]} is of no power of 2 as the stride of images "
                    f"padded to {self.height} x {self.width}: MODEL.GN.MASK_PADDING cannot say what "
                    "of it is padding; set it to False"
                )
        if n != len(self.sizes):
            raise ValueError(
                f"a map of {n} images in a batch of {len(self.sizes)}: its padding is not known "
                "(MODEL.GN.MASK_PADDING)"
            )
        return self._of_maps[key]

    def tensor(self, device: torch.device) -> Tensor:
        """(N, 2) int32: rows and columns."""
        return self._cached((device,), lambda: torch.tensor(self.sizes, dtype=torch.int32))

    def mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(N, 1, H, W), 1 where there is image, else 0."""

        def build() -> Tensor:
            ones = (torch.ones(1, 1, *size, dtype=dtype) for size in self.sizes)
            return torch.cat([self.pad(one, *one.shape[-2:]) for one in ones])

        return self._cached((device, dtype), build)

    def _cached(self, key: tuple, build) -> Tensor:
        if key not in self._tensors:
            # From pinned memory, so that nobody waits for the device.
            built, cuda = build(), key[0].type == "cuda"
            self._tensors[key] = built.pin_memory().to(key[0], non_blocking=True) if cuda else built
        return self._tensors[key]

    def crops(self, x: Tensor) -> list[Tensor]:
        """Each image of a map alone, (1, C, h, w); one (N, C, h, w) where all have one size."""
        alike = len(set(self.sizes)) == 1
        images = [x] if alike else x.split(1)
        return [self.pad(image, h, w, -1) for image, (h, w) in zip(images, self.sizes)]

    def join(self, crops: Sequence[Tensor]) -> Tensor:
        """The map (N, C, H, W) of its :meth:`crops`, with zeros around them."""
        padded = [self.pad(crop, *crop.shape[-2:]) for crop in crops]
        return padded[0] if len(padded) == 1 else torch.cat(padded)

    def pad(self, x: Tensor, h: int, w: int, sign: int = 1) -> Tensor:
        if (h, w) == (self.height, self.width):
            return x
        return F.pad(x, (0, sign * (self.width - w), 0, sign * (self.height - h)))


_current: contextvars.ContextVar[Extents | None] = contextvars.ContextVar("extents", default=None)


@contextlib.contextmanager
def images_in_batch(extents: Extents | None = None) -> Iterator[None]:
    """Within it, layers find the extents of the images of their maps; those that
    :func:`set_images` says, if None."""
    token = _current.set(extents)
    try:
        yield
    finally:
        _current.reset(token)


def set_images(extents: Extents) -> None:
    """Of the batch in work, within :func:`images_in_batch`."""
    _current.set(extents)


def current() -> Extents | None:
    return _current.get()


def extents_of(x: Tensor) -> Extents | None:
    """Of the images in a map (N, C, H, W); None where it has no padding."""
    extents = _current.get()
    return extents.of(x) if extents is not None and extents.padded else None


def mask_padding(x: Tensor) -> Tensor:
    """A map with zeros in its padding."""
    extents = extents_of(x)
    return x if extents is None else x * extents.mask(x.device, x.dtype)
