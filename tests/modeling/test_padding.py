"""With MASK_PADDING, what a detector makes of an image does not depend on the images beside it."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, GeneralizedRCNN, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from helpers import ROOT, config, randomize, training_image
from modeling.test_detectors import MODELS, build

from gn_detect.config import ConfigError
from gn_detect.layers import GroupNorm
from gn_detect.layers.padding import current, images_in_batch
from gn_detect.layers.recompute import MODES
from gn_detect.modeling import finish_norms
from gn_detect.modeling.normalizer import RunningMean, RunningMeans

pytestmark = pytest.mark.slow
MASKED = ("MODEL.GN.MASK_PADDING", True, "MODEL.GN.MEMORY", "fast")
# Each is padded by another number of pixels, alone by less than in the batch.
SIZES = (64, 90), (128, 50), (37, 128)
NO_NORM = ("MODEL.FPN.NORM", "", "MODEL.RPN.CONV_DIMS", [-1, -1])
KINDS = {
    **{name: (name,) for name in MODELS if name != "keypoints"},
    "R18": ("basic blocks", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    "no norm in FPN and RPN": ("bottlenecks", *NO_NORM),
    "FrozenBN": ("bottlenecks", "MODEL.RESNETS.NORM", "FrozenBN"),
    "GN in RetinaNet": ("RetinaNet", "MODEL.RETINANET.NORM", "GN"),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    torch.manual_seed(0)
    name, *opts = KINDS[request.param]
    return randomize(build(name, *opts, *MASKED)).eval()


def double(batch):
    return [{**image, "image": image["image"].double()} for image in batch]


@torch.no_grad()
def features(model, batch):
    """What backbone and semantic head make of images, by name."""
    with images_in_batch():
        images = model.preprocess_image(double(batch))
        found = model.backbone(images.tensor)
        if hasattr(model, "sem_seg_head"):
            found = {**found, "sem_seg": model.sem_seg_head(found)[0]}
    return found


def assert_features_as_alone(model, batch):
    together = features(model, batch)
    for i, image in enumerate(batch):
        alone = features(model, [image])
        assert alone.keys() == together.keys()
        for name, x in alone.items():
            if name == "sem_seg":  # beyond the image nobody asks
                x = x[..., : image["height"], : image["width"]]
            found = together[name][i, :, : x.shape[2], : x.shape[3]]
            assert (found - x[0]).abs().max() <= 1e-10 * x.abs().max(), name


def test_images_of_no_batch_are_not_those_of_the_next(model):
    model.preprocess_image([training_image(*size) for size in SIZES])
    assert current() is None


def test_an_image_is_as_it_is_alone(model):
    batch = [training_image(*size) for size in SIZES]
    assert_features_as_alone(model.double(), batch)
    model.float()
    with torch.no_grad():
        together = [found["instances"] for found in model(batch)]
        alone = [model([image])[0]["instances"] for image in batch]
    for found, expected in zip(together, alone, strict=True):
        assert len(found) == len(expected) > 0
        # The order of what has the same score, but for rounding, is another one.
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-3)
        ious = pairwise_iou(found.pred_boxes, expected.pred_boxes)
        assert (ious.max(dim=1).values > 0.99).float().mean() > 0.9


def test_images_that_have_one_size_on_coarse_maps():
    """9 rows at stride 8; 17 and 18 at stride 4."""
    torch.manual_seed(0)
    model = randomize(build("panoptic", *MASKED)).double().eval()
    assert_features_as_alone(model, [training_image(68, 90), training_image(72, 90)])


def test_without_it_padding_matters():
    torch.manual_seed(0)
    model = randomize(build("bottlenecks", "MODEL.GN.MEMORY", "fast")).double().eval()
    batch = [training_image(*size) for size in SIZES]
    together, alone = features(model, batch), features(model, batch[:1])
    x = alone["p2"]
    difference = together["p2"][:1, :, : x.shape[2], : x.shape[3]] - x
    assert difference.norm() > 0.05 * x.norm()


# All anchors and RoIs are taken, so that none are drawn.
STEP = [
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 10**6, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 10**6),
    *("MODEL.ROI_MASK_HEAD.LOSS_NORMALIZER", "running"),
    *("MODEL.RETINANET.LOSS_NORMALIZER", "running"),
]


def step(model, *passes):
    """Mean losses and gradients of ``passes``, with the same RoIs each time."""

    def proposals(anchors, logits, deltas, image_sizes):
        boxes = [[4, 6, 41, 35], [20, 19, 48, 36], [0, 0, 20, 10], [30, 9, 44, 30]]
        boxes.append([20, 30, 50, 64])  # to the end of an image
        boxes = torch.tensor(boxes, dtype=torch.float32)
        rois = {"proposal_boxes": Boxes(boxes), "objectness_logits": torch.zeros(len(boxes))}
        return [Instances(size, **rois) for size in image_sizes]

    def with_double_targets(logits, targets, **kwargs):
        return cross_entropy(logits, targets.to(logits.dtype), **kwargs)

    model.train().zero_grad()
    losses, cross_entropy = {}, F.binary_cross_entropy_with_logits
    torch.manual_seed(0)  # the order of RoIs
    with (
        EventStorage(),
        mock.patch.object(F, "binary_cross_entropy_with_logits", with_double_targets),
    ):
        for batch in passes:
            if hasattr(model, "proposal_generator"):
                generator = model.proposal_generator
                with mock.patch.object(generator, "predict_proposals", proposals):
                    found = model(double(batch))
            else:
                found = model(double(batch))
            (sum(found.values()) / len(passes)).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + loss.detach() / len(passes)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses, gradients


def assert_same_step(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 40
    largest = max(value.norm() for value in expected[1].values())
    for name, value in expected[1].items():  # of some, such as a bias before a GN, nothing is left
        bound = tolerance * (value.norm() + 1e-6 * largest)
        assert (found[1][name] - value).norm() <= bound, name


@pytest.mark.parametrize("kind", ["basic blocks", "bottlenecks", "RetinaNet", "C4"])
def test_passes_of_one_image_are_one_of_all(kind):
    torch.manual_seed(0)
    model = randomize(build(kind, *MASKED, *STEP)).double()
    means = RunningMeans(model)
    batch = [training_image(*size) for size in SIZES[:2]]
    for _ in range(2):  # also with the mean of before
        expected = step(model, batch)
        before = means.state_dict()
        tolerance = 1e-6 if kind == "RetinaNet" else 1e-9  # its focal loss is float32
        assert_same_step(step(model, *([image] for image in batch)), expected, tolerance)
        assert means.state_dict() == before
        means.after_step()
        (value,) = means.state_dict().values()
        assert value != before.popitem()[1]


def test_images_without_objects_have_no_positive_anchors():
    """Nor where they are alone in a pass."""
    torch.manual_seed(0)
    model = build("RetinaNet", *MASKED, *STEP).double()
    image, empty = training_image(), training_image()
    empty["instances"] = empty["instances"][:0]
    values = []
    for passes in ([image, empty],), ([image], [empty]):
        model.normalizer.value = 100
        step(model, *passes)
        RunningMeans(model).after_step()
        values.append(model.normalizer.value)
    assert values[0] == values[1] < 100


def test_a_mean_over_the_images_of_all_processes(monkeypatch):
    mean = RunningMean(10)
    assert [mean(3, 1), mean(4, 2)] == [10, 20]
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, (7, 2)])
    mean.update()
    assert mean.value == pytest.approx(0.9 * 10 + 0.1 * (3 + 4 + 7) / (1 + 2 + 2))
    before = mean.value
    mean.update()  # after an iteration without images in this process
    assert mean.value == pytest.approx(0.9 * before + 0.1 * 7 / 2)


@pytest.mark.parametrize("memory", MODES[1:])
def test_modes_of_memory_give_the_same_bits(memory):
    torch.manual_seed(0)
    model = randomize(build("bottlenecks", *MASKED, *STEP)).double()
    batch = [training_image(*size) for size in SIZES[:2]]
    expected = step(model, batch)
    for module in model.modules():
        if hasattr(module, "memory"):
            module.memory = memory
    found = step(model, batch)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "key, name", [("META_ARCHITECTURE", "GeneralizedRCNN"), ("PROPOSAL_GENERATOR.NAME", "RPN")]
)
def test_components_that_do_not_know_of_padding(key, name):
    cfg = config(*MODELS["bottlenecks"], *MASKED, f"MODEL.{key}", name)
    with pytest.raises(ConfigError, match=f"{key} is '{name}', which does not.* 'GN{name}'"):
        build_model(cfg)


@pytest.mark.parametrize(
    "kind, key, name",
    [
        ("basic blocks", "BACKBONE.NAME", "build_resnet_fpn_backbone"),
        ("RetinaNet", "BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
        ("basic blocks", "RPN.HEAD_NAME", "StandardRPNHead"),
        ("panoptic", "SEM_SEG_HEAD.NAME", "SemSegFPNHead"),
    ],
)
def test_components_that_do_not_mask_padding(kind, key, name):
    norms = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.RPN.NORM", "")
    with pytest.raises(ConfigError, match=f"{key} is '{name}', which does not.*finish_norms"):
        build(kind, *MASKED, *norms, "MODEL.SEM_SEG_HEAD.NORM", "BN", f"MODEL.{key}", name)


def test_a_backbone_of_ones_own_masks_padding_by_finish_norms(monkeypatch):
    def own_backbone(cfg, input_shape):
        return finish_norms(build_resnet_fpn_backbone(cfg, input_shape), "own", mask_padding=True)

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "own_backbone", own_backbone)
    norms = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    model = build("basic blocks", *MASKED, *norms, "MODEL.BACKBONE.NAME", "own_backbone")
    model = randomize(model).double().eval()
    assert_features_as_alone(model, [training_image(*size) for size in SIZES])


def test_proposals_that_are_given():
    """Of what generates them nothing is asked."""
    given = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    assert build("basic blocks", *MASKED, *given).proposal_generator is None


@pytest.mark.parametrize("kept", [40, 10**4], ids=["the best", "all"])
def test_proposals_of_an_image_are_those_of_its_anchors(kept):
    """Detectron2's, which are asked for the anchors with a centre in each image alone."""
    opts = ("MODEL.RPN.POST_NMS_TOPK_TEST", kept, "MODEL.RPN.PRE_NMS_TOPK_TEST", kept)
    generator = build("basic blocks", *MASKED, *opts).proposal_generator.eval()
    features = [torch.zeros(2, 1, *size) for size in ((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))]
    anchors, sizes = generator.anchor_generator(features), [(64, 50), (37, 64)]
    torch.manual_seed(0)
    logits, deltas = (
        [torch.randn(2, len(level), *more) for level in anchors] for more in ((), (4,))
    )
    found = generator.predict_proposals(anchors, logits, deltas, sizes)
    for i, (height, width) in enumerate(sizes):
        centers = [level.get_centers() for level in anchors]
        inside = [(xy < torch.tensor([width, height])).all(1) for xy in centers]
        alone = (
            [level[k] for level, k in zip(anchors, inside, strict=True)],
            [x[i : i + 1, k] for x, k in zip(logits, inside, strict=True)],
            [x[i : i + 1, k] for x, k in zip(deltas, inside, strict=True)],
        )
        (expected,) = RPN.predict_proposals(generator, *alone, [sizes[i]])
        assert torch.equal(found[i].proposal_boxes.tensor, expected.proposal_boxes.tensor)
        assert torch.equal(found[i].objectness_logits, expected.objectness_logits)


def test_lazy_detectors():
    cfg = LazyConfig.load(str(ROOT / "configs/lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py"))
    cfg.model.mask_padding = True
    cfg.model.roi_heads.mask_head.loss_normalizer = "running"
    model = instantiate(cfg.model)
    running = ("MODEL.ROI_MASK_HEAD.LOSS_NORMALIZER", "running")
    yaml = build_model(config("quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml", *running))
    means = RunningMeans(model).state_dict()
    assert means == RunningMeans(yaml).state_dict() and len(means) == 1
    masked = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupNorm):
            masked.setdefault(name.split(".")[0], set()).add(module.mask_padding)
    assert masked == {"backbone": {True}, "roi_heads": {False}}
    assert model.proposal_generator.mask_padding
    assert len(model.roi_heads.box_pooler._forward_pre_hooks) == 1
    given = copy.deepcopy(cfg.model)
    given.proposal_generator = None
    assert instantiate(given).backbone.bottom_up.stem.conv1.norm.mask_padding
    cfg.model.meta_arch = GeneralizedRCNN
    with pytest.raises(ConfigError, match="a GeneralizedRCNN does not know of it"):
        instantiate(cfg.model)
