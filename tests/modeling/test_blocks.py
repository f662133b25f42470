"""Fused layers and blocks, against the same parameters used one by one."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.nn.utils.prune
from detectron2.export import TracingAdapter
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from helpers import TINY, config, randomize, training_image
from torch import nn

from gn_detect.layers import GroupNorm, standardize_weight
from gn_detect.layers.padding import Extents, images_in_batch
from gn_detect.layers.recompute import MODES
from gn_detect.modeling import blocks
from gn_detect.modeling.blocks import GNBasicBlock, GNBottleneckBlock, GNConv2d, fuse_norms
from gn_detect.modeling.norm import GroupNormFactory
from gn_detect.modeling.padding import mask_paddings

R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml"
TRACES_CONTEXT = pytest.mark.skipif(
    torch.__version__ < (2, 14), reason="torch.compile cannot trace a ContextVar"
)


def bottleneck(kind=BottleneckBlock, norm=None, **kwargs):
    torch.manual_seed(0)
    norm = norm or GroupNormFactory(4)
    return randomize(kind(8, 16, bottleneck_channels=8, norm=norm, **kwargs))


def image(*shape):
    return torch.randn(*(shape or (1, 8, 6, 6)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("block, ours", [(BottleneckBlock, GNBottleneckBlock), (BasicBlock, None)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory", MODES)
def test_blocks_against_detectron2(block, ours, stride, memory):
    """Output and gradients of Detectron2's own block with nn.GroupNorm, in float64."""
    torch.manual_seed(0)
    args = {"stride": stride, "norm": lambda channels: nn.GroupNorm(4, channels)}
    if block is BottleneckBlock:
        args["bottleneck_channels"] = 8
    theirs = randomize(block(8, 16, **args)).double()
    plain = block(8, 16, **{**args, "norm": GroupNormFactory(4)}).double()
    plain.load_state_dict(theirs.state_dict(), strict=True)
    fused = fuse_norms(plain, memory)
    assert type(fused) is (ours or GNBasicBlock) and fused.memory == memory
    assert type(plain) is block
    x = image(2, 8, 9, 10).double().requires_grad_()
    results = []
    for model in (theirs, fused):
        output = model(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *model.parameters()])
        results.append((output, *gradients))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def r50():
    return build_model(config(R50, "MODEL.DEVICE", "meta"))


def test_a_detector_asks_its_norms_for_their_relus(r50):
    """Of 53 norms in the ResNet all but those of the 4 shortcuts, 16 with a residual; the 8 of the
    heads; none of the FPN's."""
    model, calls = r50, []
    for name, module in model.named_modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: calls.append((name, kwargs)), with_kwargs=True
            )
    model.backbone(torch.empty(1, 3, 64, 64, device="meta"))
    rois = torch.empty(1, 256, 7, 7, device="meta")
    model.roi_heads.box_head(rois)
    model.roi_heads.mask_head.layers(rois)
    relus = [name for name, kwargs in calls if kwargs["activation"] == "relu"]
    assert len(relus) == len(set(relus)) == 57 and len(calls) == 69
    assert sum("bottom_up" in name for name in relus) == 49
    assert sum("roi_heads" in name for name in relus) == 8
    assert sum(kwargs["residual"] is not None for _, kwargs in calls) == 16


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x)


