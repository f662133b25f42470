"""Weights of BN networks, and the GN networks that are made of them."""

import copy
import pickle
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from helpers import ROOT, TINY, config
from PIL import Image

from gn_detect.checkpoint import Checkpointer, WeightGuards
from gn_detect.config import ConfigError
from gn_detect.data.coco import DataError
from gn_detect.engine.bn_to_gn import convert, read_images

PHOTOS = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
NORMS = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
NARROW = [
    *("MODEL.GN.NUM_GROUPS", 8, "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (32, 32)),
]
IN = ("MODEL.GN.NUM_GROUPS", 0, "MODEL.GN.CHANNELS_PER_GROUP", 1)

pytestmark = pytest.mark.slow


def gn_config(*opts, name=PHOTOS):
    return config(name, *TINY, *NARROW, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *opts)


def all_norms(norm):
    return [word for key in NORMS for word in (f"MODEL.{key}.NORM", norm)]


def bn_config(*opts, norm="BN", name=PHOTOS):
    return gn_config(*all_norms(norm), *opts, name=name)


def bn_model(cfg):
    """As if trained: statistics, gamma and beta are anything, gamma also negative."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.normal_(0, 0.2, generator=rng)
                module.running_var.uniform_(0.5, 2, generator=rng)
                module.weight.uniform_(-1, 1.5, generator=rng)
                module.bias.normal_(0, 0.5, generator=rng)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.5, generator=rng)
    return model


def weights_of(model, tmp_path):
    DetectionCheckpointer(model, str(tmp_path)).save("bn")
    return str(tmp_path / "bn.pth")


@pytest.fixture(scope="module")
def bn(tmp_path_factory):
    """(model, file) of :func:`bn_config`."""
    model = bn_model(bn_config())
    return model, weights_of(model, tmp_path_factory.mktemp("bn"))


@pytest.fixture(scope="module")
def converted(bn):
    """From two images."""
    return convert(gn_config(), bn[1], list(smooth_images(2)))


def smooth_images(count, size=64, seed=0):
    """Blots of color, of other contrast and brightness in each image: (3, size, size)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        blots = rng.uniform(0, 255, (6, 6, 3)) * rng.uniform(0.3, 1)
        image = Image.fromarray(blots.astype(np.uint8)).resize((size, size), Image.BICUBIC)
        yield torch.as_tensor(np.asarray(image, dtype=np.float32).transpose(2, 0, 1).copy())


@pytest.fixture
def image_dir(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for i, image in enumerate(smooth_images(4, size=80)):
        pixels = image.numpy().transpose(1, 2, 0).astype(np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    return directory


def loaded(cfg, weights):
    """The GN network with the result, of which nothing is lacking."""
    model = build_model(cfg).eval()
    model.load_state_dict(weights)
    return model


def plain_norm(module, x):
    """A norm layer on a float64 array (N, C, *) by its formula."""
    gamma, beta = (p.detach().numpy() for p in (module.weight, module.bias))
    if isinstance(module, torch.nn.GroupNorm):
        groups = x.reshape(len(x), module.num_groups, -1)
        mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        x = ((groups - mean) / np.sqrt(var + module.eps)).reshape(x.shape)
        mean, var = np.zeros_like(gamma), np.ones_like(gamma) - module.eps
    else:
        mean, var = module.running_mean.numpy(), module.running_var.numpy()
    shape = (-1, *[1] * (x.ndim - 2))
    scale = gamma / np.sqrt(var + module.eps)
    return (x - mean.reshape(shape)) * scale.reshape(shape) + beta.reshape(shape)


def moments(model, images, proposals, boxes):
    """Mean and variance of each channel behind each norm, in float64."""
    found = {}

    def record(name):
        def hook(module, inputs, output):
            out = plain_norm(module, inputs[0].detach().numpy())
            out = np.moveaxis(out, 1, 0).reshape(out.shape[1], -1)
            found[name] = out.mean(1), out.var(1)

        return hook

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(record(name))
    heads = model.roi_heads
    with torch.no_grad():
        features = model.backbone(images)
        heads.box_head(heads.box_pooler([features[f] for f in heads.box_in_features], proposals))
        heads.mask_head.layers(
            heads.mask_pooler([features[f] for f in heads.mask_in_features], boxes)
        )
    return found


@pytest.mark.parametrize("threshold, detected", [(0.05, True), (1.1, False)])
def test_moments_of_every_layer_are_those_of_bn(threshold, detected, tmp_path):
    source = bn_model(bn_config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold))
    with torch.no_grad():
        source.backbone.bottom_up.stem.conv1.weight[4:8] = 0  # a group that is a constant
    images = list(smooth_images(4))
    cfg = gn_config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", threshold)
    result = convert(cfg, weights_of(source, tmp_path), images)
    assert result.num_images == (3, 1) and result.fresh == []

    batch = source.preprocess_image([{"image": image} for image in images[:3]])
    with torch.no_grad():
        features = source.backbone(batch.tensor)
        proposals, _ = source.proposal_generator(batch, features, None)
        detections = source.roi_heads._forward_box(features, proposals)
    assert any(len(d) for d in detections) == detected
    proposals = [Boxes(p.proposal_boxes.tensor.double()) for p in proposals]
    boxes = [Boxes(d.pred_boxes.tensor.double()) for d in detections] if detected else proposals
    target = loaded(cfg, result.weights)
    expected = moments(source.double(), batch.tensor.double(), proposals, boxes)
    found = moments(target.double(), batch.tensor.double(), proposals, boxes)
    assert len(expected) == 69 and expected.keys() == found.keys() == set(result.calibrated)
    for layer, (mean, variance) in expected.items():
        np.testing.assert_allclose(found[layer][0], mean, rtol=1e-4, atol=1e-4, err_msg=layer)
        np.testing.assert_allclose(found[layer][1], variance, rtol=1e-4, atol=1e-4, err_msg=layer)
    assert (target.backbone.bottom_up.stem.conv1.norm.weight[4:8] == 0).all()


@pytest.mark.parametrize("fpn_norm", ["BN", ""])
def test_one_image_and_one_channel_per_group_is_exact(fpn_norm, tmp_path):
    """GN is then an affine function of each channel, as BN is; also of an FPN with biases."""
    source = bn_model(bn_config("MODEL.FPN.NORM", fpn_norm))
    (image,) = smooth_images(1)
    weights = weights_of(source, tmp_path)
    result = convert(gn_config(*IN), weights, [image, image.clone()])
    assert " ".join(result.errors["plain"]) == "res2 res3 res4 res5 p2 p3 p4 p5 p6"
    assert max(result.errors["calibrated"].values()) < 1e-4
    assert min(result.errors["plain"].values()) > 0.1
    assert min(result.errors["copied"].values()) > 0.1
    batch = source.preprocess_image([{"image": image}]).tensor
    with torch.no_grad():
        expected = source.backbone(batch)
        features = loaded(gn_config(*IN), result.weights).backbone(batch)
    for name, x in expected.items():
        torch.testing.assert_close(features[name], x, rtol=1e-3, atol=1e-3)


def test_error_on_other_images_and_methods(bn):
    (source, weights), images = bn, list(smooth_images(8))
    results = {
        m: convert(gn_config(), weights, images, m) for m in ("calibrated", "copied", "plain")
    }
    errors = results["calibrated"].errors
    assert results["plain"].num_images == (6, 2) and results["plain"].errors == errors
    for output in errors["plain"]:
        assert errors["calibrated"][output] < 0.5 * errors["plain"][output], output
    # What is reported is of the network that is written.
    held_out = source.preprocess_image([{"image": images[i]} for i in (3, 7)]).tensor
    for method, result in results.items():
        with torch.no_grad():
            expected = source.backbone(held_out)["p3"]
            found = loaded(gn_config(), result.weights).backbone(held_out)["p3"]
        error = ((found - expected).norm() / expected.norm()).item()
        assert error == pytest.approx(errors[method]["p3"], rel=1e-4)
    norms = results["calibrated"].calibrated
    known = source.state_dict()
    for layer in norms:
        for name, plain in ((f"{layer}.weight", 1), (f"{layer}.bias", 0)):
            assert (results["plain"].weights[name] == plain).all()
            assert torch.equal(results["copied"].weights[name], known[name])
    others = {n for n in known if n.rpartition(".")[0] not in norms}
    for result in results.values():
        assert all(torch.equal(result.weights[name], known[name]) for name in others)


def test_frozen_bn_is_bn(bn, converted, tmp_path):
    state = bn[0].state_dict()
    state = {f"module.{k}": v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({"model": state}, tmp_path / "bn.pth")
    found = convert(gn_config(), str(tmp_path / "bn.pth"), list(smooth_images(2))).weights
    assert found.keys() == converted.weights.keys()
    assert all(torch.equal(found[name], value) for name, value in converted.weights.items())


def test_heads_of_another_kind_start_afresh(tmp_path):
    """As in Detectron2's zoo: BN in the ResNet alone, and a box head without convolutions."""
    box = ("MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 2)
    source = bn_model(bn_config("MODEL.RESNETS.NORM", "FrozenBN", *box, norm=""))
    result = convert(gn_config(), weights_of(source, tmp_path), list(smooth_images(2)))
    assert result.fresh == ["box head"]
    assert not any(name.startswith("roi_heads.box_") for name in result.weights)
    assert len(result.calibrated) == 53 + 8 + 4  # ResNet, FPN, mask head
    assert "backbone.fpn_lateral2.bias" not in result.weights
    missing, unexpected = build_model(gn_config()).load_state_dict(result.weights, strict=False)
    assert all(name.startswith("roi_heads.box_") for name in missing) and not unexpected


def test_backbone_alone(bn, tmp_path):
    """ImageNet weights as Detectron2's converter writes them, without prefix; any classes."""
    source = bn[0].backbone.bottom_up
    content = {"model": {k: v.numpy() for k, v in source.state_dict().items()}}
    content |= {"__author__": "torchvision", "matching_heuristics": True}
    weights = tmp_path / "bn.pkl"
    weights.write_bytes(pickle.dumps(content))
    cfg = gn_config("MODEL.ROI_HEADS.NUM_CLASSES", None)
    result = convert(cfg, str(weights), list(smooth_images(2)))
    assert result.fresh == ["FPN", "box head", "mask head"]
    assert len(result.calibrated) == 53
    assert " ".join(result.errors["plain"]) == "res2 res3 res4 res5"
    assert all(name.startswith("backbone.bottom_up.") for name in result.weights)
    # Nor is the error of a random FPN reported where it has no norm.
    cfg.MODEL.FPN.NORM = ""
    result = convert(cfg, str(weights), list(smooth_images(2)))
    assert " ".join(result.errors["plain"]) == "res2 res3 res4 res5"


def test_gn_heads_are_kept(tmp_path):
    source = bn_model(bn_config("MODEL.RESNETS.NORM", "BN", norm="GN"))
    result = convert(gn_config(), weights_of(source, tmp_path), list(smooth_images(2)))
    assert len(result.calibrated) == 53 and result.fresh == []
    assert result.origin.num_groups == 8
    loaded(gn_config(), result.weights)
    for name, value in source.state_dict().items():
        if not name.startswith("backbone.bottom_up."):
            assert torch.equal(result.weights[name], value), name


def test_heads_are_calibrated_beside_an_rpn_that_starts_afresh(bn, converted):
    """They see the BN network's proposals, which the norm of the new RPN does not change."""
    result = convert(gn_config("MODEL.RPN.NORM", "GN"), bn[1], list(smooth_images(2)))
    assert result.fresh == ["RPN"] and len(result.calibrated) == 69
    expected = {n: v for n, v in converted.weights.items() if "proposal_generator" not in n}
    assert result.weights.keys() == expected.keys()
    assert all(torch.equal(result.weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "name, last",
    [
        ("COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml", "box_head.2.conv4"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_gn_1x.yaml", "keypoint_head.conv_fcn2"),
    ],
)
def test_other_heads(name, last, tmp_path):
    source = bn_model(bn_config(name=name))  # without norm in the keypoint head
    cfg = gn_config("MODEL.ROI_KEYPOINT_HEAD.NORM", "GN", name=name)
    result = convert(cfg, weights_of(source, tmp_path), list(smooth_images(2)))
    norms = [n for n, m in loaded(cfg, result.weights).named_modules() if n.endswith("norm")]
    assert set(result.calibrated) == set(norms) and f"roi_heads.{last}.norm" in norms
    gamma = result.weights[f"roi_heads.{last}.norm.weight"]
    assert gamma.isfinite().all() and (gamma != 1).any()


C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_gn_2x.yaml"
C4_TINY = ("MODEL.RPN.POST_NMS_TOPK_TEST", 5)


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    """(BN model, file, config with GN)."""
    model = bn_model(bn_config(*C4_TINY, name=C4))
    return model, weights_of(model, tmp_path_factory.mktemp("c4")), gn_config(*C4_TINY, name=C4)


def test_c4(c4):
    _, weights, cfg = c4
    result = convert(cfg, weights, list(smooth_images(2)))
    assert len(result.calibrated) == 53 and set(result.errors["plain"]) == {"res4"}
    assert "roi_heads.res5.2.conv3.norm" in result.calibrated
    loaded(cfg, result.weights)


def test_c4_from_a_backbone_sees_tiles_of_the_image(c4, tmp_path):
    """Not what an RPN with random weights proposes."""
    (source, _, cfg), path = c4, str(tmp_path / "bn.pth")
    kept = ("backbone.", "roi_heads.res5.")
    state = {n: v for n, v in source.state_dict().items() if n.startswith(kept)}
    torch.save({"model": state}, path)
    images = list(smooth_images(2))
    torch.manual_seed(1)
    weights = convert(cfg, path, images).weights
    assert len([name for name in weights if name.startswith("roi_heads.res5.")]) == 30

    edges = [(n, i * 64 // n, 64 // n) for n in (1, 2, 4) for i in range(n)]
    tiles = [(x, y, x + s, y + s) for n, x, s in edges for m, y, _ in edges if m == n]
    assert len(tiles) == 21
    target = build_model(cfg).eval()
    target.load_state_dict(weights, strict=False)
    outputs = []
    for model in (source, target):
        batch = model.preprocess_image([{"image": images[0]}]).tensor
        with torch.no_grad():
            rois = model.roi_heads.pooler(
                [model.backbone(batch)["res4"]], [Boxes(torch.tensor(tiles).float())]
            )
            conv = model.roi_heads.res5[0].conv1
            out = plain_norm(conv.norm, F.conv2d(rois, conv.weight).numpy())
        outputs.append((out.mean((0, 2, 3)), out.var((0, 2, 3))))
    for expected, found in zip(*outputs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_retinanet_head_starts_afresh(tmp_path):
    name = "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml"
    no_head = ("MODEL.RETINANET.NORM", "")
    source = bn_model(bn_config(*no_head, "MODEL.RETINANET.NUM_CLASSES", 2, name=name))
    cfg = gn_config("MODEL.RETINANET.NUM_CLASSES", None, name=name)
    result = convert(cfg, weights_of(source, tmp_path), list(smooth_images(2)))
    assert result.fresh == ["RetinaNet head"] and "p7" in result.errors["plain"]
    assert len(result.calibrated) == 53 + 6
    assert "backbone.top_block.p6.weight" in result.weights
    assert not any(name.startswith("head.") for name in result.weights)


def run(*args):
    """tools/bn_to_gn.py"""
    tool = runpy.run_path(str(ROOT / "tools/bn_to_gn.py"))
    config_file = ("--config-file", ROOT / "configs" / PHOTOS)
    tool["main"]([str(arg) for arg in (*config_file, *args, *TINY, *NARROW)])


def test_the_tool_writes_what_a_training_starts_from(bn, tmp_path, image_dir, capsys):
    """With the classes of the weights, which its config does not name."""
    output = tmp_path / "new/gn.pth"
    run("--weights", bn[1], "--images", image_dir, "--output", output)
    printed = capsys.readouterr().out
    assert "69 layers calibrated on 3 images of 64x64 pixels" in printed
    rows = [line.split()[0] for line in printed.splitlines()[3:6]]
    assert rows == ["plain", "copied", "calibrated"]
    model, written = build_model(gn_config()), torch.load(output)["model"]
    Checkpointer(model, guards=WeightGuards.from_config(gn_config())).load(str(output))
    assert model.state_dict().keys() == written.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in written.items())


def remove(state):
    for name in [n for n in state if ".res4." in n]:
        del state[name]


def reshape(state):
    state["backbone.fpn_output3.weight"] = torch.zeros(8, 8, 3, 3)


def overflow(state):
    name = "backbone.bottom_up.res3.0.conv1.weight"
    state[name] = state[name] * 1e20


RGB = dict(input_format="RGB", pixel_mean=None, pixel_std=None, stride_in_1x1=None)
WITH_WS = {"weight_standardization": "authors"}
WS = ("MODEL.GN.WEIGHT_STANDARDIZATION", "authors")
REFUSED = {  # norm of the weights; options of the GN config; what is changed, or said, in the file
    "no BN": ("", (), None, "bn.pth has no BN in any layer that is GN here"),
    "GN": ("GN", (), None, "bn.pth has GN already"),
    "Weight Standardization": ("BN", WS, None, "WEIGHT_STANDARDIZATION is 'authors'"),
    "no GN": ("BN", all_norms("BN"), None, "no norm of the config is GN"),
    "weights with it": ("BN", (), WITH_WS, r"Standardization \(authors\), without"),
    "overflow": ("BN", (), overflow, "output of .*bottom_up.res3.0.conv1.norm .* not finite"),
    "another backbone": ("BN", (), remove, r"lacks \d+ tensors of the backbone, .*res4.0"),
    "another shape": ("BN", (), reshape, r"fpn_output3.* has the shape \[8, 8, 3, 3\] .* \[32"),
    "another input": ("BN", (), RGB, "INPUT.FORMAT is BGR, the weights' is RGB"),
}


@pytest.mark.parametrize("norm, opts, change, message", REFUSED.values(), ids=REFUSED)
def test_refused_weights(norm, opts, change, message, bn, tmp_path):
    model = bn[0] if norm == "BN" else build_model(bn_config(norm=norm))
    content = {"model": copy.copy(model.state_dict())}
    if callable(change):
        change(content["model"])
    elif change:
        content["origin"] = change
    torch.save(content, tmp_path / "bn.pth")
    with pytest.raises(ConfigError, match=message):
        convert(gn_config(*opts), str(tmp_path / "bn.pth"), list(smooth_images(2)))


def test_refused_names():
    with pytest.raises(ConfigError, match="there is no file nowhere.pth"):
        convert(gn_config(), "nowhere.pth", list(smooth_images(2)))
    with pytest.raises(SystemExit, match="error: gn.pkl: weights are written as .pth or .safet"):
        run("--weights", "bn.pth", "--images", "x", "--output", "gn.pkl")


def test_refused_without_proposals(bn):
    with pytest.raises(DataError, match="proposes no object in the images"):
        convert(gn_config("MODEL.RPN.POST_NMS_TOPK_TEST", 0), bn[1], list(smooth_images(2)))


def test_refused_images(image_dir):
    cfg = gn_config()
    with pytest.raises(DataError, match="--num-images is 1; at least 2 are needed: one is held"):
        read_images(str(image_dir), 1, cfg)
    with pytest.raises(ConfigError, match="INPUT.MIN_SIZE_TEST is 16"):
        read_images(str(image_dir), 4, gn_config("INPUT.MIN_SIZE_TEST", 16))
    with pytest.raises(DataError, match="there is no directory .*nowhere"):
        read_images(str(image_dir / "nowhere"), 4, cfg)
    (image_dir / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot use the image .*1.png \(UnidentifiedImageError"):
        read_images(str(image_dir), 4, cfg)
    for i in (1, 2, 3):
        (image_dir / f"{i}.png").unlink()
    with pytest.raises(DataError, match="images holds 1 images .* is 4; at least 2"):
        read_images(str(image_dir), 4, cfg)


def test_images(image_dir):
    """Scaled on the short side, the middle of the long one, in the channel order of the config."""
    stripes = np.zeros((80, 160, 3), dtype=np.uint8)
    stripes[:, 40:120] = (200, 100, 50)
    for i in range(4):
        Image.fromarray(stripes).save(image_dir / f"{i}.png")
    images = read_images(str(image_dir), 3, gn_config("INPUT.MIN_SIZE_TEST", 70))
    assert len(images) == 3
    for image in images:
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        assert (image == torch.tensor([50.0, 100.0, 200.0]).view(3, 1, 1)).all()
    # As a whole it would be 24 million pixels long.
    Image.fromarray(np.full((2, 60_000, 3), 7, dtype=np.uint8)).save(image_dir / "0.png")
    image, *_ = read_images(str(image_dir), 2, gn_config("INPUT.MIN_SIZE_TEST", 810))
    assert image.shape == (3, 800, 800) and (image == 7).all()
