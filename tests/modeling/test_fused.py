"""Fused components in every mode of memory, against the same parameters used one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from helpers import TINY, config, randomize, run_script, training_image
from torch import nn

from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.layers.recompute import MODES
from gn_detect.modeling.fused import Block, GNBasicBlock, GNBottleneckBlock, fuse_norms
from gn_detect.modeling.norm import GroupNormFactory
from gn_detect.modeling.resnet import build_gn_resnet_backbone

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = MODES[1:]
R18 = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
DETECTORS = {
    R18: (*TINY, "MODEL.RPN.NORM", "GN", "MODEL.ROI_MASK_HEAD.DECONV_NORM", "GN"),
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_3x.yaml": TINY,
    "COCO-InstanceSegmentation/mask_rcnn_X_50_32x4d_FPN_gn_ws_2x.yaml": TINY,
    "COCO-InstanceSegmentation/mask_rcnn_R_50x1_bit_FPN_gn_ws_3x.yaml": TINY,
    "COCO-InstanceSegmentation/mask_rcnn_R_50d_v2_FPN_gn_3x.yaml": TINY,
    "COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml": (),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_3x.yaml": (
        *TINY,
        *("MODEL.ROI_KEYPOINT_HEAD.NORM", "GN"),
        *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (32, 32)),
    ),
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.yaml": (
        *TINY,
        *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32),
    ),
}


def losses_and_gradients(model, amp=False, steps=1):
    model.train().zero_grad()
    model.loss_normalizer = 100  # RetinaNet's moving average
    with EventStorage():
        for step in range(steps):
            torch.manual_seed(step)  # proposals and RoIs are sampled
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                losses = model([training_image()])
            sum(losses.values()).backward()
    losses = {name: loss.detach() for name, loss in losses.items()}
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def set_memory(model, memory):
    for module in model.modules():
        if isinstance(module, Block):
            module.memory = memory


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients_of_detectors(name):
    """Bit for bit, in all modes."""
    cfg = config(name, *DETECTORS[name], "INPUT.MASK_FORMAT", "bitmask")
    cfg.MODEL.GN.MEMORY = "lean"
    torch.manual_seed(0)
    model = randomize(build_model(cfg))
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    blocks = [m for m in blocks if any(isinstance(c, GroupNorm) for c in m.modules())]
    assert {m.memory for m in blocks} == {"lean"}
    losses_and_gradients(model)  # in the first pass of RetinaNet, PyTorch adds in another order
    results = {"lean": losses_and_gradients(model)}
    for memory in ("fast", "balanced", "checkpoint"):
        set_memory(model, memory)
        results[memory] = losses_and_gradients(model)
    assert len(results["fast"][1]) > 40
    for memory in OTHERS:
        assert_same(results[memory], results["fast"])


@pytest.mark.parametrize("memory", OTHERS)
@pytest.mark.parametrize("how", ["frozen stages", "bfloat16", "accumulation"])
def test_in_a_training_step(how, memory):
    cfg = config(R18, *TINY, "INPUT.MASK_FORMAT", "bitmask")
    cfg.MODEL.BACKBONE.FREEZE_AT = 3 if how == "frozen stages" else 0
    torch.manual_seed(0)
    model = randomize(build_model(cfg))
    options = {"amp": how == "bfloat16", "steps": 2 if how == "accumulation" else 1}
    expected = losses_and_gradients(model, **options)
    set_memory(model, memory)
    found = losses_and_gradients(model, **options)
    assert_same(found, expected)
    frozen = [n for n in found[1] if ".stem." in n or ".res2." in n or ".res3." in n]
    assert bool(frozen) == (how != "frozen stages")


def test_data_parallel_training(tmp_path):
    """Two processes with other images each: the mean of their gradients, in every mode."""
    script = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet
from torch import nn
from gn_detect.modeling.fused import fuse_norms
from gn_detect.modeling.norm import GroupNormFactory

def train(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for memory in ("fast", "balanced", "lean", "checkpoint"):
        torch.manual_seed(0)
        model = nn.Sequential(*ResNet.make_stage(
            BottleneckBlock, 2, in_channels=8, out_channels=16, bottleneck_channels=8,
            norm=GroupNormFactory(4)))
        fuse_norms(model, memory)
        images = [torch.randn(1, 8, 12, 12) for _ in range(2)]
        (sum(model(image).square().sum() for image in images) / 2).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(images[rank]).square().sum().backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(train, (sys.argv[1],), nprocs=2)
"""
    run_script(script, tmp_path / "store", cwd=tmp_path)


