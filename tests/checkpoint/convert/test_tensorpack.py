"""Detectors of tensorpack: names and shapes, numbers, and what is refused."""

import contextlib
import math
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from helpers import SMALL, SMALL_CONFIG, as_shipped, config
from tensorpack_reference import Reference, State

from gn_detect.checkpoint import Weights, read_weights
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import cover
from gn_detect.checkpoint.origin import Origin
from gn_detect.checkpoint.safe_load import WeightsError
from gn_detect.checkpoint.weight_guards import WeightGuards
from gn_detect.config import ConfigError

MASK = "tensorpack/mask_rcnn_R_50_FPN_gn_2x.yaml"
CASCADE = "tensorpack/cascade_mask_rcnn_R_50_FPN_gn_4x.yaml"
SCRATCH = "tensorpack/scratch_cascade_mask_rcnn_R_101_FPN_gn_9x.yaml"
PROPOSALS = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 200]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module", params=[False, True], ids=["mask", "cascade"])
def pair(request, tmp_path_factory):
    """``Reference`` and our model, of which all parameters come from a file."""
    cascade = request.param
    state = State(cascade=cascade, suffix=":0" if cascade else "", **SMALL).random()
    path = tmp_path_factory.mktemp("tensorpack") / "model.npz"
    np.savez_compressed(path, **{name: value.numpy() for name, value in state.items()})
    # Detectron2 has anchors and boxes in float32, whatever the model is in.
    double = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with double, mock.patch.object(torch, "float32", torch.float64), default_dtype(torch.float64):
        model = build_model(config(CASCADE if cascade else MASK, *SMALL_CONFIG, *PROPOSALS))
        model.load_state_dict(read_weights(str(path)).state)
        yield Reference(state, groups=4, proposals=200), model.eval()


def image(height=90, width=117):
    """(H, W, 3), which neither side of 32 divides"""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
@torch.no_grad()
def levels(pair):
    """Features of our model, and of the reference, of one image."""
    reference, model = pair
    inputs = model.preprocess_image([{"image": image().permute(2, 0, 1)}])
    assert inputs.tensor.shape == (1, 3, 96, 128)
    theirs = reference.fpn(reference.backbone(reference.preprocess(image())))
    return model.backbone(inputs.tensor), theirs


