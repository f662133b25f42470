"""k-means for anchors, against the best of all partitions, and against Detectron2's IoU."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou

from gn_detect.data.anchors import best_iou, fit_aspect_ratios, fit_sizes, log_means


def cost(logs, cuts):
    return sum(((part - part.mean()) ** 2).sum() for part in np.split(logs, cuts) if len(part))


@pytest.mark.parametrize("seed", range(4))
def test_the_means_are_of_the_best_partition(seed):
    rng = np.random.default_rng(seed)
    centres = np.log([6, 40, 300])
    logs = np.sort(np.concatenate([rng.normal(c, 0.3, 7) for c in centres]))
    cuts = min(itertools.combinations(range(1, len(logs)), 2), key=lambda cuts: cost(logs, cuts))
    best = [np.exp(part.mean()) for part in np.split(logs, cuts)]
    found = log_means(rng.permutation(np.exp(logs)), 3)
    np.testing.assert_allclose(found, best)
    np.testing.assert_allclose(log_means(10 * np.exp(logs), 3), 10 * found)  # of any unit


def test_of_fewer_values_than_means():
    found = log_means(np.array([5.0, 5.0, 80.0]), 5)
    assert np.isfinite(found).all() and (np.diff(found) >= 0).all()
    assert found[0] == pytest.approx(5) and found[-1] == pytest.approx(80)


def test_sizes_go_with_the_strides_of_their_levels():
    boxes = np.repeat([[10, 10], [40, 10], [40, 40], [80, 80], [1000, 1000]], 3, axis=0)
    strides = [4, 8, 16, 32, 64]
    assert fit_sizes(boxes, strides, 1) == [[10], [20], [40], [80], [1000]]
    assert fit_sizes(boxes / 10, strides, 1) == [[8], [16], [32], [64], [128]]
    assert fit_sizes(boxes * 50, strides, 1)[0] == [64]
    assert fit_sizes(boxes[:12], [16], 4) == [[32, 32, 40, 80]]  # all of one level


def test_aspect_ratios_are_height_over_width():
    boxes = np.array([[10, 40], [30, 30], [20, 20], [90, 30]])
    assert fit_aspect_ratios(boxes, 3) == [0.25, 1, 3]


def test_iou_is_detectron2s():
    boxes = np.random.default_rng(0).uniform(3, 300, (50, 2))
    sizes, ratios = [[16], [32], [200]], [0.5, 1.0, 3.0]
    generator = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[ratios], strides=[4, 8, 16])
    anchors = Boxes(torch.cat(list(generator.cell_anchors)))  # centred at 0
    height, width = torch.from_numpy(boxes / 2).float().T
    iou = pairwise_iou(Boxes(torch.stack([-width, -height, width, height], dim=1)), anchors)
    np.testing.assert_allclose(best_iou(boxes, sizes, ratios), iou.max(dim=1)[0], atol=1e-4)
