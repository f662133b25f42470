"""The Triton kernels as compiled for sm_80 and sm_90, which needs no GPU: what the interpreter of
``test_triton_kernels.py`` cannot see. The launches are those of the layers of Mask R-CNN R50-FPN at
800 x 1344, 2 images."""

import collections
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

triton = pytest.importorskip("triton", minversion="3.4")  # has knobs

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gn_detect.layers import triton_kernels as kernels  # noqa: E402
from gn_detect.layers import triton_launch, triton_plan  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
NCHW, NHWC = torch.contiguous_format, torch.channels_last

# Shape, with a residual, ReLU; one of each kind of plan of the 69 layers
STEM = (2, 64, 400, 672), False, True
RES2 = (2, 256, 200, 336), True, True  # conv3
RES4 = (2, 1024, 50, 84), True, True  # conv3: H * W = 8 * 525
RES5 = (2, 2048, 25, 42), False, False  # shortcut: H * W = 2 * 525
BOX = (1024, 256, 7, 7), False, True
MASK = (256, 256, 14, 14), False, True
P6 = (2, 256, 12, 16), False, False  # the only maps without RoIs that are resident


class Launch(collections.namedtuple("Launch", "kernel args warps")):
    """A launch of a kernel on tensors of the meta device, to be compiled."""

    def compile(self, arch):
        """PTX and resources of the kernel, specialized as Triton would for these arguments."""
        signature, constants, attributes = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(self.kernel.params, self.args, strict=True)):
            known = not parameter.do_not_specialize
            one = known and type(value) is int and value == 1
            if parameter.is_constexpr or value is None or one:
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                signature[parameter.name] = "i32"
                if known and value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        return triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": self.warps},
        )

    def named(self):
        """The arguments by their names."""
        return dict(zip((p.name for p in self.kernel.params), self.args, strict=True))

    def __str__(self):
        sizes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in self.args]
        return f"{self.kernel.__name__}{sizes} with {self.warps} warps"


@pytest.fixture
def launches(intercept):
    def record(
        shape, with_residual, relu, dtype, layout,
        groups=32, residual_dtype=None, affine_dtype=torch.float32, padded=False,
    ):  # fmt: skip
        found = []
        intercept(lambda kernel, _, *args, num_warps: found.append(Launch(kernel, args, num_warps)))
        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        weight = affine_dtype and torch.empty(shape[1], dtype=affine_dtype, device="meta")
        residual = x.to(residual_dtype or dtype) if with_residual else None
        valid = torch.empty(len(x), 2, dtype=torch.int32, device="meta") if padded else None
        y, mean, rstd = kernels.forward(x, groups, weight, weight, 1e-5, residual, relu, valid)
        residual_dtype = residual.dtype if with_residual else None
        kernels.backward(x, x, y, mean, rstd, weight, weight, relu, residual_dtype, valid=valid)
        return found

    return record


def resources(compiled, tmp_path):
    """Registers, and bytes of stack and local memory per thread, from the bundled cuobjdump."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    out = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", out.stdout)
    assert found, out.stdout
    return tuple(map(int, found.groups()))


def wide_accesses(compiled):
    """128-bit loads and stores of global memory in the PTX."""
    ptx = compiled.asm["ptx"]
    return tuple(
        len(re.findall(rf"{op}\.global(?:\.\w+(?:::\w+)*)*\.v4\.b32", ptx)) for op in ("ld", "st")
    )


def expected_accesses(launch):
    """Least 128-bit loads and stores that move this launch's tiles: one per 16 bytes."""
    names = launch.named()
    channels = names["GB"] * names["DP"] if "DP" in names else names["CB"]
    elements = channels * names["P"] // (32 * launch.warps)
    size = names["x"].element_size()
    reads, writes = ("x", "dy", "residual"), ("dz", "dx", "y")
    if "dy" in names:
        reads, writes = ("x", "dy", "y"), ("dz", "dx")
    return tuple(
        sum(names.get(name) is not None for name in some) * elements * size // 16
        for some in (reads, writes)
    )


