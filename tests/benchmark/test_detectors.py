"""The variants are what they are called, and differ in nothing else."""

import dataclasses

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn

from gn_detect.benchmark.detectors import (
    DETECTRON2_GN,
    FROZEN_BN,
    VARIANTS,
    Detector,
    synthetic_batch,
    variant_config,
)
from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def detectors(settings):
    return {variant: Detector(variant, settings) for variant in VARIANTS}


def test_norms_and_heads(detectors):
    """ResNet-18: 20 norms in the backbone; FPN 8, box head 4, mask head 4."""
    for name, detector in detectors.items():
        modules = list(detector.model.modules())
        frozen = sum(isinstance(m, FrozenBatchNorm2d) for m in modules)
        groups = [m.num_groups for m in modules if isinstance(m, nn.GroupNorm)]
        assert (frozen, groups) == ((20, []) if name == FROZEN_BN else (0, [32] * 36))
        ours = name.startswith("ours-")
        assert sum(isinstance(m, GroupNorm) for m in modules) == 36 * ours
        assert any(type(m).__module__.startswith("gn_detect") for m in modules) == ours
        heads = detector.model.roi_heads
        assert isinstance(heads.box_head, FastRCNNConvFCHead)
        assert isinstance(heads.mask_head, MaskRCNNConvUpsampleHead)
        assert (len(heads.box_head.conv_norm_relus), len(heads.box_head.fcs)) == (4, 1)


def test_weights_rois_and_losses_are_the_same(detectors):
    expected = detectors[DETECTRON2_GN].model.state_dict()
    losses = {}
    for name, detector in detectors.items():
        heads, rois = detector.model.roi_heads, []
        hooks = [
            head.register_forward_pre_hook(lambda _, inputs, rois=rois: rois.append(len(inputs[0])))
            for head in (heads.box_head, heads.mask_head)
        ]
        losses[name] = detector.forward().item()
        assert rois == [2 * 16, 2 * 4]
        for hook in hooks:
            hook.remove()
        weights = detector.model.state_dict()
        if name != FROZEN_BN:
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[key], value) for key, value in expected.items())
            assert losses[name] == pytest.approx(losses[DETECTRON2_GN], rel=1e-4)
        assert variant_config(name, detector.settings).MODEL.BACKBONE.FREEZE_AT == 0
        assert all(p.requires_grad for p in detector.model.parameters())


def test_maps_without_trained_norms_fit_float16(detectors):
    detector = detectors[FROZEN_BN]
    with torch.no_grad():
        maps = detector.model.backbone(detector.model.preprocess_image(detector.batch).tensor)
    assert all(1e-3 < map_.std() < 100 for map_ in maps.values())


def test_inference_gives_masks_of_one_class(detectors):
    for detector in detectors.values():
        detector.model.eval()
        found = detector.infer()
        detector.model.train()
        assert len(found) == 2
        for instances in (result["instances"] for result in found):
            assert len(instances) > 0
            assert instances.pred_masks.shape == (len(instances), 64, 96)
            assert set(instances.pred_classes.tolist()) == {0}


def test_a_step_under_autocast(settings):
    detector = Detector("ours-balanced", dataclasses.replace(settings, amp="bfloat16"))
    dtypes = set()
    detector.model.backbone.bottom_up.res2.register_forward_hook(
        lambda _, inputs, output: dtypes.add(output.dtype)
    )
    detector.step()
    assert dtypes == {torch.bfloat16}
    parameters = list(detector.model.parameters())
    assert all(p.grad is None for p in parameters)
    # The optimizer has taken a step: a momentum for each parameter.
    assert len(detector.optimizer.state) == len(parameters)
    # What an overflow leaves behind ends the next step.
    torch.nn.init.constant_(
        detector.model.proposal_generator.rpn_head.anchor_deltas.bias, torch.nan
    )
    with pytest.raises(FloatingPointError, match="Training has diverged"):
        detector.step()


def test_on_cuda_ours_has_to_be_triton(settings):
    on_cuda = dataclasses.replace(settings, device="cuda")
    assert variant_config("ours-lean", on_cuda).MODEL.GN.KERNEL == "triton"
    assert variant_config("ours-lean", settings).MODEL.GN.KERNEL == "torch"


def test_peak_is_that_of_a_detector_alone(detectors, monkeypatch):
    """What a step adds to the 700 bytes that are there, which are also other detectors', and what
    this one has itself. Before the step that counts there is one, which makes the momentum."""
    detector, calls = detectors["ours-lean"], []

    def fake(name, value):
        monkeypatch.setattr(torch.cuda, name, lambda: calls.append(name) or value)

    fake("reset_peak_memory_stats", None)
    fake("memory_allocated", 700)
    fake("max_memory_allocated", 1000)
    step = detector.step
    monkeypatch.setattr(detector, "step", lambda: calls.append("step") or step())
    own = sum(t.nbytes for t in detector.model.state_dict().values())
    momentum = sum(p.nbytes for p in detector.model.parameters())
    assert detector.peak_bytes() == 1000 - 700 + own + momentum
    before = ["step", "reset_peak_memory_stats", "memory_allocated"]
    assert calls == [*before, "step", "max_memory_allocated"]


@pytest.mark.parametrize(
    "variant, whose, expected",
    [(FROZEN_BN, "all", True), (DETECTRON2_GN, "ours", False), ("ours-lean", "ours", True)],
)
def test_channels_last(variant, whose, expected, settings, detectors):
    detector = Detector(variant, dataclasses.replace(settings, channels_last=whose))
    for map_ in detector.model.backbone.bottom_up(torch.zeros(2, 3, 64, 96)).values():
        assert map_.is_contiguous(memory_format=torch.channels_last) == expected
        assert map_.is_contiguous() != expected
    expected = detectors[variant].forward().item()
    assert detector.forward().item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.GN.EPS", "0.1"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("MODEL.RESNETS.NORM", "BN"),
        ("MODEL.RPN.NORM", "GN"),
    ],
)
def test_keys_of_the_benchmark_are_refused(key, value, settings):
    with pytest.raises(ConfigError, match=f"{key} is set by the benchmark itself"):
        variant_config("ours-fast", dataclasses.replace(settings, opts=(key, value)))


def test_objects_are_in_the_images(settings):
    batch = synthetic_batch(settings)
    assert [item["image"].shape for item in batch] == [(3, 64, 96)] * 2
    assert not torch.equal(batch[0]["image"], batch[1]["image"])
    for item in batch:
        boxes, masks = item["instances"].gt_boxes.tensor, item["instances"].gt_masks
        assert len(boxes) == 4 and boxes.min() >= 0
        assert boxes[:, 2].max() <= 96 and boxes[:, 3].max() <= 64
        torch.testing.assert_close(masks.get_bounding_boxes().tensor, boxes)