@pytest.mark.parametrize("block, last", [(BottleneckBlock, "conv3"), (BasicBlock, "conv2")])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory", MODES)
def test_blocks_against_detectron2(block, last, stride, memory):
    """Output and gradients of Detectron2's own block with nn.GroupNorm, in float64."""
    torch.manual_seed(0)
    args = {"stride": stride, "norm": lambda channels: nn.GroupNorm(4, channels)}
    if block is BottleneckBlock:
        args["bottleneck_channels"] = 8
    theirs = randomize(block(8, 16, **args)).double()
    ours = block(8, 16, **{**args, "norm": GroupNormFactory(4)}).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    fuse_norms(ours, memory)
    assert type(ours) is (GNBottleneckBlock if block is BottleneckBlock else GNBasicBlock)
    assert getattr(ours, last).norm.activation == "relu" and ours.shortcut.norm.activation is None
    x = torch.randn(2, 8, 9, 10).double().requires_grad_()
    results = []
    for model in (theirs, ours):
        output = model(x)
        results.append(
            [output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]
        )
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_relus_of_a_detector_are_in_its_norms():
    """Of 53 norms in the ResNet all but those of the 4 shortcuts; the 8 of the heads; none of the
    FPN's. Nothing else runs a ReLU but RPN and fully connected and transposed convolutions."""
    cfg = config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml")
    model = build_model(cfg)
    fused = {n for n, m in model.named_modules() if isinstance(m, GroupNorm) and m.activation}
    assert sum("bottom_up" in n for n in fused) == 49
    assert sum("roi_heads" in n for n in fused) == 8
    assert len(fused) == 57
    relus = {n for n, m in model.named_modules() if isinstance(m, nn.ReLU)}
    assert {n.split(".")[-1] for n in relus} == {"activation", "fc_relu1", "deconv_relu"}
    assert [n for n in relus if n.endswith("activation")] == [
        "proposal_generator.rpn_head.conv.activation"
    ]


def test_relus_in_sequences():
    module = nn.Sequential(
        nn.Conv2d(4, 8, 1), GroupNorm(2, 8), nn.ReLU(), Conv2d(8, 8, 1), nn.ReLU()
    )
    module[3].norm = GroupNorm(2, 8)
    randomize(module)
    before, x = copy.deepcopy(module), torch.randn(2, 4, 5, 5)
    fuse_norms(module, "fast")
    assert [type(m) for m in module][2::2] == [nn.Identity, nn.Identity]
    assert torch.equal(module(x), before(x))
    assert module.state_dict().keys() == before.state_dict().keys()


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.leaky_relu(x)


class Doubled(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x)) + self[2](x)


def unusual_sequences():
    norm, conv = GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
    yield "norm in two places", nn.Sequential(norm, nn.Conv2d(8, 8, 1), norm, nn.ReLU())
    yield "convolution in two places", nn.Sequential(conv, GroupNorm(2, 8), conv, nn.ReLU())
    yield "subclass of ReLU", nn.Sequential(GroupNorm(2, 8), Leaky())
    yield "forward of its own", Doubled(nn.Conv2d(8, 8, 1), GroupNorm(2, 8), nn.ReLU())
    shared = Conv2d(8, 8, 1, norm=norm, activation=F.relu)
    yield "norm of two convolutions", nn.Sequential(shared, Conv2d(8, 8, 1, norm=norm))
    plain = nn.Conv2d(8, 8, 1)
    plain.activation = F.relu  # of which nn.Conv2d knows nothing
    yield "foreign attribute", nn.Sequential(plain)


