from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from helpers import TINY, config
from image_files import write_png
from PIL import Image
from predict.saved import MASK_RCNN, NAMES, save

import gn_detect
from gn_detect.checkpoint import Weights, WeightsError
from gn_detect.config import ConfigError, load_config
from gn_detect.data import DataError
from gn_detect.engine.lazy import _config_text, build_lazy_model
from gn_detect.engine.lazy_config import load_lazy_config
from gn_detect.predict import Predictor, predictor
from gn_detect.predict.saved_config import build_mapper, build_model, find_config

SHAPES = "lazy/quickstart/mask_rcnn_R_18_FPN_gn_shapes.py"


@pytest.fixture(scope="module")
def tiny(weights):
    return gn_detect.Predictor(weights, device="cpu")


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8)


def assert_same(found, expected):
    assert found.image_size == expected.image_size and len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(found.get(field), expected.get(field))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_needs_nothing_but_the_weights(weights, photo, suffix):
    path = weights.with_suffix(suffix)
    ours = Predictor(path, device="cpu")
    assert ours.class_names == NAMES and not ours.model.training
    cfg = config(MASK_RCNN, *TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.WEIGHTS", "")
    reference = DefaultPredictor(cfg)
    reference.model.load_state_dict(torch.load(weights.with_suffix(".pth"))["model"])
    assert_same(ours(photo), reference(photo[..., ::-1])["instances"])


def test_takes_paths_arrays_and_images_of_pillow(tiny, photo, tmp_path):
    write_png(tmp_path / "turned.png", np.rot90(photo), orientation=6)  # back by a quarter
    Image.fromarray(photo).save(tmp_path / "a.png")
    found = tiny([tmp_path / "a.png", photo, Image.fromarray(photo), tmp_path / "turned.png"])
    for one in found[:3]:
        assert_same(one, tiny(str(tmp_path / "a.png")))
    with Image.open(tmp_path / "turned.png") as turned:
        assert_same(tiny(turned), found[3])


def test_reads_gray_and_deep_images_as_an_evaluation(tiny, photo, tmp_path):
    gray = photo[..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    expected = tiny(np.stack([gray] * 3, axis=2))
    assert_same(tiny(gray), expected)
    assert_same(tiny(tmp_path / "deep.png"), expected)
    with Image.open(tmp_path / "deep.png") as deep:
        assert_same(tiny(deep), expected)


def test_images_of_one_size_at_once(weights, photo):
    batches = []
    batched = Predictor(weights, device="cpu", batch_size=2)
    batched.model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    single = Predictor(weights, device="cpu")
    other = photo[:, :40]
    images = [photo, photo[::-1], photo[:, ::-1], other, photo]
    for found, expected in zip(batched(images), single(images), strict=True):
        assert found.image_size == expected.image_size
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert batches == [2, 1, 1, 1]


def test_threads_may_share_one(tiny, photo, tmp_path):
    Image.fromarray(photo).save(path := tmp_path / "a.png")
    expected, limit = tiny(photo), Image.MAX_IMAGE_PIXELS
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(tiny, [path] * 12):
            assert_same(found, expected)
    assert Image.MAX_IMAGE_PIXELS == limit


def test_masks_of_a_large_image_are_made_one_by_one(tiny, photo, monkeypatch):
    lazily = next(tiny.stream([photo]))
    assert torch.equal(torch.stack(list(lazily.pred_masks)), tiny(photo).pred_masks)
    monkeypatch.setattr(predictor, "MAX_MASKS", photo[..., 0].size)
    with pytest.raises(DataError, match=r"masks of 80 x 50 pixels take .* predictor\.stream"):
        tiny(photo)


@pytest.mark.parametrize(
    "image, words",
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\) is no image"),
        (np.zeros((0, 4, 3), np.uint8), "no image"),
        (None, "a NoneType"),
        ("absent.png", "absent.png"),
        (np.zeros((1, 9000, 3), np.uint8), "9000 x 1 pixels cannot be resized"),
    ],
)
def test_refuses_what_is_no_image(tiny, image, words):
    with pytest.raises(DataError, match=words):
        tiny(image)


def test_one_pixel_and_too_many(tiny, tmp_path):
    assert tiny(np.zeros((1, 1, 3), np.uint8)).image_size == (1, 1)
    (tmp_path / "map.pbm").write_text("P4 20000 20000\n")  # and no pixels, which are not looked at
    with pytest.raises(DataError, match="map.pbm has 20000 x 20000 pixels, more than .* --tiles"):
        tiny(tmp_path / "map.pbm")


