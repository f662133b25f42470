"""What MODEL.GN.KERNEL does where the Triton kernels fail or are wrong."""

import functools
import logging
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", minversion="3.4")  # has knobs

from gn_detect.layers import functional, group_norm_act, kernel_check  # noqa: E402
from gn_detect.layers import triton_kernels as kernels  # noqa: E402
from gn_detect.layers.padding import Extents  # noqa: E402
from gn_detect.layers.recompute import MODES, rebuild_norms, run_block  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreted", "fresh")]
SPLIT = kernel_check.SPLIT
NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable"


@pytest.fixture
def fresh(monkeypatch):
    """Nothing was checked or said before."""
    for module, name in (
        (kernel_check, "failure"),
        (functional, "_decided"),
        (functional, "_log_once"),
    ):
        again = functools.cache(getattr(module, name).__wrapped__)
        monkeypatch.setattr(module, name, again)


@pytest.fixture
def whole(interpreted, monkeypatch):
    """The check is not shortened."""
    monkeypatch.setattr(kernel_check, "SPLIT", SPLIT)


@pytest.fixture
def spoil(intercept):
    """Does ``harm`` after a launch of the kernel ``name`` on float32 maps, with its arguments by
    their names."""

    def install(name, harm):
        def launch(kernel, grid, *args, **kwargs):
            kernel[grid](*args, **kwargs)
            named = dict(zip(kernel.arg_names, args, strict=True))
            if kernel.__name__ == name and named["x"].dtype == torch.float32:
                harm(named)

        intercept(launch)

    return install


def no_compiler(_):
    raise RuntimeError(NO_COMPILER)


def scaled(name, where=lambda named: True):
    return lambda named: where(named) and named[name].mul_(1.001)


def alone(named):
    """Without residual."""
    return named["y"] is None


# Kernel, what happens, what is said
FAULTS = [
    ("resident", no_compiler, rf"failed for torch.float32 maps in NCHW on cpu.*{NO_COMPILER}"),
    ("gradient", no_compiler, rf"failed for .* of shape \[2, 4, 50, 84\]: Run.*{NO_COMPILER}"),
    ("resident", scaled("y"), r"wrong for .* \[2, 16, 6, 8\]: the output is off by 0.0"),
    ("resident_gradient", scaled("dx"), "wrong for .* the gradient of x is off by 0.0"),
    ("resident_gradient", scaled("dz"), "wrong for .* the gradient of the residual is off"),
    ("gradient_sums", scaled("sums"), r"\[2, 4, 50, 84\]: the gradient of gamma is off"),
    ("apply", lambda named: named["y"][1, 3, 49, 83].fill_(torch.nan), "the output is off by nan"),
    ("resident_gradient", scaled("dx", alone), "the gradient of x is off by 0.0"),
    ("gradient_sums", scaled("sums", alone), "the gradient of gamma is off"),
    ("resident", scaled("y", lambda named: named["KNOWN"]), "another one where it is rebuilt"),
    ("apply", scaled("y", lambda named: named["part"] is None), "another one where it is rebuilt"),
]


def maps(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 8, 3, 5).to(dtype).requires_grad_()


def launched(monkeypatch):
    """The dtypes of the maps that the kernels get from here on."""
    dtypes, forward = [], kernels.forward

    def record(x, *args):
        dtypes.append(x.dtype)
        return forward(x, *args)

    monkeypatch.setattr(kernels, "forward", record)
    return dtypes


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("kernel, harm, message", FAULTS, ids=[fault[2] for fault in FAULTS])
def test_auto_falls_back_with_one_warning_and_triton_raises(
    kernel, harm, message, spoil, monkeypatch, caplog
):
    spoil(kernel, harm)
    x = maps()
    group_norm_act(x, 4)
    dtypes = launched(monkeypatch)
    y = group_norm_act(x, 4, activation="relu")
    expected = group_norm_act(x, 4, activation="relu", kernel="torch")
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected)))
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "MODEL.GN.KERNEL auto runs torch: the Triton kernels" in record.message
    assert re.search(message, record.message), record.message
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"MODEL.GN.KERNEL is 'triton', but .*{message}"):
            group_norm_act(x, 4, kernel="triton")
    assert dtypes == []


