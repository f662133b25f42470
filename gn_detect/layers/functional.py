"""Group Normalization, a residual and an activation as one function."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import recompute
from .padding import Extents
from .reference import reference

try:
    from . import kernel_check, triton_kernels
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton_kernels = None

logger = logging.getLogger(__name__)
_log_once = functools.cache(logger.log)

KERNELS = ("auto", "triton", "torch")
ACTIVATIONS = (None, "relu")


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str | None = None,
    *,
    extents: Extents | None = None,
    kernel: str = "auto",
) -> Tensor:
    """``activation(group_norm(x) + residual)``, with the GN of https://arxiv.org/abs/1803.08494.

    No autocast: what comes in bfloat16 goes out in bfloat16, with statistics, gamma and beta in
    float32. (Autocast runs ``F.group_norm`` of CUDA in float32, with the memory that this takes.)
    ``torch.compile`` sees the Triton kernels as operators of the namespace ``gn_detect``;
    ``torch.export``, traces and ONNX see PyTorch's operations.

    Args:
        x: (N, C, *), any floating dtype; N may be 0.
        num_groups: G; divides C.
        weight, bias: gamma and beta, (C,), of any floating dtype (for the Triton kernels, that of
            ``x`` or float32); or None.
        eps: added to the variance.
        residual: of the shape of ``x``, added before the activation; or None.
        activation: ``"relu"`` or None.
        extents: of the images in a map (N, C, H, W): the rest is padding, which does not enter the
            statistics. The result is 0 there, where the residual is 0.
        kernel: ``"triton"``: fused kernels for CUDA, for float32, bfloat16 or float16, checked
            before the first use; ``"torch"``: PyTorch's operations; ``"auto"``:
            the first for all that they take and compute rightly. What and why is logged once.

    Returns:
        Shape and dtype of ``x``; also its memory format, except that PyTorch's operations on CUDA
        give NCHW.

    Raises:
        ValueError: G does not divide C, the shapes of ``x`` and ``residual`` differ, ``extents``
            are of other maps, ``activation`` or ``kernel`` is unknown, or ``kernel="triton"``
            cannot take the input.
        RuntimeError: ``kernel="triton"``, and the kernels fail or are wrong on this device.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; one of: 'relu', None")
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown; one of: {', '.join(KERNELS)}")
    if not torch.jit.is_tracing():  # where sizes are tensors, which no `if` should ask
        _check_shapes(x, num_groups, residual, extents)
    if x.is_cuda and triton_kernels is not None:
        x = triton_kernels.dense(x)
    compute = _fused if _takes_triton(kernel, x, weight, bias, residual, extents) else reference
    return compute(x, weight, bias, residual, num_groups, eps, activation, extents)


def _check_shapes(x, num_groups, residual, extents) -> None:
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm_act takes (N, C, *) with C divisible by num_groups {num_groups}; "
            f"x has the shape {list(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"the residual has the shape {list(residual.shape)}, x {list(x.shape)}: they are added "
            "without broadcasting"
        )
    if extents is not None:
        shape = len(extents.sizes), x.shape[1], extents.height, extents.width
        if x.shape != shape:
            raise ValueError(f"the extents are of maps {list(shape)}, x has {list(x.shape)}")


def _takes_triton(kernel, x, weight, bias, residual, extents) -> bool:
    if kernel == "torch" or _is_exporting() or torch.jit.is_tracing():
        return False
    if triton_kernels is None:
        reason = "triton is not installed"
    else:
        reason = kernel_check.unsupported(x, weight, bias, residual, extents is not None)
    kind = x.device, x.dtype, not x.is_contiguous(), extents is not None
    return _decide(kernel, reason, isinstance(x, FakeTensor), *kind)


@torch.compiler.assume_constant_result  # PyTorch 2.11 traces it as True, for torch.compile, too
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # torch.compile calls it while it traces
def _decide(*arguments) -> bool:
    return _decided(*arguments)


@functools.cache
def _decided(kernel, reason, fake, device, dtype, *kind) -> bool:
    """Whether Triton it is: said, or an error, once for all maps of a kind."""
    failed = "" if reason or fake else kernel_check.failure(device, dtype, *kind)
    why_not = reason or failed
    if why_not and kernel == "triton":
        raise (RuntimeError if failed else ValueError)(
            f"MODEL.GN.KERNEL is 'triton', but {why_not}; set it to 'auto', which falls back to "
            "PyTorch's operations, or to 'torch'"
        )
    if kernel == "auto":
        taken = f"torch: {why_not}" if why_not else f"triton: {dtype} maps on {device}"
        level = logging.WARNING if failed else logging.INFO
        _log_once(level, f"GroupNorm with MODEL.GN.KERNEL auto runs {taken}")
    return not why_not


