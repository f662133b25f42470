"""The Triton kernels without a GPU."""

import functools
import importlib.util
import sys

import pytest

from gn_detect.layers import functional

kernels = functional.triton_kernels


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
