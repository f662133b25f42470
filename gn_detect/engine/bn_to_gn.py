"""Weights of a detector with BN for the same detector with GN: convolutions kept, gamma and beta
of each GN layer set so that its output has BN's mean and variance, channel by channel."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import FPN
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from gn_detect.checkpoint import Origin, WeightGuards
from gn_detect.checkpoint.weight_guards import norms_of
from gn_detect.config import ConfigError
from gn_detect.data import DataError
from gn_detect.data.images import read_image
from gn_detect.settings import Settings

from .bn_match import Pair, load_pair
from .prepare import resolve_device

METHODS = ("calibrated", "copied", "plain")
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_BEST = 100  # proposals of an image, for mask and keypoint heads where nothing is detected
_MIN_VARIANCE = 1e-10  # of a channel of normalized values; below it the channel is a constant


@dataclasses.dataclass
class Conversion:
    """What :func:`convert` made.

    Attributes:
        weights: name -> tensor on the CPU, for the model of the GN config. What the BN weights do
            not hold is left out, so that it starts afresh.
        origin: of these weights.
        errors: method -> output of the backbone -> relative L2 error, |GN - BN| / |BN|, on the
            images that were held out.
        calibrated: the names of the GN layers that were BN, or had no norm.
        fresh: the parts with GN layers that start afresh.
        num_images: to calibrate on, and held out.
    """

    weights: dict[str, torch.Tensor]
    origin: Origin
    errors: dict[str, dict[str, float]]
    calibrated: list[str]
    fresh: list[str]
    num_images: tuple[int, int]


def read_images(directory: str, num_images: int, cfg: CfgNode) -> list[torch.Tensor]:
    """Read images spread evenly over a directory, cut to one size.

    Each is scaled to ``INPUT.MIN_SIZE_TEST`` on its short side, and the square in its middle is
    taken, rounded down to a multiple of 32. So all make one batch without padding, which would
    count in GN's statistics, as it does not where a detector sees one image at a time.

    Returns:
        float32 tensors (3, S, S), 0 to 255, channels as ``INPUT.FORMAT`` says.

    Raises:
        ConfigError: the size is too small.
        DataError: there are, or are to be, fewer than 2 images; or one cannot be read.
    """
    size = cfg.INPUT.MIN_SIZE_TEST // 32 * 32
    if size < 32:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TEST is {cfg.INPUT.MIN_SIZE_TEST}; to calibrate, set 32 pixels or more"
        )
    if not Path(directory).is_dir():
        raise DataError(f"--images: there is no directory {directory}")
    files = sorted(f for f in Path(directory).iterdir() if f.suffix.lower() in _IMAGES)
    count = min(num_images, len(files))
    if count < 2:
        raise DataError(
            f"--images: {directory} holds {len(files)} images ({', '.join(_IMAGES)}), and "
            f"--num-images is {num_images}; at least 2 are needed: one is held out"
        )
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, sys.maxsize)
    images = []
    for file in (files[i * len(files) // count] for i in range(count)):
        depth = cfg.INPUT.BIT_DEPTH_RANGE
        image = read_image(str(file), cfg.INPUT.FORMAT, bit_depth_range=depth)
        # A long and thin image would become a huge one.
        image = _middle(image, 8 * min(image.shape[:2]))
        image = _middle(resize.get_transform(image).apply_image(image), size)
        images.append(torch.as_tensor(image.astype("float32").transpose(2, 0, 1)))
    return images


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    """At most ``size`` pixels of each side of (H, W, 3), in the middle."""
    top, left = (max(n - size, 0) // 2 for n in image.shape[:2])
    return image[top : top + size, left : left + size]


@torch.no_grad()
def convert(
    cfg: CfgNode, weights: str, images: list[torch.Tensor], method: str = "calibrated"
) -> Conversion:
    """Turn the weights of a network with BN into weights for the network of ``cfg``, with GN.

    The BN network is that of ``cfg`` with BN wherever the weights have it, and no norm where they
    have none. Both see the same batch, three quarters of the images. Where BN's output has mean M
    and variance V in a channel, over the batch and all positions, and the normalized values of GN
    have m and v, gamma is sqrt(V / v), with the sign of BN's gamma, and beta M - gamma m. One pass
    is enough: each layer is given its gamma and beta while it runs, so that those behind it see
    what they will. The box head sees the BN network's proposals, mask and keypoint heads its
    detections (where the weights have none to give, its best proposals). Where the weights have no
    RPN, res5 of C4 sees tiles of the image.

    BN's statistics are of the training set, GN's of each image and group, so this is not the same
    function, except where a group is one channel and the batch one image.

    Args:
        cfg: of the GN network; ``NUM_CLASSES`` may be None and then follows the weights.
        weights: any name of weights that ``MODEL.WEIGHTS`` takes.
        images: at least 2, of one size, as :func:`read_images` gives them.
        method: gamma and beta of the result: ``"calibrated"``; ``"copied"`` from BN; or
            ``"plain"``, 1 and 0.

    Raises:
        ConfigError: the weights are not of this network with BN, or give no finite features; or
            the config is not of GN.
        DataError: nothing is proposed in the images, on which RoI heads are to be calibrated.
    """
    cfg = cfg.clone()
    resolve_device(Settings(cfg))
    pair = load_pair(cfg, weights)
    source, target, layers = pair.source, pair.target, pair.layers

    held = range(3, len(images), 4) or [len(images) - 1]
    held_out = [images[i] for i in held]
    batch = [image for i, image in enumerate(images) if i not in held]
    with_fpn = isinstance(target.backbone, FPN) and "FPN" not in pair.lacking
    expected = _features(source, held_out, with_fpn)
    values = {
        "plain": {layer: (1.0, 0.0) for layer in layers},
        "copied": {layer: _affine(source.get_submodule(layer)) for layer in layers},
        "calibrated": _calibrate(pair, batch),
    }
    errors = {}
    for name, affine in values.items():
        _set_affine(target, affine)
        errors[name] = {
            output: float((x - expected[output]).norm() / expected[output].norm())
            for output, x in _features(target, held_out, with_fpn).items()
        }
    _set_affine(target, values[method])
    state = target.state_dict()
    affine = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    state = {name: state[name].cpu() for name in state if name in pair.kept or name in affine}
    origin = dataclasses.replace(WeightGuards.from_config(cfg).ours, **norms_of(target))
    return Conversion(state, origin, errors, layers, pair.fresh, (len(batch), len(held_out)))


def _calibrate(pair: Pair, batch: list[torch.Tensor]) -> dict[str, tuple]:
    """The gamma and beta of :func:`convert`; those of the GN network are lost."""
    source, target, layers = pair.source, pair.target, pair.layers
    images = source.preprocess_image([{"image": image} for image in batch])
    expected, values = {}, {}

    def record(layer: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        if len(output) == 0:  # RoIs
            return
        expected[layer] = _moments(output)
        if not expected[layer][0].isfinite().all():
            raise ConfigError(
                f"the output of {layer} in the BN network is not finite, or too large for its "
                "variance; the weights are damaged, or not of this network: try them with BN"
            )

    def adjust(layer: str, module: nn.Module, inputs: tuple) -> None:
        if len(inputs[0]) == 0:
            return
        variance, mean = expected[layer]
        v, m = _moments(F.group_norm(inputs[0], module.num_groups, eps=module.eps))
        gamma = torch.where(v > _MIN_VARIANCE, (variance / v).sqrt(), 0)
        sign, _ = _affine(source.get_submodule(layer))
        gamma = gamma.copysign(torch.as_tensor(sign, device=v.device))
        values[layer] = gamma, mean - gamma * m
        _set_affine(target, {layer: values[layer]})

    heads = any(layer.startswith("roi_heads.") for layer in layers)
    trained = any(name.startswith("roi_heads.box_predictor") for name in pair.kept)
    with _hooks("register_forward_hook", source, layers, record):
        features = source.backbone(images.tensor)
        if heads:
            proposals = _tiles(images)
            if "RPN" not in pair.lacking:
                proposals, _ = source.proposal_generator(images, features, None)
            if not any(map(len, proposals)):
                raise DataError(
                    "the BN network proposes no object in the images, so that no RoI head can be "
                    "calibrated; give other images"
                )
            best, inputs = _best(proposals), (images, features, proposals)
            boxes = _run_heads(
                source, inputs, lambda found: found if trained and any(map(len, found)) else best
            )
    with _hooks("register_forward_pre_hook", target, layers, adjust):
        features = target.backbone(images.tensor)
        if heads:
            _run_heads(target, (images, features, proposals), lambda _: boxes)
    return values


def _tiles(images: ImageList) -> list[Instances]:
    """Each image, its 4 quarters and their 16 quarters, as its proposals."""
    corners = [(n, x, y) for n in (1, 2, 4) for y in range(n) for x in range(n)]
    tiles = [(x / n, y / n, (x + 1) / n, (y + 1) / n) for n, x, y in corners]
    tiles = torch.tensor(tiles, device=images.device)
    return [
        Instances((h, w), proposal_boxes=Boxes(tiles * tiles.new_tensor([w, h, w, h])))
        for h, w in images.image_sizes
    ]


def _run_heads(model: nn.Module, inputs: tuple, boxes: Callable) -> list[Instances]:
    """Run box heads (res5 of C4) on images, features and proposals, and then all others on
    ``boxes(detections)``, which are returned, in place of the detections, on which they have run.
    """
    images, features, proposals = inputs
    heads = model.roi_heads
    if isinstance(heads, Res5ROIHeads):  # where no other has norms
        maps = [features[name] for name in heads.in_features]
        heads.res5(heads.pooler(maps, [p.proposal_boxes for p in proposals]))
        return []
    given = boxes(heads(images, features, proposals)[0])
    heads.forward_with_given_boxes(features, given)
    return given


def _best(proposals: list[Instances]) -> list[Instances]:
    """The best of each image as boxes of the first class."""
    best = [Instances(p.image_size, pred_boxes=p.proposal_boxes[:_BEST]) for p in proposals]
    for b in best:
        b.pred_classes = torch.zeros_like(b.pred_boxes.area(), dtype=torch.int64)
    return best


@contextlib.contextmanager
def _hooks(register: str, model: nn.Module, layers: list[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(layer, module, ...)`` at each layer; ``register`` is the method for it."""
    with contextlib.ExitStack() as handles:
        for layer in layers:
            method = getattr(model.get_submodule(layer), register)
            handles.enter_context(method(functools.partial(hook, layer)))
        yield


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and mean, (C,) each, of (N, C, *)."""
    return torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)


def _affine(norm: nn.Module) -> tuple:
    """Gamma and beta of a BN layer, or of the identity that stands for no norm."""
    return (1.0, 0.0) if isinstance(norm, nn.Identity) else (norm.weight, norm.bias)


def _set_affine(model: nn.Module, values: dict[str, tuple]) -> None:
    for layer, (gamma, beta) in values.items():
        norm = model.get_submodule(layer)
        norm.weight.copy_(torch.as_tensor(gamma).expand_as(norm.weight))
        norm.bias.copy_(torch.as_tensor(beta).expand_as(norm.bias))


def _features(model: nn.Module, images: list[torch.Tensor], with_fpn: bool) -> dict:
    """Outputs of the backbone: res2 to res5 under an FPN, then its own."""
    x = model.preprocess_image([{"image": image} for image in images]).tensor
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    if not with_fpn:
        return bottom_up(x)
    features = {}
    with bottom_up.register_forward_hook(lambda *args: features.update(args[-1])):
        outputs = model.backbone(x)
    return features | outputs