class Doubled(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[2](x)


class Negative(BottleneckBlock):
    def forward(self, x):
        return -super().forward(F.relu(self.conv2(F.relu_(self.conv1(x)))) - x)


class ScaledConv(Conv2d):
    def forward(self, x):
        return 3 * super().forward(x)


class ScaledNorm(GroupNorm):
    def forward(self, x):
        return 3 * super().forward(x)


def unusual():
    norm, conv = GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
    yield "norm in two places", nn.Sequential(norm, nn.Conv2d(8, 8, 1), norm, nn.ReLU())
    yield "convolution in two places", nn.Sequential(conv, GroupNorm(2, 8), conv, nn.ReLU())
    yield "subclass of ReLU", nn.Sequential(GroupNorm(2, 8), Leaky())
    yield "subclass of Sequential", Doubled(nn.Conv2d(8, 8, 1), GroupNorm(2, 8), nn.ReLU())
    yield "subclass of GroupNorm", bottleneck(norm=lambda channels: ScaledNorm(2, channels))
    yield "subclass of Conv2d", ScaledConv(8, 8, 1, norm=GroupNorm(2, 8), activation=F.relu)
    yield "subclass of a block", bottleneck(Negative, stride=1)
    yield "subclass of our block", bottleneck(type("Own", (GNBottleneckBlock,), {}))
    shared = Conv2d(8, 8, 1, norm=norm, activation=F.relu)
    yield "norm of two convolutions", nn.Sequential(shared, Conv2d(8, 8, 1, norm=norm))
    plain = nn.Conv2d(8, 8, 1)
    plain.activation = F.relu  # of which nn.Conv2d knows nothing
    yield "foreign attribute", nn.Sequential(plain, GroupNorm(2, 8))
    yield "leaky ReLU", Conv2d(8, 8, 1, norm=GroupNorm(2, 8), activation=F.leaky_relu)
    yield "activation of its own", Conv2d(8, 8, 1, norm=GroupNorm(2, 8), activation=Leaky())
    yield "two ReLUs", nn.Sequential(nn.ReLU(), GroupNorm(2, 8), nn.ReLU(), nn.ReLU())
    for child, conv in (
        ("conv1", ScaledConv(8, 8, 1, norm=GroupNorm(2, 8))),
        ("conv3", nn.Conv2d(8, 16, 1)),
        ("conv3", Conv2d(8, 16, 1, norm=GroupNorm(2, 16), activation=F.leaky_relu)),
        ("shortcut", nn.Sequential(nn.Conv2d(8, 16, 1), GroupNorm(2, 16), nn.ReLU())),
    ):
        block = bottleneck()
        setattr(block, child, conv)
        yield f"{type(conv).__name__} as {child} of a block", block
    block = bottleneck(norm="BN").eval()
    block.conv1.norm = GroupNorm(4, 8)
    yield "BN in a block", block


UNUSUAL = list(unusual())


@pytest.mark.parametrize("memory", ["fast", "lean"])
@pytest.mark.parametrize("module", [m for _, m in UNUSUAL], ids=[name for name, _ in UNUSUAL])
def test_what_is_not_known_is_computed_as_before(module, memory):
    torch.manual_seed(0)
    module, x = randomize(copy.deepcopy(module)), image(2, 8, 6, 6).requires_grad_()
    expected = module(x)
    gradient = torch.autograd.grad(expected.square().sum(), x)
    found = fuse_norms(module, memory)(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x), gradient)


def test_lists_of_detectron2_hold_what_its_attributes_hold(r50):
    """It runs FPN and heads by lists beside their attributes."""
    fpn, mask_head = r50.backbone, r50.roi_heads.mask_head
    assert fpn.lateral_convs[::-1] == [getattr(fpn, f"fpn_lateral{i}") for i in (2, 3, 4, 5)]
    assert fpn.bottom_up.stages == [getattr(fpn.bottom_up, f"res{i}") for i in (2, 3, 4, 5)]
    assert mask_head.conv_norm_relus == list(mask_head)[:4]
    for convs in (fpn.lateral_convs, fpn.output_convs, mask_head.conv_norm_relus):
        assert {type(conv) for conv in convs} == {GNConv2d}


@pytest.mark.parametrize("variant, eps", [("authors", None), ("timm", None), ("timm", 1e-3)])
def test_weights_of_a_fused_block_can_be_standardized(variant, eps):
    fused, plain, x = fuse_norms(bottleneck()), bottleneck(), image()
    for name in ("conv1", "conv2", "conv3", "shortcut"):
        getattr(fused, name).standardize(variant, eps)
        weight = getattr(plain, name).weight.data
        weight.copy_(standardize_weight(weight, variant, eps))
    torch.testing.assert_close(fused(x), plain(x))
    assert "weight_standardization=" + variant in repr(fused.conv1)
    fused(x).sum().backward()
    assert fused.conv1.weight.grad.sum((1, 2, 3)).abs().max() < 1e-4  # the mean is taken away


def test_unknown_weight_standardization():
    with pytest.raises(ValueError, match="'mmcv' is unknown; one of: authors, timm"):
        GNConv2d(4, 4, 3).standardize("mmcv")


