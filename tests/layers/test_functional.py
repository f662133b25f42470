import contextlib
import gc
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from layers.conftest import CUDA
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from gn_detect.benchmark.timing import as_cuda_graph
from gn_detect.layers import GroupNorm, functional, group_norm_act
from gn_detect.layers.padding import Extents
from gn_detect.layers.recompute import rebuild_norms

pytestmark = pytest.mark.slow
G, EPS = 4, 1e-5
PADDED = Extents([(3, 5), (2, 3)], 3, 5)
NCHW, NHWC = torch.contiguous_format, torch.channels_last
NDHWC = torch.channels_last_3d
# (residual, activation)
KINDS = list(itertools.product([False, True], [None, "relu"]))
KINDS_IDS = ["plain", "relu", "residual", "residual+relu"]
LAYOUTS_BY_TURNS = pytest.mark.parametrize(
    "residual, activation, layout",
    [(*kind, (NCHW, NHWC, NHWC, NCHW)[i]) for i, kind in enumerate(KINDS)],
    ids=KINDS_IDS,
)


def inputs(
    residual, dtype=torch.float64, layout=NCHW, shape=(2, 8, 3, 5), trained="xgbr", device="cpu"
):
    """x, gamma, beta and residual or None. No value before a ReLU is near its kink."""
    for seed in itertools.count():
        torch.manual_seed(seed)
        x, r = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
        gamma, beta = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
        if dtype == torch.float64:
            gamma, beta = gamma.double(), beta.double()
        if formula(x, gamma, beta, r if residual else None, None).abs().min() > 1e-3:
            break
    x, r = (t.contiguous(memory_format=layout) for t in (x, r))
    x, gamma, beta, r = (t.to(device) for t in (x, gamma, beta, r))
    for name, tensor in zip("xgbr", (x, gamma, beta, r), strict=True):
        tensor.requires_grad_(name in trained)
    return x, gamma, beta, r if residual else None


def formula(x, gamma, beta, residual, activation, num_groups=G, eps=EPS):
    """Eq. 1 to 7 of the GN paper, in float64."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    groups = x.double().reshape(len(x), num_groups, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    y = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape)
    y = y * gamma.double().view(shape) + beta.double().view(shape)
    y = y if residual is None else y + residual.double()
    return y.clamp(min=0) if activation else y


def call(x, gamma, beta, residual, activation, **kwargs):
    return group_norm_act(x, G, gamma, beta, EPS, residual, activation, **kwargs)


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=CUDA)])
def backend(request, device):
    """Of torch.compile, which has a compiler of the GPU's code with Triton."""
    if request.param == "inductor" and device == "cpu":
        pytest.skip("Inductor is for the GPU")
    return request.param


def given(*tensors):
    return [t for t in tensors if t is not None]


def assert_close_to_formula(y, arguments):
    """Values, and gradients of all that is trained. ``arguments``: of ``formula``."""
    expected = formula(*arguments)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    trained = [t for t in given(*arguments[:4]) if t.requires_grad]
    assert y.requires_grad == bool(trained)
    if trained:
        dy = torch.randn(y.shape).to(y.device)
        gradients = torch.autograd.grad(y, trained, dy)
        of_formula = torch.autograd.grad(expected, trained, dy.double())
        torch.testing.assert_close(gradients, of_formula, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "residual, activation, trained",
    [
        *((*kind, "xgbr") for kind in KINDS),
        (False, None, "x, without affine"),
        (True, "relu", "xr, without affine"),
        (False, "relu", "gb"),
        (True, "relu", "xr"),
    ],
)
def test_derivatives(residual, activation, trained):
    x, gamma, beta, r = inputs(residual, shape=(2, 8, 1, 3), trained=trained)
    if "without" in trained:
        gamma = beta = None
    leaves = [t for t in given(x, gamma, beta, r) if t.requires_grad]

    def function(*_):
        return call(x, gamma, beta, r, activation)

    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("residual, activation", KINDS, ids=KINDS_IDS)
@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_values_dtype_and_layout(residual, activation, layout, dtype, ulp):
    x, gamma, beta, r = inputs(residual, dtype, layout)
    y = call(x, gamma, beta, r, activation)
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    # One rounding of the norm, and one of the sum with the residual.
    torch.testing.assert_close(
        y.double(), formula(x, gamma, beta, r, activation), rtol=2 * ulp, atol=4 * ulp
    )


