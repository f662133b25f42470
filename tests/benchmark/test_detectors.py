"""The variants are what they are called, and differ in nothing else."""

import dataclasses

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from helpers import TINY
from torch import nn

import gn_detect
from gn_detect.benchmark.detectors import (
    DETECTRON2_GN,
    FROZEN_BN,
    VARIANTS,
    Detector,
    Settings,
    peak_bytes,
    synthetic_batch,
    variant_config,
)
from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.modeling.blocks import Block

pytestmark = pytest.mark.usefixtures("one_thread")

# Of these, but for the keys that the benchmark sets.
NODES = ("MODEL.FPN", "MODEL.RPN", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_MASK_HEAD")
PAIRS = zip(TINY[::2], TINY[1::2], strict=True)
OPTS = tuple(str(word) for pair in PAIRS if pair[0].startswith(NODES) for word in pair)
SETTINGS = Settings(
    gn_detect.get_config_file("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"),
    opts=OPTS,
    size=(64, 96),
    rois=16,
)


@pytest.fixture(scope="module")
def detectors():
    return {variant: Detector(variant, SETTINGS) for variant in VARIANTS}


def test_norms(detectors):
    """ResNet-18: 20 in the backbone; FPN 8, box head 4, mask head 4."""
    modules = {name: list(d.model.modules()) for name, d in detectors.items()}
    for name, of_model in modules.items():
        frozen = sum(isinstance(m, FrozenBatchNorm2d) for m in of_model)
        groups = [m.num_groups for m in of_model if isinstance(m, nn.GroupNorm)]
        assert (frozen, groups) == ((20, []) if name == FROZEN_BN else (0, [32] * 36))
        own = [m for m in of_model if type(m).__module__.startswith("gn_detect")]
        assert bool(own) == name.startswith("ours-")
        assert sum(isinstance(m, GroupNorm) for m in own) == (36 if own else 0)
        blocks = [m for m in own if isinstance(m, Block)]
        blocks = [b for b in blocks if any(isinstance(m, GroupNorm) for m in b.modules())]
        assert len(blocks) == (11 if own else 0)  # stem, 8 residual blocks, 2 heads
        memory = {block.memory for block in blocks}
        assert memory == ({name.removeprefix("ours-")} if own else set())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in of_model)


def test_the_same_head_and_weights(detectors):
    weights = {name: d.model.state_dict() for name, d in detectors.items()}
    expected = weights[DETECTRON2_GN]
    for name, detector in detectors.items():
        heads = detector.model.roi_heads
        assert isinstance(heads.box_head, FastRCNNConvFCHead)
        assert isinstance(heads.mask_head, MaskRCNNConvUpsampleHead)
        assert (len(heads.box_head.conv_norm_relus), len(heads.box_head.fcs)) == (4, 1)
        if name != FROZEN_BN:
            assert expected.keys() == weights[name].keys()
        convolutions = [key for key in expected if expected[key].dim() == 4]
        assert len(convolutions) == 20 + 8 + 3 + 4 + 4 + 2  # RPN has three, the mask predictor two
        for key in convolutions:
            torch.testing.assert_close(weights[name][key], expected[key], rtol=0, atol=0)


def test_losses_are_detectron2s_and_the_rois_of_all_are_the_same(detectors):
    losses = {}
    for name, detector in detectors.items():
        losses[name] = detector.forward().item()
        assert detector.rois == [2 * 16, 2 * 4]
    for name in losses.keys() - {FROZEN_BN}:
        assert losses[name] == pytest.approx(losses[DETECTRON2_GN], rel=1e-4)


@pytest.mark.parametrize("amp", ["none", "float16", "bfloat16"])
def test_step(amp):
    detector = Detector("ours-balanced", dataclasses.replace(SETTINGS, amp=amp))
    dtypes = set()
    detector.model.backbone.bottom_up.res2.register_forward_hook(
        lambda _, inputs, output: dtypes.add(output.dtype)
    )
    before = detector.state_bytes()
    detector.step()
    parameters = list(detector.model.parameters())
    assert all(p.grad is None for p in parameters)
    # The optimizer has taken a step: a momentum for each parameter.
    assert detector.state_bytes() - before >= sum(p.nbytes for p in parameters)
    assert dtypes == {{"none": torch.float32}.get(amp) or getattr(torch, amp)}
    detector.check_no_step_was_left_out()


def test_a_step_that_was_left_out_is_an_error():
    detector = Detector("ours-fast", dataclasses.replace(SETTINGS, amp="float16"))
    conv = detector.model.backbone.bottom_up.stem.conv1
    conv.weight.register_hook(lambda gradient: gradient * float("inf"))
    detector.step()
    with pytest.raises(FloatingPointError, match="gradients overflowed float16"):
        detector.check_no_step_was_left_out()
    detector.use(detector.settings)  # which starts anew
    detector.check_no_step_was_left_out()


