"""Each GN layer of a detector alone: GN, residual and ReLU, by several implementations."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from gn_detect.layers import GroupNorm, group_norm_act

from .detectors import Settings, variant_config
from .timing import as_cuda_graph, failing, interleave, kernel_clock, wall_clock

# "copy": Tensor.copy_ of as many bytes as the layer has to read and write at the least.
VARIANTS = ("eager", "autocast", "compiled", "frozenbn", "ours", "copy")
PASSES = ("forward", "forward+backward")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A GN layer with what follows it, and the shape of its input.

    Args:
        shape: (N, C, H, W).
        num_groups: G.
        relu: a ReLU follows.
        residual: a tensor of the same shape is added before that.
    """

    shape: tuple[int, int, int, int]
    num_groups: int
    relu: bool
    residual: bool

    def minimum_bytes(self, itemsize: int, backward: bool) -> int:
        """Of the maps that a pass has to read and write, each once.

        Forward: x, the residual, y. Backward: dy, x, dx, and with a residual also y, which knows
        where the ReLU was 0, and the gradient of the residual. (Without ReLU that is dy.)
        """
        maps = 2 + self.residual
        if backward:
            maps += 3 + 2 * (self.residual and self.relu)
        return maps * math.prod(self.shape) * itemsize

    def __str__(self) -> str:
        kind = "+add" * self.residual + "+relu" * self.relu
        return f"{'x'.join(map(str, self.shape))} GN{kind}"


@torch.no_grad()
def gn_layers(settings: Settings) -> dict[Layer, int]:
    """The distinct GN layers of the detector, in the order in which they run, and how many of each
    there are.

    They are taken from our model, which runs without data (on the device ``meta``): the
    backbone on ``settings.images`` of ``settings.size``, the heads on ``settings.rois`` of each
    image and a quarter of them.
    """
    settings = dataclasses.replace(settings, device="meta", channels_last="", amp="none")
    model = build_model(variant_config("ours-fast", settings))
    layers = collections.Counter()

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        relu, residual = kwargs.get("activation") == "relu", kwargs.get("residual") is not None
        layers[Layer(tuple(args[0].shape), module.num_groups, relu, residual)] += 1

    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note, with_kwargs=True)
    step = model.backbone.size_divisibility  # to which the model pads images
    size = (math.ceil(side / step) * step for side in settings.size)
    heads, rois = model.roi_heads, settings.images * settings.rois
    features = model.backbone(torch.empty(settings.images, 3, *size, device="meta"))
    channels = features["p2"].shape[1]
    side = heads.box_pooler.output_size
    heads.box_head(torch.empty(rois, channels, *side, device="meta"))
    side = heads.mask_pooler.output_size
    heads.mask_head.layers(torch.empty(max(rois // 4, 1), channels, *side, device="meta"))
    return layers


def time_layer(
    layer: Layer, variants: Sequence[str], settings: Settings, rounds: int, warmup: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Seconds of each variant, interleaved: pass -> variant -> samples; and those that failed, with
    the reason.

    On CUDA, CUDA graphs are replayed, so that the time is that of the kernels: else a short one
    would wait for Python.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # compiled for each shape alone
    on_gpu = settings.device == "cuda"
    clock = kernel_clock() if on_gpu else wall_clock
    runs, samples, failures = {}, {}, {}
    for name in variants:
        with failing(name, failures):
            runs[name] = layer_runs(name, layer, settings)
    for kind in PASSES:
        of_pass = {name: run[kind] for name, run in runs.items() if name not in failures}
        for name, run in of_pass.items() if on_gpu else ():
            with failing(name, failures):
                of_pass[name] = as_cuda_graph(run)
        samples[kind] = interleave(of_pass, rounds, warmup, failures, clock)
    return samples, failures


def layer_runs(name: str, layer: Layer, settings: Settings) -> dict[str, Callable[[], object]]:
    """One layer as a variant runs it, on random maps: the forward pass, which gives y, and
    forward+backward, which gives the gradients of x, the residual (where there is one), gamma and
    beta (where they are trained)."""
    device, dtype = settings.device, DTYPES[settings.dtype]

    def new() -> torch.Tensor:
        x = torch.randn(layer.shape, device=device, dtype=dtype)
        return x.to(memory_format=LAYOUTS[settings.layout])

    def copy(kind: str) -> Callable[[], object]:
        half = layer.minimum_bytes(dtype.itemsize, kind != "forward") // 2
        source, target = torch.zeros(2, half, dtype=torch.uint8, device=device)
        return lambda: target.copy_(source)

    if name == "copy":
        return {kind: copy(kind) for kind in PASSES}
    norm = nn.GroupNorm(layer.num_groups, layer.shape[1])
    if name == "frozenbn":
        norm = FrozenBatchNorm2d(layer.shape[1])
    # Under autocast parameters are float32, as ours always; F.group_norm alone wants them as x.
    norm = norm.to(device, dtype if name in ("eager", "compiled") else None)
    function = _function(name, layer, norm, settings)
    x, gradient = new().requires_grad_(), new()
    residual = new().requires_grad_() if layer.residual else None
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]

    def forward() -> torch.Tensor:
        return function(x, residual)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, gradient)

    return dict(zip(PASSES, (forward, forward_backward), strict=True))


def _function(name: str, layer: Layer, norm: nn.Module, settings: Settings) -> Callable:
    """``function(x, residual)`` of a variant."""
    dtype = DTYPES[settings.dtype]

    def detectron2(x, residual):  # what its convolutions and blocks do
        y = norm(x)
        if layer.residual:
            y += residual
        return F.relu_(y) if layer.relu else y

    def autocast(x, residual):
        with torch.autocast(
            settings.device, dtype, enabled=dtype.itemsize == 2, cache_enabled=False
        ):
            return detectron2(x, residual).to(dtype)  # as the next convolution does

    def ours(x, residual):
        fixed = norm.num_groups, norm.weight, norm.bias, norm.eps
        activation = "relu" if layer.relu else None
        return group_norm_act(x, *fixed, residual, activation, kernel=settings.kernel)

    if name == "compiled":
        return torch.compile(detectron2, dynamic=False)
    return {"autocast": autocast, "ours": ours}.get(name, detectron2)