def test_weights_without_a_config(weights, photo, tmp_path):
    state = torch.load(weights.with_suffix(".pth"))["model"]
    torch.save({"model": state}, tmp_path / "old.pth")
    with pytest.raises(WeightsError, match="old.pth does not say what config .* config_file"):
        Predictor(tmp_path / "old.pth")
    name = gn_detect.get_config_file(MASK_RCNN)
    named = Predictor(tmp_path / "old.pth", config_file=name, opts=TINY)
    assert named.class_names == ["class 0", "class 1"]
    assert_same(named(photo), Predictor(weights, device="cpu")(photo))
    with pytest.raises(ConfigError, match="It has 2 classes, the model has 3"):
        options = [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
        Predictor(tmp_path / "old.pth", config_file=name, opts=options)
    del state["roi_heads.box_head.fc1.bias"]
    torch.save({"model": state}, tmp_path / "partial.pth")
    with pytest.raises(ConfigError, match="box head .*would be random"):
        Predictor(tmp_path / "partial.pth", config_file=name, opts=TINY)


def test_refuses_a_device_that_is_not_there(weights):
    with pytest.raises(ConfigError, match="--device.* moon"):
        Predictor(weights, device="moon")


@pytest.mark.parametrize("lazy", [False, True])
def test_weights_of_a_run_with_triton_predict_on_a_cpu(lazy, weights, photo, tmp_path, caplog):
    caplog.set_level("INFO", "gn_detect")
    if lazy:
        cfg = load_lazy_config(gn_detect.get_config_file(SHAPES), ["train.device=cuda"])
        text = _config_text(cfg).replace("num_groups: 16", "num_groups: 16, kernel: triton")
        assert "kernel: triton" in text
        cfg = find_config(saved(text), "x.pth", opts=["train.device=cpu"])
        found = build_model(cfg).eval()([{"image": torch.zeros(3, 64, 64)}])
        assert "instances" in found[0]
    else:
        state = torch.load(weights.with_suffix(".pth"))
        changed = state["config"].replace("KERNEL: auto", "KERNEL: triton")
        assert changed != state["config"]
        torch.save(state | {"config": changed}, tmp_path / "triton.pth")
        found = Predictor(tmp_path / "triton.pth", device="cpu")(photo)
        assert_same(found, Predictor(weights, device="cpu")(photo))
    said = [r.message for r in caplog.records if "is 'triton'" in r.message]
    assert len(said) == 1 and "on the CPU GN runs by PyTorch's operations" in said[0]


def test_names_of_registered_data(tmp_path):
    cfg = config(MASK_RCNN, *TINY)
    path = save(tmp_path, cfg)
    assert Predictor(path, device="cpu").class_names[:2] == ["person", "bicycle"]


def saved(text):
    return Weights("Detectron2", {}, rest={"config": text})


def test_keys_of_other_versions_are_left_out(caplog):
    cfg = load_config()
    cfg.MODEL.GN.NEW = CfgNode({"KEY": 3})
    cfg.MODEL.GN.EPS = 1e-3
    found = find_config(saved(cfg.dump()), "new.pth", opts=["INPUT.MIN_SIZE_TEST", "7"])
    assert (found.MODEL.GN.EPS, found.INPUT.MIN_SIZE_TEST) == (1e-3, 7)
    assert "MODEL.GN.NEW ({'KEY': 3})" in caplog.text
    cfg.MODEL.META_ARCHITECTURE, cfg.NEW = "Mine", "a" * 1000
    found = find_config(saved(cfg.dump()), "new.pth")
    assert "NEW ('aaaaaaaaa" in caplog.text and "a" * 100 not in caplog.text
    with pytest.raises(ConfigError, match="'Mine'.*import what registers"):
        build_model(found)


def test_lazy_config_of_the_weights():
    cfg = load_lazy_config(gn_detect.get_config_file(SHAPES), ["train.device=cpu"])
    found = find_config(saved(_config_text(cfg)), "x.pth", opts=["train.device=cpu"])
    assert str(build_model(found)) == str(build_lazy_model(cfg))
    mapper = build_mapper(found)
    assert (mapper.image_format, mapper.is_train) == ("BGR", False)
    assert mapper.augmentations.augs[0].short_edge_length == (128, 128)


@pytest.mark.parametrize(
    "model, words",
    [
        ("{_target_: os.system, command: touch hacked}", "calls 'os.system'"),
        ("{x: {_target_: detectron2.modeling.backbone.fpn.math.sqrt}}", "fpn.math.sqrt"),
        ("{_target_: detectron2.modeling.build_model}", "build_model"),
        ("{_target_: torch.nn.modules.module.warnings.warn}", "warnings.warn"),
        ("{_target_: detectron2.modeling.mmdet_wrapper.MMDetBackbone}", "mmdet_wrapper"),
        ("{x: '${evil}'}\nevil: {_target_: os.system}", "calls 'os.system'"),
        ("{x: !!python/name:os.system ''}", "calls 'os.system'"),
        ("{x: !!python/object:os.environ {}}", "calls 'os.environ'"),
        ("{x: !!python/object/apply:os.system ['touch hacked']}", "cannot be used"),
        ("{x: ", "cannot be used"),
        ("{x: !!python/object:torch.nn.BatchNorm2d {num_features: [a]}}", "cannot be used"),
        ("{x: '${nothing}'}", "cannot be used"),
    ],
)
def test_calls_nothing_but_components(model, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = _config_text(load_lazy_config(gn_detect.get_config_file(SHAPES)))
    before, after = text.index("model:\n"), text.index("optimizer:\n")
    with pytest.raises(WeightsError, match=f"bad.pth.*{words}.*config_file"):
        find_config(saved(f"{text[:before]}model: {model}\n{text[after:]}"), "bad.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[1]", "MODEL: 3", "{MODEL: {GN: {EPS: []}}}", "", "a"])
def test_refuses_what_is_no_config(text):
    with pytest.raises(WeightsError, match="bad.pth.*config_file"):
        find_config(saved(text), "bad.pth")
