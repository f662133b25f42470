"""The Triton kernels without a GPU."""

import functools
import importlib.util
import sys

import pytest
import torch

from gn_detect.layers import functional

kernels = functional.triton_kernels
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(scope="session")
def copy_of_device():
    """``copy_of_device(name)``: the package of the device code, imported once more under a name."""
    path = kernels.device.__file__

    def copy(name):
        for old in [old for old in sys.modules if old.partition(".")[0] == name]:
            del sys.modules[old]
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return copy


@pytest.fixture(scope="session")
def interpreted_device(copy_of_device):
    """A second copy of the device code, for Triton's interpreter; the first is for its compiler."""
    triton = pytest.importorskip("triton")
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        module = copy_of_device("interpreted")
    for part in (module.resident_kernels, module.split_kernels):
        part.core = triton.language.core  # the launch of a kernel patches what its module names
    return module


@pytest.fixture
def interpreted(interpreted_device, monkeypatch):
    """Lets the kernels take tensors on the CPU, by Triton's interpreter."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(function, *args, **kwargs):
        # Triton's own patches its language anew and leaves it so, unfit for the compiler. The
        # launch of a kernel has done it, and undoes it.
        return function.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    # Triton's own functions in Python are for the compiler, as triton was imported without it.
    monkeypatch.setattr(tl, "sum", interpreter.InterpretedFunction(tl.sum.fn))
    monkeypatch.setattr(kernels, "device", interpreted_device)
    # The check before the first use takes seconds of the interpreter; its own test has all of it.
    monkeypatch.setattr(functional.kernel_check, "SPLIT", functional.kernel_check.RESIDENT)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=CUDA)])
def device(request):
    """Where the tensors of a test go. On the CPU the kernels are those of the interpreter."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("interpreted")
    return "cpu"


@pytest.fixture
def take(monkeypatch):
    """Makes small tensors take the "split" way of large ones, with given splits and pixels per
    tile, or the "reduced" one of few groups; the "resident" one is theirs."""
    triton, triton_plan = kernels.triton, sys.modules[kernels.Plan.__module__]
    planned = kernels.plan.__wrapped__

    def force(way, splits, pixels):
        def plan(nhwc, n, c, g, hw, processors):
            how = planned(nhwc, n, c, g, hw, processors)
            tiles = triton.cdiv(hw, pixels)
            chunks = splits + 1  # the kernels that write are split otherwise than those that sum
            return how._replace(
                pixels=pixels,
                warps=4,
                splits=splits,
                split_iters=triton.cdiv(tiles, splits),
                chunks=chunks,
                chunk_iters=triton.cdiv(tiles, chunks),
            )

        if way != "resident":
            monkeypatch.setattr(triton_plan, "RESIDENT", 0)
            monkeypatch.setattr(triton_plan.Plan, "reduced", way == "reduced")
            monkeypatch.setattr(kernels, "plan", plan)

    return force


class _Device:
    """Stands for ``triton_device``."""

    def __init__(self, device, launch):
        self.device, self.launch = device, launch

    def __getattr__(self, name):
        return _Kernel(getattr(self.device, name), self.launch)


class _Kernel:
    def __init__(self, kernel, launch):
        self.kernel, self.launch = kernel, launch

    def __getitem__(self, grid):
        return functools.partial(self.launch, self.kernel, grid)


@pytest.fixture
def intercept(monkeypatch):
    """Has ``launch(kernel, grid, *args, **kwargs)`` called in the place of each launch."""
    device = kernels.device
    return lambda launch: monkeypatch.setattr(kernels, "device", _Device(device, launch))