def close(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    scale = theirs.abs().max()
    assert scale > 0.01 and (ours - theirs).abs().max() <= 1e-9 * scale


def test_features(levels):
    ours, theirs = levels
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    for level, expected in zip(ours.values(), theirs, strict=True):
        close(level, expected)


@torch.no_grad()
def test_anchors_and_what_the_rpn_makes_of_them(pair, levels):
    reference, model = pair
    rpn, features = model.proposal_generator, list(levels[0].values())
    anchors = rpn.anchor_generator(features)
    logits, deltas = rpn.rpn_head(features)
    deltas = [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for d in deltas]
    boxes = rpn._decode_proposals(anchors, deltas)
    for i, level in enumerate(levels[1]):
        scores, their_deltas = reference.rpn_head(level)
        close(logits[i].permute(0, 2, 3, 1).flatten(), scores)
        close(deltas[i][0], their_deltas)
        their_anchors = reference.anchors(i, *level.shape[2:])
        close(anchors[i].tensor, their_anchors)
        close(boxes[i][0], reference.decode(their_deltas, their_anchors))


@torch.no_grad()
def test_what_the_rpn_is_trained_on(pair):
    """Anchors within the image alone (data.py), and for these the Huber loss of 1/9, divided by it,
    and a cross entropy, both over the 256 anchors of a sample (modeling/model_rpn.py)."""
    rpn = pair[1].proposal_generator
    anchors = [Boxes(torch.tensor([[10.0, 10, 50, 50], [-1, 10, 49, 50], [60, 20, 100, 60]]))]
    objects = [Instances((96, 128), gt_boxes=anchors[0][:1])]
    labels, boxes = rpn.label_and_sample_anchors(anchors, objects)
    assert labels[0].tolist() == [1, -1, 0]
    deltas = torch.tensor([[[0.05, -0.2, 0.5, 0.0], [9.0] * 4, [9.0] * 4]])  # the true ones are 0
    with EventStorage():
        losses = rpn.losses(anchors, [torch.zeros(1, 3)], labels, [deltas], boxes)
    huber = 9 / 2 * 0.05**2 + (0.2 - 1 / 18) + (0.5 - 1 / 18)
    assert losses["loss_rpn_loc"].item() == pytest.approx(huber / 256, rel=1e-6)
    assert losses["loss_rpn_cls"].item() == pytest.approx(2 * math.log(2) / 256)


# Of all levels, and with sides beyond those of the maps.
ROIS = [[4, 4, 30, 40], [1.5, 7.25, 90, 80], [0, 0, 130, 140], [-100, -120, 250, 260]]
ROIS = torch.tensor([*ROIS, [-40, -30, 460, 470], [50, 20, 100, 90]], dtype=torch.float64)


@torch.no_grad()
def test_classes_boxes_and_masks(pair, levels):
    reference, model = pair
    heads, features = model.roi_heads, [levels[0][f"p{i}"] for i in range(2, 6)]
    size, boxes = (90, 117), [Boxes(ROIS)]
    proposals = [Instances(size, proposal_boxes=boxes[0])]
    pooled = heads.box_pooler(features, boxes)
    close(pooled, reference.pool(levels[1], ROIS, 7))
    logits = heads.mask_head.layers(heads.mask_pooler(features, boxes))
    close(logits, reference.mask_head(reference.pool(levels[1], ROIS, 14)))
    scores, their_boxes = reference.classify(levels[1], ROIS, size)
    assert scores.std(1).min() > 0.01
    if reference.cascade:
        inner = "detectron2.modeling.roi_heads.cascade_rcnn.fast_rcnn_inference"
        with mock.patch(inner, return_value=([], [])) as inference:
            heads._forward_box(dict(levels[0]), proposals)
        ((found,), (ours,), *_), _ = inference.call_args
        found, their_boxes = reference.clip(found, size), their_boxes[:, 0]
    else:
        predictions = heads.box_predictor(heads.box_head(pooled))
        (ours,) = heads.box_predictor.predict_probs(predictions, proposals)
        (found,) = heads.box_predictor.predict_boxes(predictions, proposals)
        found = reference.clip(found.unflatten(1, (5, 4)), size)
        their_boxes = their_boxes[:, 1:]
    close(ours[:, [5, 0, 1, 2, 3, 4]], scores)
    close(found, their_boxes)


@torch.no_grad()
def test_detections(pair):
    """All of it, from the pixels to the masks."""
    reference, model = pair
    (ours,) = model.inference([{"image": image().permute(2, 0, 1)}], do_postprocess=False)
    boxes, scores, labels, masks = reference.detect(image().double())
    assert len(labels) > 50 and len(labels.unique()) == 5
    assert ours.pred_classes.tolist() == (labels - 1).tolist()
    close(ours.scores, scores)
    close(ours.pred_boxes.tensor, boxes)
    close(ours.pred_masks[:, 0], masks)


WHOLE = {MASK: {}, CASCADE: {"cascade": True}, SCRATCH: {"cascade": True, "depth": 101}}


@pytest.mark.parametrize("name", WHOLE)
def test_names_and_shapes_of_whole_detectors(name):
    with torch.device("meta"):
        model = build_model(config(name, "MODEL.DEVICE", "meta"))
    state = State(**WHOLE[name]).meta()
    weights = convert(state, "model.npz")
    assert (weights.format, weights.partial, weights.left_out) == ("tensorpack", False, [])
    expected = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in weights.state.items()} == expected
    assert len(expected) == len(state)
    guards = WeightGuards.from_config(as_shipped(name))
    guards.check(weights, cover(weights, model), model, "model.npz")


def test_a_model_without_the_biases_is_refused():
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_2x.yaml"
    cfg = config(name, "MODEL.DEVICE", "meta", "MODEL.PIXEL_STD", [57.375, 57.12, 58.395])
    with torch.device("meta"):
        model = build_model(cfg)
    weights = convert(State().meta(), "model.npz")
    with pytest.raises(ConfigError, match="in 16 layers .* backbone.fpn_lateral2. Name a config"):
        WeightGuards.from_config(cfg).check(weights, cover(weights, model), model, "model.npz")