def test_other_dtypes_and_layouts_are_not_concerned(spoil, monkeypatch, caplog):
    spoil("resident", no_compiler)
    group_norm_act(maps(), 4)
    dtypes = launched(monkeypatch)
    with caplog.at_level(logging.INFO, "gn_detect"):
        group_norm_act(maps(torch.float16), 4)
    assert dtypes == [torch.float16] * 9  # eight of the check
    assert "auto runs triton: torch.float16 maps on cpu" in caplog.text


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("name", ["resident_gradient", "gradient"])
def test_launches_of_what_was_compiled_are_checked(name, intercept, caplog):
    """They take another way than the first launch."""
    compiled = set()

    def launch(kernel, grid, *args, **kwargs):
        key = kernel.__name__, *(getattr(a, "dtype", a) for a in args)
        if kernel.__name__ == name and key in compiled:
            raise TypeError("function takes exactly 12 arguments")
        compiled.add(key)
        kernel[grid](*args, **kwargs)

    intercept(launch)
    x = maps()
    assert torch.equal(group_norm_act(x, 4), group_norm_act(x, 4, kernel="torch"))
    assert "TypeError: function takes exactly 12 arguments" in caplog.text


def test_padded_maps_are_checked_for_themselves(spoil, caplog):
    """For them the kernels are other code."""
    spoil("resident", lambda named: None if named["extents"] is None else no_compiler(named))
    extents = Extents([(3, 4), (2, 5)], 3, 5)
    x = maps()
    group_norm_act(x, 4)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    y = group_norm_act(x, 4, extents=extents)
    assert torch.equal(y, group_norm_act(x, 4, extents=extents, kernel="torch"))
    assert "the Triton kernels failed for padded torch.float32 maps in NCHW on cpu" in caplog.text


def test_torch_compile_checks_while_it_traces(spoil, caplog):
    """Once, and the graph has PyTorch's operations."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    spoil("resident", no_compiler)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: group_norm_act(x, 4, activation="relu"), backend=backend, fullgraph=True
    )
    x = maps().detach()
    for _ in range(2):
        torch.testing.assert_close(
            compiled(x), group_norm_act(x, 4, None, None, 1e-5, None, "relu")
        )
    assert [r.levelno for r in caplog.records if NO_COMPILER in r.message] == [logging.WARNING]
    assert any("group_norm" in target for target in targets)
    assert not any("gn_detect" in target for target in targets)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("channels_last, padded", [(False, True), (True, False), (True, True)])
def test_check_changes_nothing_and_needs_nothing(channels_last, padded):
    """It may come in the middle of anything."""
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"), rebuild_norms(), torch.device("meta"):
        failed = kernel_check.failure(torch.device("cpu"), torch.bfloat16, channels_last, padded)
    assert failed == ""
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("memory", MODES)
def test_first_use_in_a_block_of_any_mode(memory, caplog):
    x = maps()

    def block(x):
        return group_norm_act(x, 4, activation="relu", kernel="triton") * 2

    run_block(memory, block, x).sum().backward()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    expected = 2 * group_norm_act(x, 4, activation="relu", kernel="torch")
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.sum(), x)[0])


def test_memory_that_is_out_says_nothing_of_the_kernels(spoil):
    def out_of_memory(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spoil("resident", out_of_memory)
    for _ in range(2):  # not remembered
        with pytest.raises(torch.OutOfMemoryError):
            group_norm_act(maps(), 4)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("processors", [16, 132])
def test_shapes_of_the_check_go_both_ways(channels_last, processors):
    resident, split = (
        kernels.plan(channels_last, n, c, groups, h * w, processors)
        for (n, c, h, w), groups in (kernel_check.RESIDENT, kernel_check.SPLIT)
    )
    assert resident.resident and not split.resident
    assert split.splits > 1 and split.chunks > 1
    # Of padded maps, what is read is found otherwise where several pixels are read at a time.
    assert channels_last or (resident.vec == 16 and split.vec > 1)


def test_fake_tensors_are_not_checked(monkeypatch):
    """Of a model without memory, on a device that need not be there."""
    monkeypatch.setattr(kernel_check, "failure", None)
    with FakeTensorMode(), torch.device("cuda"):
        assert group_norm_act(torch.empty(2, 8, 3, 5), 4).shape == (2, 8, 3, 5)