@pytest.mark.parametrize("num_groups, eps", [(32, 1e-5), (1, 1e-2), (4, 1e-5)])
@pytest.mark.parametrize("shape", [(2, 64, 7, 9), (3, 256), (3, 96, 4), (1, 32, 3, 1, 5)])
def test_equals_the_equations_of_the_paper(shape, num_groups, eps):
    torch.manual_seed(0)
    x, gamma, beta = torch.randn(shape) * 3 + 5, *torch.randn(2, shape[1])
    y = group_norm_act(x, num_groups, gamma, beta, eps)
    expected = formula(x, gamma, beta, None, None, num_groups, eps)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("residual, activation", KINDS, ids=KINDS_IDS)
def test_autocast_leaves_bfloat16_alone(residual, activation):
    x, gamma, beta, r = inputs(residual, torch.bfloat16)
    expected = call(x, gamma, beta, r, activation)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x, gamma, beta, r, activation)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.float().sum().backward()
    assert gamma.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("residual, activation", [(False, None), (True, "relu")])
def test_compiled(residual, activation):
    arguments = *inputs(residual, torch.float32), activation
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*arguments)
    assert_close_to_formula(compiled, arguments)


def test_exported_with_dynamic_height_and_width():
    """As PyTorch's operations, which runtimes know."""
    norm = GroupNorm(G, 8).eval()
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    x = torch.randn(1, 8, 6, 7)
    shapes = {name: {2: height, 3: width} for name in ("x", "residual")} | {"activation": None}
    program = torch.export.export(norm, (x, x + 1, "relu"), dynamic_shapes=shapes)
    program = program.run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"aten.native_group_norm.default", "aten.relu.default"} <= targets
    assert not any("gn_detect" in target for target in targets)
    x, residual = torch.randn(2, 1, 8, 9, 4)
    found = program.module()(x, residual, "relu")
    torch.testing.assert_close(found, norm(x, residual, "relu"))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_traced_without_warnings():
    x, residual = torch.randn(2, 2, 8, 3, 5)
    norm = GroupNorm(G, 8)
    traced = torch.jit.trace(norm, (x, residual))
    x, residual = torch.randn(2, 1, 8, 4, 2)
    assert torch.equal(traced(x, residual), norm(x, residual))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_groups": 3}, r"num_groups 3; x has the shape \[2, 8, 3, 5\]"),
        ({"residual": torch.zeros(2, 8, 3, 1)}, r"residual has the shape \[2, 8, 3, 1\], x \[2, 8"),
        ({"activation": "gelu"}, "activation 'gelu' is unknown"),
        ({"kernel": "cuda"}, "kernel 'cuda' is unknown; one of: auto, triton, torch"),
        ({"extents": Extents([(3, 5)], 3, 5)}, r"maps \[1, 8, 3, 5\], x has \[2, 8, 3, 5\]"),
        ({"kernel": "triton"}, "MODEL.GN.KERNEL is 'triton', but the input is on cpu.*'auto'"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_act(torch.zeros(2, 8, 3, 5), **{"num_groups": 4, **change})


def test_auto_says_once_what_it_took_and_why(caplog):
    functional._decided.cache_clear()
    functional._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "gn_detect"):
        for layout in (NCHW, NHWC):
            group_norm_act(torch.zeros(1, 4, 2, 2).to(memory_format=layout), 2)
    assert [record.message for record in caplog.records] == [
        "GroupNorm with MODEL.GN.KERNEL auto runs torch: the input is on cpu, not on a CUDA device"
    ]


def test_without_triton(monkeypatch):
    """As on machines for which there is no triton."""
    monkeypatch.setattr(functional, "triton_kernels", None)
    x, gamma, beta, _ = inputs(False)
    torch.testing.assert_close(
        call(x, gamma, beta, None, None), formula(x, gamma, beta, None, None)
    )
    with pytest.raises(ValueError, match="triton is not installed"):
        call(x, gamma, beta, None, None, kernel="triton")


# The kernels, run by Triton's interpreter and, where there is one, a GPU, behind autograd and the
# compiler.


@LAYOUTS_BY_TURNS
def test_kernels_behind_autograd(residual, activation, layout, device):
    arguments = *inputs(residual, torch.float32, layout, device=device), activation
    assert_close_to_formula(call(*arguments, kernel="triton"), arguments)


def test_auto_takes_the_kernels(device, caplog):
    functional._decided.cache_clear()
    functional._log_once.cache_clear()
    x, *others = inputs(True, torch.float32, device=device)
    with caplog.at_level(logging.INFO, "gn_detect"):
        call(x, *others, "relu")
    assert [record.message for record in caplog.records] == [
        f"GroupNorm with MODEL.GN.KERNEL auto runs triton: torch.float32 maps on {x.device}"
    ]


