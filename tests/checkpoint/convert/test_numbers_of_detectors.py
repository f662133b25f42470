"""Small detectors of mmdetection and maskrcnn-benchmark, with every parameter from the converter,
against forwards in float64 written from their source."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import SMALL, SMALL_CONFIG, config
from maskrcnn_benchmark_reference import Benchmark, renamed
from mmdetection_reference import Reference, State

from gn_detect.checkpoint.convert import convert

pytestmark = pytest.mark.slow

# What version 1 computes, for the keys that the converter names.
VERSION_1 = ["MODEL.ANCHOR_GENERATOR.OFFSET", 0.5]
for head in ("BOX", "MASK"):
    VERSION_1 += [f"MODEL.ROI_{head}_HEAD.POOLER_TYPE", "ROIAlign"]
    VERSION_1 += [f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO", 2]


@pytest.fixture(
    scope="module",
    params=[(of, ws) for of in (1, 2, "maskrcnn-benchmark") for ws in (False, True)],
    ids=lambda p: f"{p}",
)
def pair(request):
    """``Reference``, and our model, of which all parameters come from the converter."""
    of, ws = request.param
    benchmark = of == "maskrcnn-benchmark"
    folder = "Detectron" if benchmark else "COCO-InstanceSegmentation"
    name = f"{folder}/mask_rcnn_R_50_FPN_{'gn_ws_2x' if ws else 'gn_2x'}.yaml"
    state = State(1 if benchmark else of, **SMALL).random()
    model = build_model(config(name, *SMALL_CONFIG, *(VERSION_1 if of == 1 else [])))
    weights = convert({"model": renamed(state)} if benchmark else state, "detector")
    assert weights.format == (of if benchmark else "mmdetection") and not weights.partial
    model.load_state_dict(weights.state)
    reference = Benchmark(state, ws, 4) if benchmark else Reference(state, of, ws, 4)
    return reference, model.double().eval()


@pytest.fixture(scope="module")
def levels(pair):
    """Features of our backbone, and of the reference, for one image."""
    reference, model = pair
    torch.manual_seed(0)
    image = torch.randn(1, 3, 96, 128, dtype=torch.float64)
    with torch.no_grad():
        return model.backbone(image), reference.neck(reference.backbone(image))


@torch.no_grad()
def test_features(levels):
    ours, theirs = levels
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    torch.testing.assert_close(list(ours.values()), theirs)  # float64: 1e-7


@torch.no_grad()
def test_proposals(pair, levels):
    reference, model = pair
    rpn, features = model.proposal_generator, list(levels[0].values())
    anchors = rpn.anchor_generator(features)
    logits, deltas = rpn.rpn_head(features)
    deltas = [d.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for d in deltas]
    boxes = rpn._decode_proposals(anchors, deltas)
    for i, (theirs, their_deltas) in enumerate(reference.rpn(levels[1])):
        ours = logits[i].permute(0, 2, 3, 1).flatten().sigmoid()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(deltas[i][0], their_deltas)
        their_anchors = reference.anchors(*features[i].shape[2:], stride=4 * 2**i)
        theirs = reference.decode(their_anchors, their_deltas, [1.0] * 4).squeeze(1)
        if reference.version == 1:  # the last pixel of a box, and the end of it
            theirs[:, 2:] += 1
        torch.testing.assert_close(boxes[i][0], theirs.float(), rtol=1e-6, atol=1e-4)


ROIS = [[4, 4, 30, 40], [1.5, 7.25, 90, 80], [0, 0, 130, 140], [-100, -120, 250, 260]]
ROIS += [[-40, -30, 460, 470], [50, 20, 100, 90]]


@torch.no_grad()
def test_classes_boxes_and_masks(pair, levels):
    reference, model = pair
    heads, features = model.roi_heads, [levels[0][f"p{i}"] for i in range(2, 6)]
    boxes = Boxes(torch.tensor(ROIS))
    proposals = [Instances((96, 128), proposal_boxes=boxes)]
    rois = boxes.tensor.double() - torch.tensor([0, 0, 1, 1]) * (reference.version == 1)

    predictions = heads.box_predictor(heads.box_head(heads.box_pooler(features, [boxes])))
    scores, deltas = reference.box_head(reference.pool(levels[1], rois, 7))
    (ours,) = heads.box_predictor.predict_probs(predictions, proposals)
    assert ours.shape == (6, 6) and scores.std(1).min() > 0.01
    torch.testing.assert_close(ours[:, :-1], scores)
    torch.testing.assert_close(ours[:, -1], 1 - scores.sum(1))

    (ours,) = heads.box_predictor.predict_boxes(predictions, proposals)
    theirs = reference.decode(rois, deltas, [0.1, 0.1, 0.2, 0.2])
    theirs[..., 2:] += reference.version == 1
    torch.testing.assert_close(ours, theirs.flatten(1).float(), rtol=1e-6, atol=1e-4)

    ours = heads.mask_head.layers(heads.mask_pooler(features, [boxes]))
    theirs = reference.mask_head(reference.pool(levels[1], rois, 14))
    assert ours.shape == (6, 5, 28, 28)
    torch.testing.assert_close(ours, theirs)