UNUSUAL = dict(unusual_sequences())


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_known_is_computed_as_before(name):
    module = randomize(UNUSUAL[name])
    x = torch.randn(2, 8, 5, 5)
    expected = module(x)
    fuse_norms(module, "fast")
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("memory", MODES)
def test_hooks_of_convolutions_run(memory):
    """As of weight_norm and pruning, which make the weight anew before each call."""
    torch.manual_seed(0)
    block = BottleneckBlock(8, 16, bottleneck_channels=8, norm=GroupNormFactory(4))
    twin = copy.deepcopy(block)
    fuse_norms(block, memory)
    x = torch.randn(1, 8, 6, 6)
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
    torch.manual_seed(0)
    block = BottleneckBlock(8, 16, bottleneck_channels=8, norm=GroupNormFactory(4))
    fuse_norms(block, memory)
    others = {n: (3 * torch.randn_like(p)).requires_grad_() for n, p in block.named_parameters()}
    x, results = torch.randn(1, 8, 6, 6), []
    output = torch.func.functional_call(block, others, x)
    results.append(torch.autograd.grad(output.square().sum(), list(others.values())))
    block.load_state_dict(others)
    block.memory = "fast"
    results.append(torch.autograd.grad(block(x).square().sum(), list(block.parameters())))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", [F.leaky_relu, nn.SiLU()])
def test_other_activations_stay(activation):
    conv = Conv2d(4, 8, 1, norm=GroupNorm(2, 8), activation=activation)
    fuse_norms(conv, "fast")
    assert conv.activation is activation and conv.norm.activation is None


def test_blocks_with_other_norms_stay():
    block = BottleneckBlock(8, 16, bottleneck_channels=8, norm="BN")
    block.conv1.norm = GroupNorm(4, 8)
    fuse_norms(block, "lean")
    assert type(block) is BottleneckBlock and block.conv1.norm.activation is None


def test_a_copy_is_independent():
    """As of weights that are averaged over training."""
    block = BottleneckBlock(8, 16, bottleneck_channels=8, norm=GroupNormFactory(4))
    fuse_norms(block, "lean")
    twin, x = copy.deepcopy(block), torch.randn(1, 8, 6, 6)
    expected = block(x)
    nn.init.zeros_(block.conv3.norm.weight)
    assert torch.equal(twin(x), expected) and not torch.equal(block(x), expected)


@pytest.mark.filterwarnings("ignore")  # of tracing and scripting Detectron2
def test_deployed():
    """Scripted as by Detectron2's export_model.py, and traced: the outputs of the model itself."""
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
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": torch.Tensor,
        "pred_boxes": Boxes,
        "scores": torch.Tensor,
        "pred_classes": torch.Tensor,
        "pred_masks": torch.Tensor,
    }
    scripted = scripting_with_instances(model, fields)
    torch.testing.assert_close(predict(scripted, inputs), expected)
    torch.testing.assert_close(predict(model, inputs), expected)


def test_unknown_mode():
    with pytest.raises(ConfigError, match="MODEL.GN.MEMORY.*'small'; known: fast, balanced, lean"):
        build_gn_resnet_backbone(config(R18, "MODEL.GN.MEMORY", "small"), ShapeSpec(channels=3))


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("cuda", "'cuda'; known: auto, triton, torch"),
        ("triton", "MODEL.DEVICE is 'cpu'; set .*auto"),
    ],
)
def test_kernels_that_cannot_be(kernel, message):
    with pytest.raises(ConfigError, match=f"MODEL.GN.KERNEL.*{message}"):
        build_gn_resnet_backbone(config(R18, "MODEL.GN.KERNEL", kernel), ShapeSpec(channels=3))


def test_components_without_gn_have_no_mode():
    """They would be run twice for nothing."""
    model = build_model(
        config(R18, *TINY, "MODEL.RESNETS.NORM", "BN", "MODEL.GN.MEMORY", "checkpoint")
    )
    modes = {type(m).__name__: m.memory for m in model.modules() if isinstance(m, Block)}
    assert modes == {
        "GNRPNHead": "fast",
        "GNFastRCNNConvFCHead": "checkpoint",
        "GNMaskRCNNConvUpsampleHead": "checkpoint",
    }