@pytest.mark.parametrize(
    "view, layout",
    [
        (lambda x: x[:, :, ::2], NCHW),
        (lambda x: x.transpose(2, 3), NCHW),
        (lambda x: x[..., 1:], NHWC),
    ],
    ids=["every second row", "transposed", "without the first column, channels_last"],
)
def test_kernels_for_maps_that_are_not_dense(view, layout, device):
    x, gamma, beta, _ = inputs(False, torch.float32, layout, (2, 8, 4, 6), device=device)
    arguments = view(x), gamma, beta, None, None
    assert functional.kernel_check.unsupported(*arguments[:3])
    # The copy that the function makes on CUDA alone.
    dense = arguments[0] if device == "cuda" else functional.triton_kernels.dense(arguments[0])
    y = call(dense, *arguments[1:], kernel="triton")
    assert y.is_contiguous(memory_format=layout)
    assert_close_to_formula(y, arguments)


@CUDA
def test_kernels_on_another_stream():
    """Where they come after what is late. On the usual one they would come first."""
    x, *others = trained = inputs(True, torch.float32, device="cuda")
    call(x, *others, "relu", kernel="triton")  # which is checked
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles of the GPU
        y = call(x * 1, *others, "relu", kernel="triton")
        gradients = torch.autograd.grad(y.square().sum(), trained)
    stream.synchronize()
    expected = formula(x, *others, "relu")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(expected.square().sum(), trained)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


@CUDA
def test_kernels_in_a_cuda_graph():
    """Replayed on other values."""
    x, gamma, beta, r = trained = inputs(True, torch.float32, device="cuda")
    found = []

    def run():
        y = call(*trained, "relu", kernel="triton")
        found[:] = y.detach(), *torch.autograd.grad(y.square().sum(), trained)

    replay = as_cuda_graph(run)
    with torch.no_grad():
        for t in (x, r):  # with those of the other image, no value is at the kink
            t.copy_(t.flip(0))
    replay()
    y = formula(*trained, "relu")
    expected = y.float(), *torch.autograd.grad(y.square().sum(), trained)
    torch.testing.assert_close(tuple(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape, layout", [((2, 8, 7), NCHW), ((2, 8, 2, 3, 4), NCHW), ((2, 8, 2, 3, 4), NDHWC)], ids=str
)
def test_kernels_for_maps_of_any_number_of_dimensions(shape, layout, interpreted):
    x, *others = inputs(True, torch.float32, layout, shape)
    y = call(x, *others, "relu", kernel="triton")
    assert y.stride() == x.stride()
    assert_close_to_formula(y, (x, *others, "relu"))


@LAYOUTS_BY_TURNS
def test_kernels_of_padded_maps(residual, activation, layout, device):
    """Each image as if it was alone, in gradients and their gradients, too."""
    x, gamma, beta, r = inputs(residual, torch.float32, layout, device=device)
    mask = PADDED.mask(x.device, x.dtype)
    dy = torch.randn(x.shape).to(device)
    if residual:
        r = (r * mask).detach().requires_grad_()
        dy = dy if activation else dy * mask  # else all of it is the gradient of the residual
    trained = given(x, gamma, beta, r)

    def alone(i, h, w):
        crops = (t if t is None else t[i : i + 1, :, :h, :w] for t in (x, r))
        x_of_image, r_of_image = crops
        y = formula(x_of_image, gamma, beta, r_of_image, activation)
        return F.pad(y, (0, 5 - w, 0, 3 - h))

    expected = torch.cat([alone(i, *size) for i, size in enumerate(PADDED.sizes)])
    y = call(x, gamma, beta, r, activation, extents=PADDED, kernel="triton")
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    results = []
    for z, of_z in ((y, dy), (expected, dy.double())):
        first = torch.autograd.grad(z, trained, of_z, retain_graph=True)
        again = torch.autograd.grad(z, trained, of_z, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), [x, gamma])
        results.append([*first, *second])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", ["xr", "gbr", "r", ""])
def test_kernels_with_frozen_inputs(trained, interpreted):
    arguments = *inputs(True, torch.float32, trained=trained), "relu"
    assert_close_to_formula(call(*arguments, kernel="triton"), arguments)


@pytest.mark.parametrize("residual, activation", KINDS, ids=KINDS_IDS)
def test_gradients_of_gradients_of_kernels(residual, activation, interpreted):
    x, gamma, beta, r = inputs(residual, torch.float32)
    trained = given(x, gamma, beta, r)

    def second(y):
        first = torch.autograd.grad(y, trained, 2 * torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, gamma])

    found = second(call(x, gamma, beta, r, activation, kernel="triton"))
    expected = second(formula(x, gamma, beta, r, activation))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("extents", [None, PADDED], ids=["whole", "padded"])