def test_peak_is_that_of_a_detector_alone(monkeypatch):
    """What a step adds to the 700 bytes that are there, which are also other detectors', and what
    this one has itself. Before the step that counts there was one, which made the momentum."""
    calls = []

    class Alone:
        settings = dataclasses.replace(SETTINGS, device="cuda")

        def step(self):
            calls.append("step")

        def state_bytes(self):
            return 30

    fake = {
        "synchronize": lambda: calls.append("synchronize"),
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "memory_allocated": lambda: calls.append("before") or 700,
        "max_memory_allocated": lambda: calls.append("peak") or 1000,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert peak_bytes(Alone()) == 1000 - 700 + 30
    assert calls == ["step", "synchronize", "reset", "before", "step", "synchronize", "peak"]
    Alone.settings = SETTINGS
    assert peak_bytes(Alone()) is None


def test_frozen_bn_normalizes(detectors):
    detector, seen = detectors[FROZEN_BN], {}
    norms = {
        name: m for name, m in detector.model.named_modules() if isinstance(m, FrozenBatchNorm2d)
    }
    for name, norm in norms.items():
        norm.register_forward_hook(
            lambda _, inputs, output, name=name: seen.__setitem__(name, output.double())
        )
    with torch.no_grad():
        detector.model.backbone(detector.model.preprocess_image(detector.batch).tensor)
    assert seen.keys() == norms.keys()
    for name, output in seen.items():
        variance, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        assert mean.abs().max() < 1e-3, name
        assert (variance - 1).abs().median() < 1e-3, name  # median: eps makes small ones smaller


def test_inference_gives_as_many_masks_as_it_may(detectors):
    for detector in detectors.values():
        detector.model.eval()
        (first, second) = detector.infer()
        detector.model.train()
        limit = detector.model.roi_heads.box_predictor.test_topk_per_image
        for found in (first["instances"], second["instances"]):
            assert 0 < len(found) <= limit
            assert found.pred_masks.shape == (len(found), 64, 96)
            assert set(found.pred_classes.tolist()) == {0}


@pytest.mark.parametrize("whose", ["all", "ours"])
@pytest.mark.parametrize("variant", [FROZEN_BN, DETECTRON2_GN, "ours-lean"])
def test_channels_last(variant, whose, detectors):
    detector = Detector(variant, dataclasses.replace(SETTINGS, channels_last=whose))
    expected = whose == "all" or variant.startswith("ours-")
    for map_ in detector.model.backbone.bottom_up(torch.zeros(2, 3, 64, 96)).values():
        assert map_.is_contiguous(memory_format=torch.channels_last) == expected
        assert map_.is_contiguous() != expected
    expected = detectors[variant].forward().item()
    assert detector.forward().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.GN.MEMORY", "lean"),
        ("MODEL.GN.NUM_GROUPS", "16"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.RESNETS.NORM", "BN"),
    ],
)
def test_keys_of_the_benchmark_are_refused(key, value):
    for variant in VARIANTS:
        with pytest.raises(ConfigError, match=f"{key} is set by the benchmark itself"):
            variant_config(variant, dataclasses.replace(SETTINGS, opts=(*OPTS, key, value)))


def test_a_config_file_adds_no_norms(tmp_path):
    """Of ours, which Detectron2 would not build."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"_BASE_: {SETTINGS.config_file}\n"
        "MODEL: {GN: {EPS: 0.1, ZERO_INIT_RESIDUAL: True}, RPN: {NORM: GN},"
        " ROI_BOX_HEAD: {FC_NORM: GN}, ROI_MASK_HEAD: {DECONV_NORM: GN}}\n"
    )
    settings = dataclasses.replace(SETTINGS, config_file=str(path))
    others, ours = (Detector(variant, settings) for variant in (DETECTRON2_GN, "ours-fast"))
    assert others.model.state_dict().keys() == ours.model.state_dict().keys()
    assert others.forward().item() == pytest.approx(ours.forward().item(), rel=1e-4)


def test_on_cuda_ours_has_to_be_triton():
    settings = dataclasses.replace(SETTINGS, device="cuda")
    assert variant_config("ours-lean", settings).MODEL.GN.KERNEL == "triton"
    assert variant_config("ours-lean", SETTINGS).MODEL.GN.KERNEL == "torch"


def test_synthetic_batch():
    batch = synthetic_batch(SETTINGS)
    assert [item["image"].shape for item in batch] == [(3, 64, 96)] * 2
    for item in batch:
        boxes, masks = item["instances"].gt_boxes.tensor, item["instances"].gt_masks
        assert len(boxes) == 4
        assert (boxes >= 0).all() and (boxes[:, 2] <= 96).all() and (boxes[:, 3] <= 64).all()
        torch.testing.assert_close(masks.get_bounding_boxes().tensor, boxes)
    again = synthetic_batch(SETTINGS)
    assert torch.equal(batch[0]["image"], again[0]["image"])
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


@pytest.mark.parametrize(
    "name, key",
    [
        ("COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml", "MODEL.BACKBONE.NAME"),
        ("COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml", "MODEL.ROI_HEADS.NAME"),
        ("COCO-Detection/faster_rcnn_R_50_FPN_gn_1x.yaml", "MODEL.MASK_ON False"),
    ],
)
def test_other_models_are_refused(name, key):
    settings = Settings(gn_detect.get_config_file(name))
    with pytest.raises(ConfigError, match=f"{name}.*{key}.*Mask R-CNNs with FPN"):
        variant_config(DETECTRON2_GN, settings)
