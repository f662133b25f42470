"""Weights with the names and shapes of Detectron's blobs against the same arrays placed by hand."""

import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList
from detectron_blobs import Blobs
from helpers import config

from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights
from gn_detect.checkpoint.convert import convert
from gn_detect.checkpoint.coverage import cover
from gn_detect.checkpoint.export import write_weights
from gn_detect.checkpoint.origin import DETECTRON, Origin
from gn_detect.config import ConfigError

WIDTH = 32  # of the stem, the FPN and the heads: a quarter of the weights of Detectron's networks
CLASSES = 3


def mask_rcnn_config(*opts):
    widths = [
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", WIDTH, "MODEL.RESNETS.RES2_OUT_CHANNELS", 4 * WIDTH),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", WIDTH, "MODEL.FPN.OUT_CHANNELS", WIDTH),
        *("MODEL.ROI_BOX_HEAD.CONV_DIM", WIDTH, "MODEL.ROI_MASK_HEAD.CONV_DIM", WIDTH),
        *("MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_HEADS.NUM_CLASSES", CLASSES),
    ]
    return config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_2x.yaml", *widths, *opts)


def imagenet_backbone():
    """R-50-GN.pkl: no ``blobs``, and a classifier."""
    blobs = Blobs(width=WIDTH)
    blobs.resnet()
    blobs.conv("pred", 10, 32 * WIDTH)
    return dict(blobs)


def mask_rcnn():
    """model_final.pkl of e2e_mask_rcnn_R-50-FPN_2x_gn."""
    blobs = Blobs(width=WIDTH, dim=WIDTH, fc=64, classes=CLASSES)
    blobs.resnet()
    blobs.heads()
    momentum = {f"{name}_momentum": np.zeros_like(array) for name, array in blobs.items()}
    return {"blobs": {**blobs, **momentum}, "cfg": "MODEL: {TYPE: generalized_rcnn}\n"}


def place(model, blobs):
    """Each array into the layer that does the same, by hand."""

    def put(parameter, array):
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(array)))

    def conv_gn(layer, name):
        put(layer.weight, blobs[f"{name}_w"])
        put(layer.norm.weight, blobs[f"{name}_gn_s"])
        put(layer.norm.bias, blobs[f"{name}_gn_b"])

    def plain(layer, name, rows=slice(None)):
        put(layer.weight, blobs[f"{name}_w"][rows])
        put(layer.bias, blobs[f"{name}_b"][rows])

    resnet = getattr(model.backbone, "bottom_up", None) or model.backbone
    conv_gn(resnet.stem.conv1, "conv1")
    for stage in (2, 3, 4, 5):
        for i, block in enumerate(getattr(resnet, f"res{stage}")):
            conv_gn(block.conv1, f"res{stage}_{i}_branch2a")
            conv_gn(block.conv2, f"res{stage}_{i}_branch2b")
            conv_gn(block.conv3, f"res{stage}_{i}_branch2c")
            if i == 0:
                conv_gn(block.shortcut, f"res{stage}_{i}_branch1")
    if "fc6_w" not in blobs:
        return
    for stage, last in ((2, 2), (3, 3), (4, 5), (5, 2)):
        lateral = f"fpn_inner_res{stage}_{last}_sum" + ("_lateral" if stage < 5 else "")
        conv_gn(getattr(model.backbone, f"fpn_lateral{stage}"), lateral)
        conv_gn(getattr(model.backbone, f"fpn_output{stage}"), f"fpn_res{stage}_{last}_sum")
    rpn, heads = model.proposal_generator.rpn_head, model.roi_heads
    plain(rpn.conv, "conv_rpn_fpn2")
    plain(rpn.objectness_logits, "rpn_cls_logits_fpn2")
    plain(rpn.anchor_deltas, "rpn_bbox_pred_fpn2")
    for i in (1, 2, 3, 4):
        conv_gn(getattr(heads.box_head, f"conv{i}"), f"head_conv{i}")
        conv_gn(getattr(heads.mask_head, f"mask_fcn{i}"), f"_mask_fcn{i}")
    plain(heads.box_head.fc1, "fc6")
    # Class 0 is the background there; here it is the last one, and has neither box nor mask.
    plain(heads.box_predictor.cls_score, "cls_score", [*range(1, CLASSES + 1), 0])
    plain(heads.box_predictor.bbox_pred, "bbox_pred", slice(4, None))
    plain(heads.mask_head.deconv, "conv5_mask")
    plain(heads.mask_head.predictor, "mask_fcn_logits", slice(1, None))


def outputs(model):
    """Features, RPN, box head and mask head, on an image and two boxes."""
    images = ImageList.from_tensors([torch.rand(3, 64, 96, generator=torch.manual_seed(0))], 32)
    features = model.backbone(images.tensor)
    yield from features.values()
    if not hasattr(model, "roi_heads"):
        return
    for maps in model.proposal_generator.rpn_head([features[f"p{i}"] for i in range(2, 7)]):
        yield from maps
    boxes = [Boxes(torch.tensor([[4.0, 4, 60, 50], [20, 8, 40, 30]]))]
    maps = [features[f"p{i}"] for i in range(2, 6)]
    heads = model.roi_heads
    yield from heads.box_predictor(heads.box_head(heads.box_pooler(maps, boxes)))
    yield heads.mask_head.layers(heads.mask_pooler(maps, boxes))


