"""Weights of a detector with BN for the same detector with GN: convolutions kept, gamma and beta
of each GN layer set so that its output has BN's mean and variance, channel by channel."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import FPN, build_model
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Instances
from torch import nn

from gn_detect.checkpoint import Checkpointer, WeightGuards
from gn_detect.checkpoint.weight_guards import bn_into_gn
from gn_detect.config import ConfigError, locate
from gn_detect.data.coco import DataError
from gn_detect.modeling.norm import weight_standardization_from_config

from .guards import is_retinanet, norm_keys
from .prepare import check_weights, usable_device

METHODS = ("calibrated", "copied", "plain")
_GN_KINDS = ("GN", "LN", "IN")
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MASKED = 100  # proposals of an image, the best, for mask and keypoint heads
_MIN_VARIANCE = 1e-10  # of a channel of normalized values; below it the channel is a constant


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a detector, which is converted as a whole or starts afresh as a whole.

    Args:
        names: a pattern of how the names of its parameters begin.
        keys: of its norms.
        calibrated: whether each of its norms is called once per image or RoI. RPN, RetinaNet's
            head and the semantic head share one norm among levels, or are not run here.
    """

    names: str
    keys: tuple[str, ...]
    calibrated: bool = True


# The first that matches is a parameter's. Each part needs those above it.
_PARTS = {
    "FPN": _Part(r"backbone\.(fpn_|top_block\.)", ("MODEL.FPN.NORM",)),
    "ResNet": _Part(r"backbone\.|roi_heads\.res5\.", ("MODEL.RESNETS.NORM",)),
    "RPN": _Part(r"proposal_generator\.", ("MODEL.RPN.NORM",), calibrated=False),
    "box head": _Part(r"roi_heads\.box_", ("MODEL.ROI_BOX_HEAD.NORM",)),
    "mask head": _Part(
        r"roi_heads\.mask_", ("MODEL.ROI_MASK_HEAD.NORM", "MODEL.ROI_MASK_HEAD.DECONV_NORM")
    ),
    "keypoint head": _Part(r"roi_heads\.keypoint_", ("MODEL.ROI_KEYPOINT_HEAD.NORM",)),
    "RetinaNet head": _Part(r"head\.", ("MODEL.RETINANET.NORM",), calibrated=False),
    "semantic head": _Part(r"sem_seg_head\.", ("MODEL.SEM_SEG_HEAD.NORM",), calibrated=False),
}