@pytest.mark.parametrize(
    "arch, dtype, layout, layers, padded",
    [
        (90, torch.bfloat16, NHWC, (STEM, RES2, RES4, RES5, BOX, MASK), False),
        (90, torch.float32, NCHW, (RES4, RES5, BOX), False),
        (80, torch.float32, NHWC, (RES2, BOX), False),
        (80, torch.bfloat16, NCHW, (STEM, MASK), False),
        (90, torch.bfloat16, NHWC, (RES4, P6), True),
        (80, torch.float32, NCHW, (RES4, P6), True),
    ],
    ids=[
        "sm_90 bf16 NHWC",
        "sm_90 fp32 NCHW",
        "sm_80 fp32 NHWC",
        "sm_80 bf16 NCHW",
        "sm_90 bf16 NHWC padded",
        "sm_80 fp32 NCHW padded",
    ],  # fmt: skip
)
def test_kernels_of_the_model(launches, tmp_path, arch, dtype, layout, layers, padded):
    """Nothing is spilled, two programs and 12 of 64 possible warps at least fit a multiprocessor,
    and accesses are 128 bits wide where H * W allows."""
    for layer in layers:
        shape = layer[0]
        alignment = 16 if layout is NHWC else shape[2] * shape[3] & -(shape[2] * shape[3])
        for launch in launches(*layer, dtype, layout, padded=padded):
            binary = launch.compile(arch)
            registers, stack, local = resources(binary, tmp_path)
            assert stack == local == 0, f"{launch} spills registers"
            programs = 65536 // (registers * 32 * launch.warps)
            assert programs >= 2, f"{launch}: {registers} registers"
            assert programs * launch.warps >= 12, f"{launch}: {registers} registers"
            if alignment * dtype.itemsize >= 16:
                for found, least in zip(
                    wide_accesses(binary), expected_accesses(launch), strict=True
                ):
                    assert found >= least, f"{launch}: {found} accesses of 128 bits, not {least}"


@pytest.mark.parametrize(
    "arch, dtype, padded", [(90, torch.bfloat16, True), (80, torch.float32, False)]
)
def test_few_groups_do_not_spill(launches, tmp_path, arch, dtype, padded):
    """The 2048 partial sums of a group, which other kernels than these add up."""
    found = launches(*RES5, dtype, NCHW, groups=1, padded=padded)
    assert [launch.named()["R"] for launch in found] == [2048, 1, 2048, 1]
    for launch in found:
        _, stack, local = resources(launch.compile(arch), tmp_path)
        assert stack == local == 0, f"{launch} spills registers"


@pytest.mark.parametrize("shape", [(2, 64, 200, 336), (64, 256, 14, 14)], ids=str)
@pytest.mark.parametrize("with_residual, relu", [(True, True), (False, True), (True, False)])
def test_tensors_that_backward_reads(launches, shape, with_residual, relu):
    """y for the mask of ReLU after a residual, and only once: dz, the residual's gradient, serves
    the second kernel."""
    found = launches(shape, with_residual, relu, torch.bfloat16, NHWC)
    backward = [names for names in map(Launch.named, found) if "dy" in names]
    masked = with_residual and relu
    assert [names["y"] is not None for names in backward] == [masked, False][: len(backward)]
    assert (backward[0]["dz"] is not None) == masked
    if masked and len(backward) == 2:
        assert backward[1]["dy"] is backward[0]["dz"] and not backward[1]["RELU"]