@pytest.mark.parametrize("memory", MODES)
def test_hooks_of_convolutions_run(memory):
    """As of weight_norm and pruning, which make the weight anew before each call."""
    block, twin, x = fuse_norms(bottleneck(), memory), bottleneck(), image()
    for module in (block, twin):
        for conv in (module.conv1, module.conv3, module.shortcut):
            torch.nn.utils.prune.l1_unstructured(conv, "weight", amount=0.5)
            conv.weight_orig.data.mul_(2)
    output, expected = block(x), twin(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(block.conv3.weight_orig.grad, twin.conv3.weight_orig.grad)


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
def test_weights_of_the_call_are_those_of_its_gradient(memory):
    """Not those that the module has when backward runs."""
    block, x = fuse_norms(bottleneck(), memory), image()
    others = {n: (3 * torch.randn_like(p)).requires_grad_() for n, p in block.named_parameters()}
    output = torch.func.functional_call(block, others, x)
    found = torch.autograd.grad(output.square().sum(), list(others.values()))
    block.load_state_dict(others)
    block.memory = "fast"
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    torch.testing.assert_close(found, expected)


def test_lean_runs_1x1_convolutions_again(monkeypatch):
    """Not 3x3, which take longer. Of a bottleneck the last one, and of both the shortcut."""
    again = []
    monkeypatch.setattr(blocks, "rerun", lambda f, x, w, b: again.append(w.shape[2:]) or f(x, w, b))
    for block in (bottleneck(), BasicBlock(8, 16, norm=GroupNormFactory(4))):
        fuse_norms(block, "lean")(image())
    assert again == [(1, 1)] * 3


def test_a_copy_is_independent():
    """As of weights that are averaged over training."""
    block = fuse_norms(bottleneck(), "lean")
    twin, x = copy.deepcopy(block), image()
    expected = block(x)
    nn.init.zeros_(block.conv3.norm.weight)
    assert torch.equal(twin(x), expected) and not torch.equal(block(x), expected)


@pytest.mark.parametrize("memory", MODES)
def test_data_parallel_training(memory, request):
    """Its hooks see the gradient of each parameter once, in two steps in a row."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    request.addfinalizer(dist.destroy_process_group)
    block, twin = fuse_norms(bottleneck(), memory), bottleneck()
    parallel, x = nn.parallel.DistributedDataParallel(block), image()
    for _ in range(2):
        for model in (parallel, twin):
            model.zero_grad()
            model(x).square().sum().backward()
        for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        None,
        pytest.param([(32, 40), (32, 40)], marks=TRACES_CONTEXT),
        pytest.param([(20, 40), (32, 30)], marks=TRACES_CONTEXT),
    ],
    ids=["not masked", "whole", "padded"],
)
@pytest.mark.parametrize("memory", ["lean", "checkpoint"])
def test_compiled_and_exported(memory, sizes):
    network = nn.Sequential(
        BasicStem(8, 8, norm=GroupNormFactory(4)),
        bottleneck(),
        nn.Sequential(nn.Conv2d(16, 8, 1), GroupNorm(2, 8), nn.ReLU()),
    )
    network, x = fuse_norms(network, memory), image(2, 8, 32, 40)
    if sizes:
        mask_paddings(network)
    with images_in_batch(Extents(sizes, 32, 40) if sizes else None):
        expected = torch.autograd.grad(network(x).square().sum(), list(network.parameters()))
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)(x)
        found = torch.autograd.grad(compiled.square().sum(), list(network.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            program = torch.export.export(network.eval(), (x,))
            torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of tracing Detectron2
def test_traced():
    cfg = config(R18, *TINY, "MODEL.GN.MEMORY", "lean", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
    torch.manual_seed(0)
    model = randomize(build_model(cfg)).eval()
    image = training_image()["image"]

    @torch.no_grad()
    def predict(model, inputs):
        (instances,) = model.inference(inputs, do_postprocess=False)
        return [instances.scores, instances.pred_masks]

    inputs = [{"image": image}]
    expected = predict(model, inputs)
    assert len(expected[0]) > 0
    traced = torch.jit.trace(TracingAdapter(model, inputs, predict), (image,))
    torch.testing.assert_close(list(traced(image)), expected)


def test_a_layer_in_two_places_stays_one():
    conv = Conv2d(4, 4, 1, norm=GroupNorm(2, 4))
    module = fuse_norms(nn.Sequential(conv, nn.ReLU(), conv))
    assert isinstance(module[0], GNConv2d) and module[0] is module[2]


def test_a_norm_whose_forward_was_exchanged_is_called_as_any_other():
    block = fuse_norms(bottleneck())
    expected = block(image())
    for conv in (block.conv1, block.conv3):
        conv.norm.forward = nn.GroupNorm.forward.__get__(conv.norm)
    torch.testing.assert_close(block(image()), expected)