@dataclasses.dataclass
class Conversion:
    """What :func:`convert` made.

    Attributes:
        weights: name -> tensor on the CPU, for the model of the GN config. What the BN weights do
            not hold is left out, so that it starts afresh.
        errors: method -> output of the backbone -> relative L2 error, |GN - BN| / |BN|, on the
            images that were held out.
        calibrated: the names of the GN layers that were BN, or had no norm.
        fresh: the parts with GN layers that start afresh.
        num_images: to calibrate on, and held out.
    """

    weights: dict[str, torch.Tensor]
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
        ConfigError: ``num_images`` or the size is too small.
        DataError: there are fewer than 2 images, or one cannot be read.
    """
    size = cfg.INPUT.MIN_SIZE_TEST // 32 * 32
    if size < 32:
        raise ConfigError(
            f"INPUT.MIN_SIZE_TEST is {cfg.INPUT.MIN_SIZE_TEST}; to calibrate, set 32 pixels or more"
        )
    if num_images < 2:
        raise ConfigError(
            f"--num-images is {num_images}: one image is held out, so that 2 are the fewest"
        )
    if not Path(directory).is_dir():
        raise DataError(f"--images: there is no directory {directory}")
    files = sorted(f for f in Path(directory).iterdir() if f.suffix.lower() in _IMAGES)
    if len(files) < 2:
        raise DataError(
            f"--images: {directory} holds {len(files)} images ({', '.join(_IMAGES)}); give at "
            "least 2: one is held out"
        )
    count = min(num_images, len(files))
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, sys.maxsize)
    images = []
    for file in (files[i * len(files) // count] for i in range(count)):
        try:
            image = read_image(str(file), cfg.INPUT.FORMAT)
        except Exception as error:  # Pillow raises too many kinds to list
            raise DataError(
                f"cannot read the image {file} ({type(error).__name__}: {error}); replace it, or "
                "take it out of the directory"
            ) from error
        image = resize.get_transform(image).apply_image(image)
        top, left = ((n - size) // 2 for n in image.shape[:2])
        image = image[top : top + size, left : left + size]
        images.append(torch.as_tensor(image.astype("float32").transpose(2, 0, 1)))
    return images


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
    what they will. RoI heads see the BN network's proposals.

    BN's statistics are of the training set, GN's of each image and group, so this is not the same
    function, except where a group is one channel and the batch one image.

    Args:
        cfg: of the GN network; ``NUM_CLASSES`` may be None and then follows the weights.
        weights: in any form that Detectron2 reads.
        images: at least 2, of one size, as :func:`read_images` gives them.
        method: gamma and beta of the result: ``"calibrated"``; ``"copied"`` from BN; or
            ``"plain"``, 1 and 0.

    Raises:
        ConfigError: the weights are not of this network with BN, or the config is not of GN.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = usable_device("MODEL.DEVICE", cfg.MODEL.DEVICE, 1)
    _check_config(cfg)
    check_weights("--weights", weights, "", eval_only=False, resume=False)
    file = _Reader(nn.Module(), guards=WeightGuards.from_config(cfg))
    file.load(weights)
    _set_num_classes(cfg, file.shapes)

    target = build_model(cfg).eval()
    source_cfg = _source_config(cfg, target, file.shapes, weights)
    source = build_model(source_cfg).eval()
    loader = _Loader(source, guards=WeightGuards.from_config(source_cfg))
    loader.load(weights)
    absent = _absent(loader.incompatible, weights)
    layers, fresh = _match(source, target, absent)

    affine = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    known = source.state_dict()
    kept = {
        name: known[name]
        for name in target.state_dict()
        if name in known and name not in {*absent, *affine} and _part_of(name) not in fresh
    }
    target.load_state_dict(kept, strict=False)

    held = range(3, len(images), 4) or [len(images) - 1]
    held_out = [images[i] for i in held]
    batch = [image for i, image in enumerate(images) if i not in held]
    with_fpn = isinstance(target.backbone, FPN) and "FPN" not in fresh
    expected = _features(source, held_out, with_fpn)
    values, errors = {}, {}
    for name, of_method in (
        ("plain", lambda: {layer: (1.0, 0.0) for layer in layers}),
        ("copied", lambda: {layer: _affine(source.get_submodule(layer)) for layer in layers}),
        ("calibrated", lambda: _calibrate(source, target, layers, batch)),
    ):
        values[name] = of_method()
        _set_affine(target, values[name])
        errors[name] = {
            output: float((x - expected[output]).norm() / expected[output].norm())
            for output, x in _features(target, held_out, with_fpn).items()
        }
    _set_affine(target, values[method])
    state = target.state_dict()
    state = {name: state[name].cpu() for name in state if name in kept or name in affine}
    return Conversion(state, errors, layers, fresh, (len(batch), len(held_out)))


def save(conversion: Conversion, cfg: CfgNode, path: str) -> None:
    """Write a checkpoint for the network of ``cfg``, in the form of :class:`Checkpointer`.

    Raises:
        ConfigError: the name does not end in .pth.
    """
    check_output(path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    origin = dataclasses.asdict(WeightGuards.from_config(cfg).ours)
    torch.save({"model": conversion.weights, "origin": origin}, path)


def check_output(path: str) -> None:
    """
    Raises:
        ConfigError: the name does not end in .pth, by which Detectron2 knows the format.
    """
    if Path(path).suffix != ".pth":
        raise ConfigError(f"--output is {path}: give a name that ends in .pth")


class _Reader(Checkpointer):
    """Reads the names and shapes in a file, and loads nothing."""

    def _load_model(self, checkpoint: dict) -> None:
        self.shapes = {
            name.removeprefix("module."): tuple(value.shape)  # of a wrapper for training
            for name, value in checkpoint["model"].items()
        }


class _Loader(Checkpointer):
    """Remembers what did not fit."""

    def _load_model(self, checkpoint: dict):
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def _part_of(name: str) -> str:
    return next((part for part, p in _PARTS.items() if re.match(p.names, name)), "")


def _check_config(cfg: CfgNode) -> None:
    if variant := weight_standardization_from_config(cfg):
        raise ConfigError(
            f"MODEL.GN.WEIGHT_STANDARDIZATION is {variant!r}: it changes every convolution, and "
            "those of a BN network were not trained so; set it to '' and convert again"
        )
    if not _gn_keys(cfg):
        raise ConfigError(
            "no norm of the config is GN, LN or IN, so there is nothing to convert to; set "
            "MODEL.RESNETS.NORM GN"
        )


def _gn_keys(cfg: CfgNode) -> list[str]:
    return [key for key in norm_keys(cfg) if _value(cfg, key) in _GN_KINDS]


def _value(cfg: CfgNode, key: str) -> str:
    node, name = locate(cfg, key)
    return node[name]


def _set_num_classes(cfg: CfgNode, shapes: dict[str, tuple[int, ...]]) -> None:
    """Take the classes from the predictor in the weights where ``cfg`` leaves them open."""
    retinanet = is_retinanet(cfg)
    section = cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS
    if section.NUM_CLASSES is not None:
        return
    pattern = r"head\.cls_score\.weight" if retinanet else r".*box_predictor\..*cls_score\.weight"
    rows = next((s[0] for name, s in shapes.items() if re.fullmatch(pattern, name)), None)
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    if rows is None:
        section.NUM_CLASSES = 1  # of a predictor that is not written
    elif retinanet:
        section.NUM_CLASSES = rows // (len(anchors.SIZES[0]) * len(anchors.ASPECT_RATIOS[0]))
    else:
        section.NUM_CLASSES = rows - 1  # the last is the background


def _source_config(
    cfg: CfgNode, target: nn.Module, shapes: dict[str, tuple[int, ...]], weights: str
) -> CfgNode:
    """``cfg`` with the norms that the weights have, part by part."""
    bn = set(bn_into_gn(shapes, target))
    gammas = [name for name, shape in shapes.items() if len(shape) == 1]
    gn = {
        layer
        for layer in _group_norms(target)
        if layer not in bn and any(f".{layer}.weight".endswith(f".{name}") for name in gammas)
    }
    if not bn:
        raise ConfigError(
            f"{weights} has GN already: load it with MODEL.WEIGHTS of tools/train_net.py"
            if gn
            else f"{weights} has no BN in any layer that is GN here: there is nothing to convert"
        )
    # BN that was frozen while training does not count its batches.
    tracked = any(name.endswith("num_batches_tracked") for name in shapes)
    source = cfg.clone()
    for name, part in _PARTS.items():
        layers = {layer for layer in _group_norms(target) if _part_of(layer) == name}
        for key in set(part.keys) & set(_gn_keys(cfg)):
            node, last = locate(source, key)
            if layers & bn:
                node[last] = "BN" if tracked else "FrozenBN"
            elif not layers & gn:
                node[last] = ""
    return source


def _group_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)]


def _absent(incompatible, weights: str) -> list[str]:
    """The names that the BN network has and the weights lack, of what fvcore says did not fit.

    Raises:
        ConfigError: the weights are of another network.
    """
    for name, theirs, ours in incompatible.incorrect_shapes:
        if _part_of(name) != "RetinaNet head":  # which starts afresh
            raise ConfigError(
                f"{name} has the shape {list(theirs)} in {weights}, {list(ours)} in the config's "
                "network. Give the config the sizes of the weights; leave NUM_CLASSES out, and it "
                "follows them"
            )
    absent = [n for n in incompatible.missing_keys if not n.endswith("num_batches_tracked")]
    if backbone := [name for name in absent if _part_of(name) == "ResNet"]:
        raise ConfigError(
            f"{weights} lacks {len(backbone)} tensors of the backbone, such as {backbone[0]}: it "
            "is of another network than the config's (MODEL.RESNETS)"
        )
    return absent


def _match(source: nn.Module, target: nn.Module, absent: list[str]) -> tuple[list[str], list[str]]:
    """Find the GN layers to calibrate, and the parts that start afresh.

    Where the BN network has no norm, an identity takes its place, in ``source``.
    """
    modules = dict(source.named_modules())
    lacking = {_part_of(name) for name in absent}
    layers, fresh = [], []
    for name, part in _PARTS.items():
        todo = [
            layer
            for layer in _group_norms(target)
            if _part_of(layer) == name and not isinstance(modules.get(layer), nn.GroupNorm)
        ]
        added = [layer for layer in todo if layer not in modules]
        convs = [modules.get(layer.removesuffix(".norm")) for layer in added]
        needed = {name, "FPN", "RPN"} if part.names.startswith("roi_heads") else {name}
        if not todo:
            continue
        if (
            not part.calibrated
            or needed & {*lacking, *fresh}
            or any(getattr(conv, "norm", "") is not None for conv in convs)
        ):
            fresh.append(name)
            continue
        for conv in convs:
            conv.norm = nn.Identity()
        layers += todo
    return layers, fresh


def _calibrate(
    source: nn.Module, target: nn.Module, layers: list[str], batch: list[torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The gamma and beta of :func:`convert`; those of ``target`` are lost."""
    images = source.preprocess_image([{"image": image} for image in batch])
    expected, values = {}, {}

    def record(layer: str, module: nn.Module, output: torch.Tensor) -> None:
        expected[layer] = _moments(output)

    def adjust(layer: str, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        (variance, mean), (v, m) = expected[layer], _moments(output)
        gamma = torch.where(v > _MIN_VARIANCE, (variance / v).sqrt(), 0)
        sign = torch.as_tensor(_affine(source.get_submodule(layer))[0], device=v.device).sign()
        gamma = torch.where(sign < 0, -gamma, gamma)
        values[layer] = gamma, mean - gamma * m
        shape = [-1] + [1] * (output.dim() - 2)
        return output * values[layer][0].view(shape) + values[layer][1].view(shape)

    heads = any(layer.startswith("roi_heads.") for layer in layers)
    proposals = []
    with _hooks(source, layers, record):
        features = source.backbone(images.tensor)
        if heads:
            proposals, _ = source.proposal_generator(images, features, None)
            _run_heads(source, features, proposals)
    _set_affine(target, {layer: (1.0, 0.0) for layer in layers})
    with _hooks(target, layers, adjust):
        features = target.backbone(images.tensor)
        if heads:
            _run_heads(target, features, proposals)
    return values


def _run_heads(model: nn.Module, features: dict, proposals: list[Instances]) -> None:
    """Box head on all proposals; mask and keypoint heads on the best of each image."""
    if not any(len(p) for p in proposals):
        raise DataError(
            "the BN network proposes no object in the images, so that no RoI head can be "
            "calibrated; give other images"
        )
    heads = model.roi_heads
    if isinstance(heads, Res5ROIHeads):
        maps = [features[name] for name in heads.in_features]
        heads._shared_roi_transform(maps, [p.proposal_boxes for p in proposals])
        return
    given = []
    for best in (p[:_MASKED] for p in proposals):
        classes = torch.zeros(len(best), dtype=torch.int64, device=best.objectness_logits.device)
        given.append(
            Instances(best.image_size, pred_boxes=best.proposal_boxes, pred_classes=classes)
        )
    heads._forward_box(features, proposals)
    heads.forward_with_given_boxes(features, given)


@contextlib.contextmanager
def _hooks(model: nn.Module, layers: list[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(layer, module, output)`` after each layer; what it returns is the output."""
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda module, _, output, layer=layer: hook(layer, module, output)
        )
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _features(
    model: nn.Module, images: list[torch.Tensor], with_fpn: bool
) -> dict[str, torch.Tensor]:
    """Outputs of the backbone: res2 to res5 under an FPN, then its own."""
    x = model.preprocess_image([{"image": image} for image in images]).tensor
    if not isinstance(model.backbone, FPN):
        return model.backbone(x)
    features = dict(model.backbone.bottom_up(x))
    return features | model.backbone(x) if with_fpn else features
