"""GN by recorded statistics: the same output for the image that they are of, and for others that
of the formula in float64."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from helpers import TINY, config, randomize
from torch import nn

from gn_detect.layers import GroupNorm
from gn_detect.modeling.blocks import norm_act
from gn_detect.predict.statistics import fixed_statistics, image_norms, recorded_statistics

MASK = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml"
HEADS = ("MODEL.RPN.NORM", "MODEL.RETINANET.NORM")
# With 14 rows of padding.
IMAGE = {"image": torch.rand(3, 50, 96, generator=torch.Generator().manual_seed(0)) * 255}
OTHER = {"image": torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(1)) * 90}


def detector(name, *opts):
    torch.manual_seed(0)
    sizes = [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.RETINANET.NUM_CLASSES", 2]
    lowest = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    cfg = config(name, *sizes, *lowest, "MODEL.WEIGHTS", "", *opts)
    return randomize(build_model(cfg)).eval()


@torch.no_grad()
def detections(model, image):
    """Boxes and scores, (N, 5)."""
    found = model([image])[0]["instances"]
    return torch.cat([found.pred_boxes.tensor, found.scores[:, None] * 100], dim=1)


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        (MASK, ["MODEL.RPN.NORM", "GN"]),
        (MASK, ["MODEL.CHANNELS_LAST", True, "MODEL.GN.WEIGHT_STANDARDIZATION", "authors"]),
        (MASK, ["MODEL.GN.MEMORY", "lean", "MODEL.RESNETS.NORM", "LN"]),
        (RETINANET, ["MODEL.RETINANET.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", 32]),
        (MASK, ["MODEL.GN.MASK_PADDING", True]),
    ],
)
def test_of_the_same_image_the_output_is_the_same(name, opts):
    model = detector(name, *opts)
    expected, other = detections(model, IMAGE), detections(model, OTHER)
    with recorded_statistics(model) as statistics:
        assert torch.equal(detections(model, IMAGE), expected)
    calls = {len(calls) for calls in statistics.values()}
    assert calls == ({1, 5} if opts[0] in HEADS else {1})  # a head: of 5 levels
    with fixed_statistics(statistics):
        for _ in range(2):  # in as many passes as there are
            torch.testing.assert_close(detections(model, IMAGE), expected, rtol=0, atol=1e-3)
        found = detections(model, OTHER)
        assert found.shape != other.shape or not torch.allclose(found, other, atol=1)
    assert torch.equal(detections(model, OTHER), other)  # the model is as it was
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in image_norms(model))
    assert len(expected) > 3


def test_roi_heads_normalize_each_roi():
    model = detector(MASK, "MODEL.ROI_BOX_HEAD.NORM", "GN")
    names = {m: n for n, m in model.named_modules()}
    found = {names[m].split(".")[0] for m in image_norms(model)}
    assert found == {"backbone"} and any("roi_heads" in n for n in names.values())


@pytest.mark.parametrize("kind", [GroupNorm, nn.GroupNorm])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_another_image_by_the_formula(kind, memory_format):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 6, 5, 7, generator=generator) * 3 + 2
    x, residual = torch.randn(2, 2, 6, 4, 3, generator=generator)
    layer = randomize(kind(3, 6, eps=0.1))
    with recorded_statistics(layer) as statistics, torch.no_grad():
        layer(first)
    with fixed_statistics(statistics):
        inputs = (t.to(memory_format=memory_format).clone() for t in (x, residual))
        found = norm_act(layer, *inputs, nn.ReLU())
    groups = first.double().numpy().reshape(3, -1)
    mean, var = (np.repeat(v, 2)[:, None, None] for v in (groups.mean(1), groups.var(1)))
    gamma, beta = (p.detach().double().numpy()[:, None, None] for p in (layer.weight, layer.bias))
    y = (x.double().numpy() - mean) / np.sqrt(var + 0.1) * gamma + beta + residual.numpy()
    np.testing.assert_allclose(found.numpy(), np.maximum(y, 0), atol=1e-5)
    assert found.is_contiguous(memory_format=memory_format)


def test_of_one_image_alone():
    layer = GroupNorm(2, 4)
    with recorded_statistics(layer), pytest.raises(ValueError, match="of one image, not of 2"):
        layer(torch.zeros(2, 4, 3, 3))
