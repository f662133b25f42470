"""What of a batch is image.

Images of different sizes are padded with zeros to one, at the right and at the bottom. Statistics
that count the padding depend on the batch, and so does what a bias or beta makes of it, which the
next convolution reads at the border of an image.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MAX_STRIDE = 2**12


class Extents:
    """The parts of a batch, or of maps of it, that belong to its images, at their top left.

    Args:
        sizes: height and width of each image.
        height, width: of the batch.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], height: int, width: int):
        self.sizes = tuple((h, w) for h, w in sizes)
        self.height, self.width = height, width
        self._of_maps: dict[tuple[int, int], Extents] = {}
        self._tensors: dict[tuple, Tensor] = {}

    @property
    def padded(self) -> bool:
        """Whether there is anything beside the images. A trace is for images of any size."""
        whole = self.height, self.width
        return torch.jit.is_tracing() or any(size != whole for size in self.sizes)

    def of(self, height: int, width: int) -> Extents:
        """Those of maps of this size, ``ceil(size / stride)``.

        Raises:
            ValueError: no stride, a power of 2, takes the batch to this size.
        """
        key, batch = (int(height), int(width)), (int(self.height), int(self.width))
        if key not in self._of_maps:
            stride = 1
            while tuple(_divided(side, stride) for side in batch) != key:
                stride *= 2
                if stride > _MAX_STRIDE:
                    raise ValueError(
                        f"no power of 2 is the stride of maps of {key[0]} x {key[1]} from images "
                        f"padded to {batch[0]} x {batch[1]}, so that nobody knows what of them is "
                        "padding; set MODEL.GN.MASK_PADDING to False"
                    )
            sizes = [(_divided(h, stride), _divided(w, stride)) for h, w in self.sizes]
            self._of_maps[key] = Extents(sizes, height, width)
        return self._of_maps[key]

    def tensor(self, device: torch.device) -> Tensor:
        """(N, 2) int32: rows and columns of each image."""
        return self._on(device, torch.int32, lambda: torch.tensor(self.sizes, dtype=torch.int32))

    def mask(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(N, 1, H, W): 1 where there is image, else 0."""
        ones = (torch.ones(1, 1, h, w, dtype=dtype) for h, w in self.sizes)
        return self._on(device, dtype, lambda: join(list(ones), self.height, self.width))

    def _on(self, device: torch.device, dtype: torch.dtype, build: Callable[[], Tensor]) -> Tensor:
        if (device, dtype) not in self._tensors:
            tensor = build()
            # From pinned memory, so that nobody waits for the device. A fake tensor has none.
            pin = device.type == "cuda" and type(tensor) is Tensor and not _is_captured()
            tensor = (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin)
            self._tensors[device, dtype] = tensor
        return self._tensors[device, dtype]

    def crops(self, x: Tensor) -> list[Tensor]:
        """What is image of a map (N, C, H, W): each (1, C, h, w), or all (N, C, h, w) where they
        have one size."""
        alike = len(set(self.sizes)) == 1
        return crop([len(self.sizes)] if alike else [1] * len(self.sizes), self.sizes, x)

    def join(self, crops: Sequence[Tensor]) -> Tensor:
        """The map (N, C, H, W) of its :meth:`crops`, with zeros around them."""
        return join(crops, self.height, self.width)


def _divided(size: int, stride: int) -> int:
    """Rounded up; ONNX, to which this is traced, divides negative numbers otherwise."""
    return (size + stride - 1) // stride


def _resize(x: Tensor, height: int, width: int) -> Tensor:
    """Cut off, or pad with zeros, at the right and at the bottom; contiguous as ``x`` is."""
    h, w = x.shape[-2:]
    if not torch.jit.is_tracing() and (h, w) == (height, width):
        return x
    return F.pad(x, (0, width - w, 0, height - h))


def crop(numbers: Sequence[int], sizes: Sequence[Sequence[int]], x: Tensor) -> list[Tensor]:
    """Of a map (N, C, H, W) the top left of so many images each, in sizes of their own: maps
    (n, C, h, w)."""
    if not _is_captured():
        return list(_Crop.apply(numbers, sizes, x))
    parts = [x] if len(numbers) == 1 else x.split(numbers)
    return [_resize(part, *size) for part, size in zip(parts, sizes, strict=False)]


def join(crops: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Of maps (n, C, h, w) one (N, C, height, width), with zeros around them."""
    if not _is_captured():
        alone = len(crops) == 1 and crops[0].shape[-2:] == (height, width)
        return crops[0] if alone else _Join.apply(height, width, *crops)
    padded = [_resize(crop, height, width) for crop in crops]
    return padded[0] if len(padded) == 1 else torch.cat(padded)


def _is_captured() -> bool:
    """Whether a graph is made, which is to have operations of PyTorch alone."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


class _Crop(torch.autograd.Function):
    """Its gradient is a join, and that of a join are crops: each a pass over what is image, where
    autograd would pad, split and add whole maps."""

    @staticmethod
    def forward(ctx, numbers, sizes, x):
        ctx.size = x.shape[-2:]
        parts = zip(x.split(numbers), sizes, strict=False)
        return tuple(p if (h, w) == ctx.size else p[..., :h, :w].clone() for p, (h, w) in parts)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, join(gradients, *ctx.size)


class _Join(torch.autograd.Function):
    """See :class:`_Crop`."""

    @staticmethod
    def forward(ctx, height, width, *crops):
        ctx.numbers, ctx.sizes = [len(crop) for crop in crops], [crop.shape[-2:] for crop in crops]
        nchw, nhwc = (
            all(crop.is_contiguous(memory_format=layout) for crop in crops)
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        joined = torch.empty(
            (sum(ctx.numbers), crops[0].shape[1], height, width),
            dtype=crops[0].dtype,
            device=crops[0].device,
            memory_format=torch.channels_last if nhwc and not nchw else torch.contiguous_format,
        )
        for part, one in zip(joined.split(ctx.numbers), crops, strict=True):
            h, w = one.shape[-2:]
            part[..., :h, :w] = one
            part[..., h:, :] = 0
            part[..., :h, w:] = 0
        return joined

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *crop(ctx.numbers, ctx.sizes, gradient)


class _Extend(torch.autograd.Function):
    """:func:`extend_images` of a map (N, C, H, W), and its gradient, whose gradient it is."""

    @staticmethod
    def forward(ctx, sizes, x):
        ctx.sizes, extended = sizes, x.clone()
        for image, (h, w) in zip(extended, sizes, strict=True):
            image[:, h:] = image[:, h - 1 : h]
            image[..., w:] = image[..., w - 1 : w]
        return extended

    @staticmethod
    def backward(ctx, gradient):
        return None, _Fold.apply(ctx.sizes, gradient)


class _Fold(torch.autograd.Function):
    """See :class:`_Extend`."""

    @staticmethod
    def forward(ctx, sizes, gradient):
        ctx.sizes, folded = sizes, gradient.clone()
        for image, (h, w) in zip(folded, sizes, strict=True):
            image[..., w - 1] += image[..., w:].sum(-1)
            image[..., w:] = 0
            image[:, h - 1] += image[:, h:].sum(1)
            image[:, h:] = 0
        return folded

    @staticmethod
    def backward(ctx, gradient):
        return None, _Extend.apply(ctx.sizes, gradient)


# False: outside of any batch.
_current: contextvars.ContextVar[Extents | None | bool] = contextvars.ContextVar(
    "extents", default=False
)


@contextlib.contextmanager
def images_in_batch(extents: Extents | None = None) -> Iterator[None]:
    """Within it, layers find what of their maps is image: ``extents`` of the batch, or those that
    :func:`set_images` tells."""
    token = _current.set(extents)
    try:
        yield
    finally:
        _current.reset(token)


def set_images(extents: Extents) -> None:
    """Tell the extents of the batch, within :func:`images_in_batch`. Outside, where they would be
    those of all that comes later, they are left out."""
    if _current.get() is not False:
        _current.set(extents)


def current() -> Extents | None:
    """Of the batch in work."""
    return _current.get() or None


def extents_of(x: Tensor) -> Extents | None:
    """What is image of a map (N, C, H, W); None where all is, or nobody told.

    Raises:
        ValueError: N is not the number of images in the batch, or see :meth:`Extents.of`.
    """
    extents = current()
    if extents is None or not extents.padded:
        return None
    if not torch.jit.is_tracing() and x.shape[0] != len(extents.sizes):
        raise ValueError(
            f"a map of {x.shape[0]} images, where the batch has {len(extents.sizes)}: nobody knows "
            "what of it is padding (MODEL.GN.MASK_PADDING)"
        )
    here = extents.of(*x.shape[-2:])
    return here if here.padded else None  # as small maps may not be


def mask_padding(x: Tensor) -> Tensor:
    """A map (N, C, H, W) with zeros in its padding."""
    extents = extents_of(x)
    return x if extents is None else x * extents.mask(x.device, x.dtype)


def extend_images(x: Tensor) -> Tensor:
    """A map whose padding has the values at the border of its image, as interpolation sees an image
    alone."""
    extents = extents_of(x)
    if extents is None:
        return x
    if not _is_captured():
        return _Extend.apply(extents.sizes, x)
    h, w = x.shape[-2:]
    crops = extents.crops(x)
    sides = [(0, w - crop.shape[-1], 0, h - crop.shape[-2]) for crop in crops]
    extended = [F.pad(c, s, mode="replicate") for c, s in zip(crops, sides, strict=True)]
    return torch.cat(extended).to(x.dtype)  # which autocast changes


def per_image(
    function: Callable[[Tensor], Tensor], x: Tensor, size: Callable[[int], int]
) -> Tensor:
    """``function`` of what is image of a map, with zeros around the results.

    Args:
        function: of a map (N, C, h, w).
        size: of h, or w, the size of its result.
    """
    extents = extents_of(x)
    if extents is None:
        return mask_padding(function(x))  # which may be larger
    found = [function(crop) for crop in extents.crops(x)]
    # A result may be larger than its image: on a coarse map, images of several sizes have one.
    return mask_padding(join(found, *map(size, x.shape[-2:])))