def test_a_detector_without_the_biases_is_refused():
    """Its heads have ReLU behind the norm, under the same names."""
    detectron = "Detectron/mask_rcnn_R_50_FPN_gn_2x.yaml"
    cfg = config(MASK, "MODEL.DEVICE", "meta", "MODEL.PIXEL_STD", [1.0, 1.0, 1.0])
    with torch.device("meta"):
        model = build_model(cfg)
        other = build_model(config(detectron, "MODEL.DEVICE", "meta"))
    weights = Weights("Detectron", other.state_dict())
    with pytest.raises(ConfigError, match="without a bias .* in 16 layers .*fpn_lateral2, and"):
        WeightGuards.from_config(cfg).check(weights, cover(weights, model), model, "model.pkl")


def test_imagenet_weights_are_all_of_the_backbone():
    with torch.device("meta"):
        model = build_model(config(MASK, "MODEL.DEVICE", "meta"))
    state = State(detector=False).meta()
    weights = convert(state, "model.npz")
    coverage = cover(weights, model)
    assert weights.partial and not coverage.unexpected
    assert coverage.loaded.keys() == {
        name for name in model.state_dict() if name.startswith("backbone.bottom_up.")
    }
    assert sorted(weights.left_out) == ["linear/W:0", "linear/b:0"]
    assert len(weights.state) == len(state) - 2


def test_origin():
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)
    for detector in (True, False):
        weights = convert(State(detector=detector, **SMALL).meta(), "model.npz")
        assert weights.origin == Origin("BGR", mean, std, False, "", 32)
    with_bn = State(detector=False, **SMALL).meta()
    with_bn = {name.replace("/gn/", "/bn/"): value for name, value in with_bn.items()}
    for statistic in ("mean", "variance"):
        with_bn[f"conv0/bn/{statistic}/EMA:0"] = torch.empty(8)
    weights = convert(with_bn, "model.npz")
    assert weights.origin == Origin(weight_standardization="")
    assert weights.batch_norms == {"stem.conv1.norm"}
    assert {"stem.conv1.norm.running_mean", "stem.conv1.norm.running_var"} <= weights.state.keys()


def test_what_is_of_training_is_left_out():
    extra = ["global_step:0", "learning_rate:0", "conv0/W/Momentum:0", "EMA/total_cost:0"]
    extra += ["tower0/EMA/loss:0", "fpn/gn_c2/beta/Adam_1:0", "AccumGrad/counter:0"]
    state = State(**SMALL).meta()
    weights = convert({**state, **{name: torch.zeros(1) for name in extra}}, "model.npz")
    assert weights.left_out == extra
    assert len(weights.state) == len(state)


def changed(name, *shape, detector=True):
    state = State(detector=detector, suffix="", **SMALL).meta()
    return {**state, name: torch.empty(shape, device="meta")}


@pytest.mark.parametrize(
    "state, message",
    [
        # Of a C4 model, of a pre-activated block, and of Squeeze-and-Excitation
        (changed("fastrcnn/class/W", 32, 6), "1 weights of tensorpack .*: fastrcnn/class/W. Con"),
        (changed("group0/block0/preact/gamma", 8), "group0/block0/preact/gamma"),
        (changed("group0/block0/fc1/W", 8, 8, detector=False), "group0/block0/fc1/W"),
        (changed("fpn/gn_c2/alpha", 8), "fpn/gn_c2/alpha"),
        (changed("conv0/W", 7, 7, 24), r"conv0/W has the shape \[7, 7, 24\].* four dimensions"),
        (changed("fastrcnn/fc/W", 7, 7, 16, 32), "fastrcnn/fc/W .* two dimensions"),
        (changed("conv0/gn/beta", 1, 8), "conv0/gn/beta .* one dimension:"),
        (changed("rpn/box/W", 1, 1, 16, 24), "rpn/class/W has 3 channels, rpn/box/W has 24"),
        (
            changed("fastrcnn/outputs/box/W", 32, 20),
            "box/W has 20 channels, .* has 6: expected 24, or 4",
        ),
    ],
)
def test_what_detectron2_lacks_is_named(state, message):
    with pytest.raises(WeightsError, match=message):
        convert(state, "model.npz")