def test_kernels_rebuild_their_output(extents, device, monkeypatch):
    """In a chain of two norms and convolutions, bit for bit, without its maps."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    x, gamma, beta, _ = inputs(False, torch.float32, device=device)
    weight = torch.randn(8, 8, 1, 1).to(device).requires_grad_()
    trained, maps, results = [x, gamma, beta, weight], [], []

    def layer(x):
        y = call(x, gamma, beta, None, "relu", extents=extents, kernel="triton")
        maps.append(y.untyped_storage()._weak_ref())
        return F.conv2d(y, weight)

    for rebuild in (False, True):
        maps.clear()
        with rebuild_norms() if rebuild else contextlib.nullcontext():
            output = layer(layer(x))
        gc.collect()
        alive = [not torch.UntypedStorage._expired(ref) for ref in maps]
        assert alive == [not rebuild] * 2
        results.append([output, *torch.autograd.grad(output.square().sum(), trained)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("residual, activation", KINDS, ids=KINDS_IDS)
def test_fake_tensors_of_cuda(residual, activation):
    """A model without memory, on a device that need not be there."""
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 8, 3, 5, dtype=torch.bfloat16, requires_grad=True)
        gamma, beta = (torch.empty(8, requires_grad=True) for _ in range(2))
        r = torch.empty(2, 8, 3, 5, requires_grad=True) if residual else None
        y = call(x, gamma, beta, r, activation, kernel="triton")
    assert (y.shape, y.dtype, y.stride(), y.device) == (x.shape, x.dtype, x.stride(), x.device)
    assert y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma_dtype, beta_dtype", [(torch.float32, None), (None, torch.float32)])
def test_gamma_and_beta_of_another_dtype(dtype, gamma_dtype, beta_dtype):
    x, gamma, beta, _ = inputs(False, dtype)
    gamma = gamma.to(gamma_dtype) if gamma_dtype else None
    beta = beta.to(beta_dtype) if beta_dtype else None
    y = call(x, gamma, beta, None, None)
    gamma = torch.ones(8) if gamma is None else gamma
    beta = torch.zeros(8) if beta is None else beta
    assert y.dtype == dtype
    expected = formula(x, gamma, beta, None, None)
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)


@LAYOUTS_BY_TURNS
def test_operator_of_torch_library(residual, activation, layout, interpreted):
    x, gamma, beta, r = inputs(residual, torch.float32, layout)
    valid = PADDED.tensor(x.device) if activation else None
    arguments = (x, gamma, beta, r, G, EPS, activation is not None, valid)
    torch.library.opcheck(functional._operator, arguments)


@pytest.mark.parametrize("relu", [False, True])
def test_operators_whose_residual_alone_is_trained(relu, interpreted):
    x, gamma, beta, r = (t.detach() for t in inputs(True, torch.float32))
    arguments = x, gamma, beta, r.bfloat16().requires_grad_(), G, EPS, relu, None
    torch.library.opcheck(functional._operator, arguments)
    y, mean, rstd = (t.detach() for t in functional._operator(*arguments))
    arguments = (
        x,
        x,
        gamma,
        beta,
        mean,
        rstd,
        y,
        relu,
        torch.bfloat16,
        [False, False, False, relu],
        None,
    )
    torch.library.opcheck(functional._backward_operator, arguments)


@pytest.mark.parametrize("residual, activation", KINDS[1:], ids=KINDS_IDS[1:])
def test_kernels_compiled(residual, activation, device, backend):
    """One graph, with the layout of the input, for all heights and widths."""
    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 3, 5), (1, 8, 4, 7)):
        x, *others = inputs(residual, torch.float32, NHWC, shape, device=device)
        arguments = x, *others, activation
        y = compiled(*arguments, kernel="triton")
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close_to_formula(y, arguments)


def test_kernels_of_padded_maps_compiled(device, backend):
    torch._dynamo.reset()
    x, *others = inputs(False, torch.float32, device=device)
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    extents = Extents(PADDED.sizes, 3, 5)  # whose tensors are made in the graph
    found, expected = (
        function(x, *others, "relu", extents=extents, kernel="triton")
        for function in (compiled, call)
    )
    assert torch.equal(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), [x, *others[:2]]) for y in (found, expected))
    torch.testing.assert_close(*gradients)