def _fused(x, weight, bias, residual, num_groups, eps, activation, extents=None) -> Tensor:
    relu, launches = activation is not None, not isinstance(x, FakeTensor)
    valid = extents.tensor(x.device) if extents is not None and launches else None
    arguments = x, weight, bias, residual, num_groups, eps, relu, valid
    if torch.compiler.is_compiling():
        return _operator(*arguments)[0]
    tensors = [t for t in arguments[:4] if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _forward(*arguments)[0]
    y, mean, rstd = _GroupNormAct.apply(*arguments, extents)
    if residual is None:
        recompute.offer(
            y,
            lambda x, weight, bias: triton_kernels.apply(x, mean, rstd, weight, bias, relu, valid),
            (x, weight, bias),
        )
    return y


def _forward(x, weight, bias, residual, num_groups, eps, relu, valid) -> tuple[Tensor, ...]:
    if isinstance(x, FakeTensor):  # of a model without memory, to see what it would take
        return _operator(x, weight, bias, residual, num_groups, eps, relu, valid)
    return triton_kernels.forward(x, num_groups, weight, bias, eps, residual, relu, valid)


class _GroupNormAct(torch.autograd.Function):
    """The kernels in eager mode, where an operator of torch.library costs twice the time to call.

    Returns y, mean and rstd; the last two, (N, G) in float32, have no gradient.
    """

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, ctx.extents = inputs
        y, mean, rstd = output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(mean, rstd)
        return output

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        needs, (x, weight, bias, mean, rstd, y, valid) = ctx.needs_input_grad[:4], ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a gradient that is differentiated
            gradients = _gradients_of_reference(ctx, dy, x, weight, bias, y, needs)
        else:
            gradients = triton_kernels.backward(
                dy, x, y, mean, rstd, weight, bias, ctx.relu, ctx.residual_dtype, needs, valid
            )
        return *gradients, *(None,) * 5


def _save(ctx, inputs, output) -> None:
    x, weight, bias, residual, ctx.num_groups, ctx.eps, ctx.relu, valid = inputs
    y, mean, rstd = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    mask = y if ctx.relu and residual is not None else None  # else found from x again
    ctx.save_for_backward(x, weight, bias, mean, rstd, mask, valid)
    ctx.set_materialize_grads(False)


def _gradients_of_reference(ctx, dy, x, weight, bias, y, needs) -> tuple[Tensor | None, ...]:
    if y is not None:
        dy = dy.masked_fill(y <= 0, 0)
    activation = "relu" if ctx.relu and y is None else None
    z = reference(x, weight, bias, None, ctx.num_groups, ctx.eps, activation, ctx.extents)
    wanted = [t for t, need in zip((x, weight, bias), needs, strict=False) if need]
    found = iter(torch.autograd.grad(z, wanted, dy, create_graph=True) if wanted else ())
    gradients = (next(found) if need else None for need in needs[:3])
    return *gradients, dy.to(ctx.residual_dtype) if needs[3] else None


@torch.library.custom_op("gn_detect::group_norm_act", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    num_groups: int, eps: float, relu: bool, valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels for torch.compile: y, mean and rstd."""
    return triton_kernels.forward(x, num_groups, weight, bias, eps, residual, relu, valid)


@_operator.register_fake
def _(x, weight, bias, residual, num_groups, eps, relu, valid):
    statistics = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@torch.library.custom_op("gn_detect::group_norm_act_backward", mutates_args=())
def _backward_operator(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    y: Tensor | None, relu: bool, residual_dtype: torch.dtype | None, needs: list[bool],
    valid: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients that ``needs`` asks for (x, weight, bias, residual), in this order."""
    gradients = triton_kernels.backward(
        dy, x, y, mean, rstd, weight, bias, relu, residual_dtype, tuple(needs), valid
    )
    # Those of gamma and beta are views of one tensor, which an operator must not return.
    return [g.clone() if g.dim() == 1 else g for g in gradients if g is not None]


@_backward_operator.register_fake
def _(dy, x, weight, bias, mean, rstd, y, relu, residual_dtype, needs, valid):
    dtypes = {3: residual_dtype}
    likes = enumerate((x, weight, bias, x))
    return [torch.empty_like(like, dtype=dtypes.get(i)) for i, like in likes if needs[i]]


def _backward_of_operator(ctx, dy, *_):
    if dy is None:
        return (None,) * 8
    *needs, residual = ctx.needs_input_grad[:4]
    needs.append(residual and ctx.relu)  # else dy, and an operator must not return its input
    x, weight, bias, mean, rstd, y, valid = ctx.saved_tensors
    arguments = dy, x, weight, bias, mean, rstd, y, ctx.relu, ctx.residual_dtype, needs, valid
    found = iter(_backward_operator(*arguments))
    gradients = [next(found) if need else None for need in needs]
    if residual and not ctx.relu:
        gradients[3] = dy.to(ctx.residual_dtype)
    return *gradients, *(None,) * 4


_operator.register_autograd(
    _backward_of_operator, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output)
)