@pytest.mark.parametrize(
    "layout, groups, shape, dtypes, with_affine",
    [
        (NHWC, 32, (2, 96, 40, 60), (torch.float16, torch.float32), True),  # 3 channels per group
        (NCHW, 32, (2, 96, 41, 61), (torch.float16, torch.float32), False),
        (NHWC, 1, (2, 2048, 25, 42), (torch.bfloat16, torch.bfloat16), True),  # as LayerNorm
        (NHWC, 256, (2, 256, 50, 84), (torch.float32, torch.bfloat16), False),  # as InstanceNorm
        (NCHW, 3, (8, 24, 1, 1), (torch.float16, torch.float16), True),
    ],
    ids=str,
)
def test_unusual_layers_compile(launches, layout, groups, shape, dtypes, with_affine):
    """Types and shapes that the interpreter would not mind. dtypes: of x, of the residual."""
    dtype, residual_dtype = dtypes
    affine_dtype = dtype if with_affine else None
    found = launches(shape, True, True, dtype, layout, groups, residual_dtype, affine_dtype)
    assert len(found) in (2, 4)
    for launch in found:
        launch.compile(90)


def test_padded_maps_of_few_pixels_compile(launches):
    """A tile, or half of it, would be less than what is read at a time, 16 pixels."""
    for launch in launches((2, 1024, 4, 4), True, True, torch.bfloat16, NCHW, 1, padded=True):
        launch.compile(90)


@pytest.fixture
def launched(monkeypatch, copy_of_device):
    """What is launched on a GPU that need not be there, by a copy of the device code: the machine
    code, programs and arguments."""
    found = []

    def launcher(source, metadata):
        return lambda x, y, z, stream, function, packed, what, enter, leave, *arguments: (
            found.append((function, (x, y, z), arguments))
        )

    utils = SimpleNamespace(  # None: no module, to be unloaded in the end
        load_binary=lambda name, binary, *_: (None, (name, binary), 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 2**17},
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(kernels, "device", copy_of_device("launched"))
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return found


@pytest.mark.parametrize("resident", [8192, 0], ids=["resident", "split"])
def test_what_was_compiled_is_launched_again(launched, monkeypatch, resident):
    monkeypatch.setattr(triton_plan, "RESIDENT", resident)
    monkeypatch.setattr(kernels, "plan", kernels.plan.__wrapped__)

    def run(
        shape, dtype=torch.float32, layout=NHWC, offset=0, residual=None, affine=True, valid=None
    ):
        count = torch.Size(shape).numel()
        x = torch.empty(count + offset, dtype=dtype)[offset:]
        n, c, h, w = shape
        x = x.view(n, h, w, c).permute(0, 3, 1, 2) if layout is NHWC else x.view(shape)
        weight = torch.empty(c) if affine else None
        start = len(launched)
        add = None if residual is None else x.to(residual)
        y, mean, rstd = kernels.forward(x, 2, weight, weight, 1e-5, add, True, valid)
        if offset == 0:
            kernels.apply(x, mean, rstd, weight, weight, True, valid)
        kernels.backward(x, x, y, mean, rstd, weight, weight, True, residual, valid=valid)
        return [
            (function, programs, [a.dtype if isinstance(a, torch.Tensor) else a for a in arguments])
            for function, programs, arguments in launched[start:]
        ]

    base = {"shape": (2, 32, 4, 6)}
    cases = [
        base,
        {"shape": (1, 32, 3, 7)},
        {"shape": (2, 6, 4, 6)},
        base | {"dtype": torch.bfloat16},
        base | {"offset": 1},
        base | {"residual": torch.float16},
        base | {"affine": False},
        base | {"layout": NCHW},
        base | {"valid": torch.ones(2, 2, dtype=torch.int32)},
        {"shape": (2, 32, 1, 1), "valid": torch.ones(2, 2, dtype=torch.int32)},
    ]
    first = [run(**case) for case in cases]
    kept = dict(triton_launch._compiled)
    again = [run(**case) for case in cases]
    assert kept and triton_launch._compiled == kept
    monkeypatch.setattr(
        kernels, "launch", lambda kernel, n, warps, *a: kernel[(n,)](*a, num_warps=warps)
    )
    assert first == again == [run(**case) for case in cases]
