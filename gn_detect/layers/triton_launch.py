"""Launches of Triton kernels that cost little time of the CPU."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import triton
from torch._subclasses.fake_tensor import FakeTensor
from triton.compiler import CompiledKernel

from . import triton_device as device


def launch(kernel, programs: int, warps: int, *arguments) -> None:
    """Launches a kernel.

    Triton looks at each argument of each launch, to find what it compiled for its like. That takes
    longer than many a kernel runs, so here it is done once for all tensors of the same dtypes, and
    sizes that the kernel is not compiled for count for nothing. On fake tensors nothing runs.
    """
    if isinstance(arguments[0], FakeTensor):
        return
    if not isinstance(kernel, triton.JITFunction):  # the interpreter
        kernel[(programs,)](*arguments, num_warps=warps)
        return
    pointers, numbers = _parameters(kernel.__name__)
    key, addresses = [kernel.__name__, arguments[0].get_device(), warps, numbers(arguments)], 0
    for tensor in arguments[:pointers]:
        if tensor is None:
            key.append(None)
        else:
            key.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    key, aligned = tuple(key), addresses % 16 == 0
    compiled = _compiled.get(key)
    if compiled is not None and aligned:
        compiled[(programs, 1, 1)](*arguments)
        return
    compiled = kernel[(programs,)](*arguments, num_warps=warps)
    if aligned and isinstance(compiled, CompiledKernel):
        _compiled[key] = compiled


_compiled: dict[tuple, CompiledKernel] = {}


@functools.cache
def _parameters(name: str) -> tuple[int, Callable[[tuple], tuple]]:
    """How many parameters of a kernel are tensors, the first ones; and what gives of its arguments
    the numbers that it is compiled for."""
    kernel = getattr(device, name)
    pointers = min(kernel.arg_names.index(n) for n in ("eps", "HWV") if n in kernel.arg_names)
    numbers = [
        i
        for i, parameter in enumerate(kernel.arg_names)
        if i >= pointers and parameter not in (*kernel.do_not_specialize, "eps")
    ]
    return pointers, operator.itemgetter(*numbers)
