"""Masks that are pasted one at a time are Detectron2's own, to the byte of their encoding."""

import pytest
import torch
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    RotatedCOCOEvaluator,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_model
from helpers import TINY, config
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from gn_detect.evaluation.masks import PastedMasks, masks_one_by_one, takes_items
from gn_detect.evaluation.scoring import CocoEvaluator

IMAGES = [  # of which the model sees 64 pixels
    {"image": torch.full((3, 64, 96), 90.0), "height": 150, "width": 201},
    {"image": torch.rand(3, 64, 64) * 255},
]


@META_ARCH_REGISTRY.register()
class WithOwnInference(GeneralizedRCNN):
    def inference(self, *args, **kwargs):
        return super().inference(*args, **kwargs)


@META_ARCH_REGISTRY.register()
class WithOwnTraining(GeneralizedRCNN):
    def visualize_training(self, *args):
        pass


def detector(meta_arch="GeneralizedRCNN"):
    cfg = config(
        "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml",
        *(*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.META_ARCHITECTURE", meta_arch),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.WEIGHTS", ""),
    )
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():  # so that masks have edges
        model.roi_heads.mask_head.predictor.weight.mul_(300)
    return model


def run(model, when=None):
    """The outputs for ``IMAGES``, and their encoding."""
    with torch.no_grad():
        if when is None:
            outputs = model(IMAGES)
        else:
            with masks_one_by_one(model, when=when):
                outputs = model(IMAGES)
    found = [output["instances"].to("cpu") for output in outputs]
    return found, [instances_to_coco_json(instances, 1) for instances in found]


@pytest.mark.parametrize("meta_arch", ["GeneralizedRCNN", "WithOwnTraining"])
def test_equal_to_the_byte(meta_arch):
    model = detector(meta_arch)
    whole, expected = run(model)
    seen = []
    model.register_forward_hook(lambda *args: seen.append(1))
    items, encoded = run(model, when=True)
    assert seen, "the hooks of the model are left out"
    assert encoded == expected and len(expected[0]) > 3
    for tensor, masks in ((w.pred_masks, i.pred_masks) for w, i in zip(whole, items, strict=True)):
        assert isinstance(masks, PastedMasks) and len(masks) == len(tensor)
        assert torch.equal(torch.stack(list(masks)), tensor)
        assert torch.equal(masks[-1], tensor[-1]) and masks[0].dtype == torch.bool
        assert masks[0].T.is_contiguous()
        with pytest.raises(IndexError):
            masks[len(tensor)]
    shares = whole[0].pred_masks.float().mean((1, 2))
    assert ((shares > 0) & (shares < 1)).any()
    # Afterwards, and for everyone else, the model is as it was.
    assert torch.equal(run(model)[0][0].pred_masks, whole[0].pred_masks)


def test_others_are_left_as_they_are():
    for model, when in ((detector("WithOwnInference"), True), (detector(), False)):
        found, _ = run(model, when)
        assert all(isinstance(instances.pred_masks, torch.Tensor) for instances in found)


def test_a_model_in_several_processes():
    model, wrapped = detector(), DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with masks_one_by_one(wrapped):
        assert "inference" in vars(model)
    assert "inference" not in vars(model)


def test_no_object_and_no_mask():
    model = detector()
    model.roi_heads.box_predictor.test_score_thresh = 2.0
    assert run(model, when=True)[1] == [[], []]
    model = detector()
    model.roi_heads.mask_on = False
    assert "segmentation" not in run(model, when=True)[1][0][0]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("when, masks", [(False, 20), (True, 1)])
def test_memory_is_that_of_one_mask(when, masks):
    model, height, width = detector(), 1000, 1500
    model.roi_heads.box_predictor.test_topk_per_image = 20
    image = {"image": IMAGES[0]["image"], "height": height, "width": width}
    with torch.no_grad(), masks_one_by_one(model, when=when), Largest() as largest:
        found = model([image])[0]["instances"]
        assert sum(mask.any() for mask in found.pred_masks) > 1 and len(found) == 20
    # In the box of an object, each pixel has two coordinates in float32.
    assert masks * height * width <= largest.bytes <= max(masks, 8) * height * width


def test_evaluators_that_take_items():
    new = [kind.__new__(kind) for kind in (CocoEvaluator, COCOEvaluator, LVISEvaluator)]
    assert all(takes_items(evaluator) for evaluator in new)
    # These may do anything with the tensor.
    others = [RotatedCOCOEvaluator.__new__(RotatedCOCOEvaluator), DatasetEvaluators([]), [], None]
    assert not any(takes_items(evaluator) for evaluator in others)