def save(content, path):
    """With the protocol of Detectron's save_object."""
    path.write_bytes(pickle.dumps(content, protocol=2))
    return str(path)


def checkpointer(cfg, **kwargs):
    return Checkpointer(build_model(cfg), guards=WeightGuards.from_config(cfg), **kwargs)


@torch.no_grad()
def test_detector(tmp_path):
    content = mask_rcnn()
    path = save(content, tmp_path / "any_name")
    weights = read_weights(path)
    assert weights.format == "Detectron"
    assert sorted(weights.left_out) == sorted(n for n in content["blobs"] if "momentum" in n)
    loader = checkpointer(mask_rcnn_config(), evaluation=True)  # all of it is in the file
    loader.load(path)
    ours, by_hand = loader.model.eval(), build_model(mask_rcnn_config()).eval()
    assert not cover(weights, ours).unexpected
    place(by_hand, content["blobs"])
    results = list(zip(outputs(ours), outputs(by_hand), strict=True))
    assert len(results) == 5 + 2 * 5 + 2 + 1
    assert all(torch.equal(a, b) for a, b in results)


def test_backbone(tmp_path):
    path = save(imagenet_backbone(), tmp_path / "any_name")
    weights = read_weights(path)
    assert sorted(weights.left_out) == ["pred_b", "pred_w"]
    known = {"stride_in_1x1": False, "num_groups": 32}
    assert weights.origin == Origin(**DETECTRON, **known)  # though the file's name says nothing
    loader = checkpointer(mask_rcnn_config())
    loader.load(path)
    by_hand = build_model(mask_rcnn_config())
    place(by_hand, imagenet_backbone())
    resnets = (model.backbone.bottom_up.parameters() for model in (loader.model, by_hand))
    pairs = list(zip(*resnets, strict=True))
    assert len(pairs) == 53 * 3 and all(torch.equal(a, b) for a, b in pairs)
    coverage = cover(weights, loader.model)
    assert not coverage.lacking("backbone") and not coverage.unexpected


def test_that_weights_were_standardized_the_file_does_not_tell(tmp_path, caplog):
    """As the authors of Weight Standardization have published theirs, too."""
    path = save(imagenet_backbone(), tmp_path / "any_name")
    for variant, named in (("authors", r"Weight Standardization \(authors\)"), ("", "no Weight")):
        cfg = mask_rcnn_config("MODEL.GN.WEIGHT_STANDARDIZATION", variant)
        checkpointer(cfg).load(path)
        said = f"does not tell whether its convolutions were standardized. The model has {named}"
        assert re.search(said, caplog.text)


@pytest.fixture
def folded():
    """As MSRA's networks, which have a scale and a bias in place of BN."""
    return {k.replace("_gn_", "_bn_"): v for k, v in imagenet_backbone().items()}


def test_names_of_folded_batch_norm(folded):
    weights = convert(folded, "R-50.pkl")
    assert len(weights.batch_norms) == 53 and "res2.0.conv1.norm" in weights.batch_norms
    assert weights.origin.stride_in_1x1 is None  # True in MSRA's, False in others
    assert weights.origin.pixel_std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["R-50.pth", "R-50.safetensors"])
def test_folded_batch_norm_is_told_once_it_is_converted(name, folded, tmp_path):
    path = str(tmp_path / name)
    write_weights(path, convert(folded, "R-50.pkl"))
    with pytest.raises(ConfigError, match="was trained with BN in 53 layers that are GN"):
        checkpointer(mask_rcnn_config("MODEL.DEVICE", "meta")).load(path)


def test_batch_norm_with_statistics(folded):
    """As in Detectron2's copy of FAIR/X-101-32x8d, whose pixels were divided."""
    folded |= {f"{k[:-2]}_rm": v for k, v in folded.items() if k.endswith("_bn_s")}
    weights = convert(folded, "X-101-32x8d.pkl")
    assert len(weights.batch_norms) == 53 and weights.origin.pixel_std is None


def test_folded_batch_norm_for_frozen_batch_norm(folded, tmp_path):
    """Whose statistics are 0 and 1 then: the scale and bias do it all, and nothing is lacking."""
    loader = checkpointer(mask_rcnn_config("MODEL.RESNETS.NORM", "FrozenBN"))
    path = save(folded, tmp_path / "R-50.pkl")
    loader.load(path)
    norm = loader.model.backbone.bottom_up.res5[2].conv3.norm
    assert norm.weight.tolist() == folded["res5_2_branch2c_bn_s"].tolist()
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()
    assert cover(read_weights(path), loader.model).statistics == []
