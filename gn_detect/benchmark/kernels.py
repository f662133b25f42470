"""Each GN layer of a detector alone: GN, residual and ReLU, by several implementations."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from gn_detect.layers import GroupNorm
from gn_detect.layers.functional import group_norm_act

from .detectors import Settings, variant_config
from .timing import as_cuda_graph, failing, interleave, kernel_clock

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
        eps: of the GN.
    """

    shape: tuple[int, int, int, int]
    num_groups: int
    relu: bool
    residual: bool
    eps: float = 1e-5

    def minimum_bytes(self, itemsize: int, backward: bool) -> int:
        """Of the maps that a pass has to read and write, each once.

        Forward: x, the residual, y. Backward: dy, x, dx, and with a residual also y, which knows
        where the ReLU was 0, and the gradient of the residual. (Without ReLU that is dy.)
        """
        maps = 2 + self.residual
        if backward:
            maps += 3 + 2 * (self.residual and self.relu)
        return maps * self.numel * itemsize

    @property
    def numel(self) -> int:
        """Elements of the input."""
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        kind = "+add" * self.residual + "+relu" * self.relu
        return f"{'x'.join(map(str, self.shape))} GN{kind}"


@torch.no_grad()
def gn_layers(settings: Settings) -> dict[Layer, list[str]]:
    """The distinct GN layers of the fused detector, in the order in which they run, each with
    the names of the modules that are like it.

    They are taken from the model itself, which runs without data (on the device ``meta``): the
    backbone on ``settings.images`` of ``settings.size``, the heads on ``settings.rois`` of each
    image and a quarter of them.
    """
    settings = dataclasses.replace(settings, device="meta", channels_last="", amp="none")
    model = build_model(variant_config("ours-fast", settings))
    layers: dict[Layer, list[str]] = collections.defaultdict(list)

    def note(name: str, module: GroupNorm) -> None:
        def hook(_, args, kwargs):
            residual = kwargs.get("residual") is not None
            shape, relu = tuple(args[0].shape), kwargs.get("activation") == "relu"
            layers[Layer(shape, module.num_groups, relu, residual, module.eps)].append(name)

        module.register_forward_pre_hook(hook, with_kwargs=True)

    for name, module in model.named_modules():
        if isinstance(module, GroupNorm):
            note(name, module)
    step = model.backbone.size_divisibility  # to which the model pads images
    size = (math.ceil(side / step) * step for side in settings.size)
    features = model.backbone(torch.empty(settings.images, 3, *size, device="meta"))
    channels = features["p2"].shape[1]
    heads, rois = model.roi_heads, settings.images * settings.rois
    side = heads.box_pooler.output_size
    heads.box_head(torch.empty(rois, channels, *side, device="meta"))
    side = heads.mask_pooler.output_size
    heads.mask_head.layers(torch.empty(max(rois // 4, 1), channels, *side, device="meta"))
    return dict(layers)


def time_layer(
    layer: Layer,
    variants: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    layout: str,
    rounds: int,
    warmup: int,
    graph: bool,
    failures: dict[str, str],
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant, interleaved: pass -> variant -> samples.

    Args:
        layout: a key of ``LAYOUTS``.
        graph: on CUDA, replay CUDA graphs, so that the time is that of the kernels. Without, a
            short kernel waits for Python.
        failures: of ``timing.failing``; a variant that fails is left out from there on.
    """
    torch.manual_seed(0)
    torch.compiler.reset()  # compiled for each shape alone
    runs, samples = {}, {}
    for name in variants:
        with failing(name, failures):
            runs[name] = layer_runs(name, layer, device, dtype, LAYOUTS[layout])
    clock = kernel_clock(device)
    for kind in PASSES:
        of_pass = {name: run[kind] for name, run in runs.items() if name not in failures}
        if graph and device.type == "cuda":
            for name, run in of_pass.items():
                with failing(name, failures):
                    of_pass[name] = as_cuda_graph(run)
        samples[kind] = interleave(of_pass, rounds, warmup, clock, failures)
    return samples


def layer_runs(
    name: str, layer: Layer, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> dict[str, Callable[[], object]]:
    """One layer as a variant runs it, on random maps: the forward pass, which gives y, and
    forward+backward, which gives the gradients of x, the residual (where there is one), gamma and
    beta (where they are trained)."""

    def new() -> torch.Tensor:
        return torch.randn(layer.shape, device=device, dtype=dtype).to(memory_format=layout)

    if name == "copy":
        return {
            kind: _copy(layer.minimum_bytes(dtype.itemsize, "backward" in kind), device)
            for kind in PASSES
        }
    function, parameters = _function(name, layer, device, dtype)
    x, gradient = new().requires_grad_(), new()
    residual = new().requires_grad_() if layer.residual else None
    inputs = [t for t in (x, residual, *parameters) if t is not None]

    def forward() -> torch.Tensor:
        return function(x, residual)

    def forward_backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), inputs, gradient)

    return dict(zip(PASSES, (forward, forward_backward), strict=True))


def _copy(number_of_bytes: int, device: torch.device) -> Callable[[], object]:
    source, target = torch.zeros(2, number_of_bytes // 2, dtype=torch.uint8, device=device)
    return lambda: target.copy_(source)


def _function(
    name: str, layer: Layer, device: torch.device, dtype: torch.dtype
) -> tuple[Callable, list[nn.Parameter]]:
    """``function(x, residual)`` of a variant, and its parameters."""
    channels = layer.shape[1]
    if name == "frozenbn":  # as Detectron2's blocks run it
        norm = FrozenBatchNorm2d(channels).to(device)
        return _then(norm, layer), []
    # Under autocast parameters are float32, as ours always; F.group_norm alone wants them as x.
    norm = nn.GroupNorm(layer.num_groups, channels, layer.eps, device=device)
    if name in ("eager", "compiled"):
        norm = norm.to(dtype)
    parameters = list(norm.parameters())
    if name == "ours":
        activation = "relu" if layer.relu else None
        kernel = Settings("", device=device.type).kernel
        fixed = layer.num_groups, norm.weight, norm.bias, layer.eps
        return lambda x, r: group_norm_act(x, *fixed, r, activation, kernel=kernel), parameters
    eager = _then(norm, layer)
    if name == "eager":
        return eager, parameters
    if name == "compiled":
        return torch.compile(eager, dynamic=False), parameters

    def autocast(x, residual):
        with torch.autocast(device.type, dtype, cache_enabled=False):
            return eager(x, residual).to(dtype)  # which the next convolution would do

    return autocast, parameters


def _then(norm: Callable, layer: Layer) -> Callable:
    """What Detectron2's convolutions and blocks do with their norm, residual and ReLU."""

    def function(x, residual):
        y = norm(x)
        if layer.residual:
            y += residual
        return F.relu_(y) if layer.relu else y

    return function
