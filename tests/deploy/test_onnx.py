"""Exported detectors against the PyTorch models that they are made of."""

import json
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from helpers import TINY, config, randomize, refusal, run_tool
from PIL import Image

import gn_detect
from gn_detect import Predictor
from gn_detect.config import ConfigError
from gn_detect.deploy import runtime, tracing
from gn_detect.deploy.agreement import compare
from gn_detect.deploy.onnx import export_onnx

KINDS = {
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_gn_3x.yaml",
    "Mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_ws_3x.yaml",
    "Cascade": "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml",
}
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_gn_3x.yaml"
EACH_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "Cascade" else k for k in KINDS]
)
SIZES = [(64, 64), (131, 77), (70, 301)]  # TINY resizes to 64, at most 96
OPTS = [
    *map(str, TINY),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.ROI_KEYPOINT_HEAD.NAME", "GNKRCNNConvDeconvUpsampleHead"),
    *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32, 32)"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.RETINANET.NUM_CLASSES", "80"),
    *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "17", "MODEL.WEIGHTS", ""),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.02", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.02"),
    *("TEST.DETECTIONS_PER_IMAGE", "20"),
]
# Of the last layers, so that scores and masks of random weights differ.
SPREAD = {"cls_score.weight": 0.2, "objectness_logits.weight": 0.3, "bbox_pred.weight": 0.02}
SPREAD |= {"mask_head.predictor.weight": 0.2, "score_lowres.weight": 0.1}


def opts_of(kind):
    return [*OPTS, "MODEL.KEYPOINT_ON", str(kind == "Mask")]  # both heads in one model


def weights_of(kind, path):
    torch.manual_seed(0)
    model = randomize(build_model(config(KINDS.get(kind, kind), *opts_of(kind))))
    for name, parameter in model.named_parameters():
        if std := next((s for end, s in SPREAD.items() if name.endswith(end)), 0):
            torch.nn.init.normal_(parameter, std=std / 4 if kind == "RetinaNet" else std)
    torch.save({"model": model.state_dict()}, path)
    return path


def predictor_of(kind, path, *opts):
    file = gn_detect.get_config_file(KINDS.get(kind, kind))
    return Predictor(path, config_file=file, opts=[*opts_of(kind), *opts], device="cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind -> the predictor and the ONNX file."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            predictor = predictor_of(kind, str(weights_of(kind, folder / "weights.pth")))
            export_onnx(predictor, str(folder / "model.onnx"))
            made[kind] = predictor, folder / "model.onnx"
        return made[kind]

    return get


def image_of(size, seed=0) -> np.ndarray:
    """Smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.BICUBIC))


def assert_same(found: runtime.Detections, expected: Instances) -> None:
    assert len(found.boxes) == len(expected)
    np.testing.assert_array_equal(found.classes, expected.pred_classes)
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor, atol=1e-2, rtol=0)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert (found.masks is not None) == expected.has("pred_masks")
    assert (found.keypoints is not None) == expected.has("pred_keypoints")
    if found.masks is not None:
        theirs = expected.pred_masks.numpy()
        assert found.masks.shape == theirs.shape
        joint, either = found.masks & theirs, found.masks | theirs
        assert joint.sum() >= 0.999 * either.sum()
        assert either.any()
    if found.keypoints is not None:
        np.testing.assert_allclose(found.keypoints, expected.pred_keypoints, atol=1e-2, rtol=0)


@EACH_KIND
def test_equals_pytorch(kind, exported):
    predictor, path = exported(kind)
    detector = runtime.Detector(path)
    assert detector.class_names == predictor.class_names
    for size in SIZES:
        image = image_of(size)
        expected = predictor(image)
        assert len(expected) > 5
        assert_same(detector(image), expected)


@pytest.mark.slow
def test_masked_padding(tmp_path):
    """The padding of an image alone."""
    opts = "MODEL.GN.MASK_PADDING", "True"
    weights = str(weights_of("Mask", tmp_path / "weights.pth"))
    predictor = predictor_of("Mask", weights, *opts)
    export_onnx(predictor, str(tmp_path / "model.onnx"))
    detector, other = runtime.Detector(tmp_path / "model.onnx"), predictor_of("Mask", weights)
    for size in SIZES[1:]:
        image = image_of(size)
        expected = predictor(image)
        assert_same(detector(image), expected)
        assert not torch.allclose(other(image).scores[:5], expected.scores[:5], atol=1e-3)


@EACH_KIND
def test_finds_nothing(kind, exported, tmp_path):
    check_nothing_found(exported(kind)[1], tmp_path)


def check_nothing_found(path, tmp_path):
    """With a threshold that no score passes."""
    model = onnx.load(path)
    tensors = [*model.graph.initializer]
    tensors += [a.t for n in model.graph.node for a in n.attribute if a.type == a.TENSOR]
    changed = 0
    for tensor in tensors:
        value = onnx.numpy_helper.to_array(tensor)
        if value.size == 1 and np.isclose(value, 0.02) and value.dtype.kind == "f":
            tensor.CopyFrom(onnx.numpy_helper.from_array(value * 100, tensor.name))
            changed += 1
    assert changed
    onnx.save(model, tmp_path / "model.onnx")
    found = runtime.Detector(tmp_path / "model.onnx")(image_of((50, 80)))
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.classes.shape == (0,)
    assert found.masks is None or found.masks.shape == (0, 50, 80)
    assert found.keypoints is None or found.keypoints.shape == (0, 17, 3)


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """The predictor, the file of images of 70 x 90 with GN as an operator, and what was printed."""
    folder = tmp_path_factory.mktemp("special")
    weights = weights_of(FASTER, folder / "weights.pth")
    arguments = "--static", "70x90", "--group-norm", "op"
    file = gn_detect.get_config_file(FASTER)
    path = folder / "model.onnx"
    result = run_tool("export.py", weights, path, "--config-file", file, *arguments, *OPTS)
    return predictor_of(FASTER, str(weights)), path, result.stdout


def test_tool_compares(special):
    assert re.search("[1-9][0-9]* objects, 0 not found by both", special[2])


@pytest.mark.slow
def test_the_operator_finds_nothing(exported, tmp_path):
    """Of which ONNX Runtime refuses an empty input."""
    export_onnx(exported("Mask")[0], str(tmp_path / "op.onnx"), group_norm="op")
    check_nothing_found(tmp_path / "op.onnx", tmp_path)


def test_group_normalization_as_operator(special, exported):
    predictor, path, _ = special
    model, without = onnx.load(path), onnx.load(exported("Mask")[1])
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in predictor.model.modules())
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GroupNormalization") >= norms  # heads run once for each level
    assert "InstanceNormalization" not in kinds
    assert model.opset_import[0].version == 21
    assert "GroupNormalization" not in [node.op_type for node in without.graph.node]
    image = image_of((70, 90))
    with torch.no_grad():  # at this size nothing is resized
        expected = predictor.model([{"image": torch.tensor(image.T[::-1].copy()).mT}])
    assert_same(runtime.Detector(path)(image), expected[0]["instances"])


def test_static(special):
    """An image of another size is fit into the corner; of its own, it is not resized."""
    predictor, path, _ = special
    detector = runtime.Detector(path)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [70, 90, 3]
    image = image_of((35, 30))
    found = detector(image)
    assert len(found.boxes) and (found.boxes.max(axis=0) <= [30, 35, 30, 35]).all()
    canvas = np.full((70, 90, 3), np.rint(predictor.cfg.MODEL.PIXEL_MEAN[::-1]), dtype=np.uint8)
    canvas[:, :60] = Image.fromarray(image).resize((60, 70), Image.BILINEAR)
    whole = detector(canvas)
    inside = whole.boxes[:, 0] < 60
    np.testing.assert_allclose(
        found.boxes, whole.boxes[inside].clip(0, [60, 70, 60, 70]) / 2, atol=1e-3
    )


def test_metadata(exported):
    predictor, path = exported("Mask")
    model = onnx.load(path)
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert model.producer_name == "gn_detect"
    assert facts["class_names"] == predictor.class_names
    assert (facts["min_size"], facts["max_size"], facts["input_format"]) == (64, 96, "RGB")
    assert facts["pixel_mean"] == pytest.approx(predictor.cfg.MODEL.PIXEL_MEAN)
    inputs = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
              for i in model.graph.input}  # fmt: skip
    assert inputs == {"image": ["height", "width", 3]}


def test_model_is_as_before(exported):
    predictor, _ = exported("Mask")
    variants = {getattr(m, "weight_standardization", "") for m in predictor.model.modules()}
    assert "authors" in variants


class TestAlone:
    """A copy of runtime.py beside the model, where nothing else can be imported."""

    BLOCK = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'detectron2', 'gn_detect', 'onnx', 'cv2'):\n"
        "    sys.modules[name] = None\n"
        "sys.path.insert(0, '')\n"
        "import runtime\n"
    )

    def run(self, folder, code):
        arguments = [sys.executable, "-c", self.BLOCK + code]
        return subprocess.run(arguments, cwd=folder, capture_output=True, text=True)

    def test_same_detections(self, exported, tmp_path):
        predictor, path = exported("Mask")
        (tmp_path / "runtime.py").write_text(open(runtime.__file__).read())
        Image.fromarray(image_of((80, 120))).save(tmp_path / "photo.png")
        result = self.run(tmp_path, f"runtime.main([{str(path)!r}, 'photo.png'])")
        assert result.stderr == ""
        lines = [json.loads(line) for line in result.stdout.splitlines()]
        expected = predictor(tmp_path / "photo.png")
        assert [line["class"] for line in lines] == [
            predictor.class_names[i] for i in expected.pred_classes
        ]
        boxes = np.array([line["box"] for line in lines])
        np.testing.assert_allclose(boxes, expected.pred_boxes.tensor, atol=1e-2)
        for line, mask in zip(lines, expected.pred_masks.numpy(), strict=True):
            runs = np.repeat(np.arange(len(line["mask"]["counts"])) % 2, line["mask"]["counts"])
            decoded = runs.reshape(line["mask"]["size"], order="F").astype(bool)
            assert (decoded != mask).mean() < 1e-3

    def test_errors_are_sentences(self, exported, tmp_path):
        (tmp_path / "runtime.py").write_text(open(runtime.__file__).read())
        (tmp_path / "photo.png").write_text("no image")
        result = self.run(tmp_path, f"runtime.main([{str(exported('Mask')[1])!r}, 'photo.png'])")
        assert result.returncode == 1
        assert result.stderr.startswith("error: cannot read the image photo.png")
        assert result.stderr.count("\n") == 1


def test_file_of_another_producer(exported, tmp_path):
    model = onnx.load(exported("Mask")[1])
    model.producer_name = "pytorch"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="written by pytorch, not by gn_detect: .*export.py"):
        runtime.Detector(tmp_path / "other.onnx")
    model.producer_name = "gn_detect"
    model.metadata_props.pop(0)  # class_names
    onnx.save(model, tmp_path / "lost.onnx")
    with pytest.raises(ValueError, match="lost.onnx has lost metadata, .*'class_names'.*again"):
        runtime.Detector(tmp_path / "lost.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="text.onnx cannot be run by ONNX Runtime"):
        runtime.Detector(tmp_path / "text.onnx")


@pytest.fixture(scope="module")
def both(exported):
    predictor, path = exported("Mask")
    return predictor, runtime.Detector(path)


class TestReading:
    """Pixels as gn_detect reads them."""

    def equal(self, both, image):
        predictor, detector = both
        found = detector.read(image)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, predictor.read(image))

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, orientation, both, tmp_path):
        exif = Image.Exif()
        exif[0x112] = orientation
        for suffix in ("jpg", "png", "tiff"):
            path = tmp_path / f"photo.{suffix}"
            Image.fromarray(image_of((5, 9))).save(path, exif=exif)
            self.equal(both, path)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
    def test_modes(self, mode, both):
        self.equal(both, Image.fromarray(image_of((5, 9))).convert(mode))

    def test_deep(self, both, tmp_path):
        values = np.array([[0, 1, 200], [300, 40000, 65535]])
        for name, pixels in (
            ("a.png", values.astype(np.uint16)),
            ("b.tiff", values.astype(np.int32)),
            ("c.tiff", (values / 65535).astype(np.float32)),
        ):
            Image.fromarray(pixels).save(tmp_path / name)
            self.equal(both, tmp_path / name)
        Image.fromarray((values + 1).astype(np.int32)).save(tmp_path / "d.tiff")
        with pytest.raises(ValueError, match="values of 1 to 65536, beyond the 0 to 65535"):
            both[1].read(tmp_path / "d.tiff")

    def test_arrays(self, both):
        self.equal(both, image_of((5, 9)))
        self.equal(both, image_of((5, 9))[..., 0])
        for wrong in (np.zeros((5, 9, 3)), np.zeros((5, 9, 4), np.uint8), np.zeros(0, np.uint8)):
            with pytest.raises(ValueError, match="is no image; give RGB pixels"):
                both[1].read(wrong)


def assert_pasted_as_detectron2(box, probability, size):
    mask = np.zeros(size, dtype=bool)
    runtime.paste(mask, box, probability)
    expected = paste_masks_in_image(torch.tensor(probability)[None], torch.tensor(box)[None], size)
    np.testing.assert_array_equal(mask, expected[0])


@pytest.mark.parametrize("box", [(0, 1.7, 8.4, 20), (2.5, 2.5, 2.9, 9.0), (0, 0, 30, 20)])
def test_paste_equals_detectron2(box):
    probability = np.random.default_rng(0).random((28, 28), dtype=np.float32)
    assert_pasted_as_detectron2(np.float32(box), probability, (20, 30))


@pytest.mark.parametrize("seed", [146, 288, 7046, 11096])
def test_paste_rounds_as_detectron2(seed):
    """Of a pixel in some millions the probability is so near to 1/2 that the rounding decides."""
    rng = np.random.default_rng(seed)
    box = np.float32([*rng.integers(0, 60, 2), *rng.integers(61, 160, 2)])
    probability = rng.random((28, 28), dtype=np.float32)
    assert_pasted_as_detectron2(box.clip(0, np.float32([160, 120] * 2)), probability, (120, 160))


@pytest.mark.parametrize("others, good", [(2, True), (4, False)])
def test_compares_keypoints(others, good):
    """Of 100 objects; Detectron2 rounds a box up to whole pixels, so that few may be others."""
    boxes = np.arange(400, dtype=np.float32).reshape(100, 4)
    keypoints = np.random.default_rng(0).random((100, 17, 3), dtype=np.float32) + [0, 0, 9]
    scores, classes = np.ones(100), np.zeros(100, dtype=int)
    fields = {"scores": torch.tensor(scores), "pred_classes": torch.tensor(classes)}
    fields |= {"pred_boxes": Boxes(boxes), "pred_keypoints": torch.tensor(keypoints)}
    keypoints = keypoints + [1e-3, 0, 1e-3]
    keypoints[:others] += [3, 4, 1]
    found = runtime.Detections(boxes, scores, classes, keypoints=keypoints)
    agreement = compare(found, Instances((500, 500), **fields))
    assert (agreement.others, agreement.good) == (others, good)
    assert agreement.keypoints == pytest.approx(1e-3)
    assert agreement.scores == pytest.approx(1e-4, rel=0.2)  # 1e-3 of 9 to 10


def test_predict_takes_the_file(exported, tmp_path):
    predictor, path = exported("Mask")
    Image.fromarray(image_of((97, 130))).save(image := tmp_path / "a.png")
    arguments = ("predict.py", path, image, "--output", tmp_path / "out", "--score", 0)
    run_tool(*arguments, "--device", "cpu")
    expected = predictor(image)
    found = json.loads((tmp_path / "out/predictions.json").read_bytes())
    for result, score, label in zip(found, expected.scores, expected.pred_classes, strict=True):
        assert result["score"] == pytest.approx(score.item(), abs=1e-4)
        assert result["category_id"] == label + 1
    points = np.reshape([result["keypoints"] for result in found], (-1, 17, 3))[..., :2] + 0.5
    np.testing.assert_allclose(points, expected.pred_keypoints[..., :2], atol=1e-2)
    data = json.loads((tmp_path / "out/annotations.json").read_bytes())
    assert data["categories"][0]["keypoints"] == predictor.keypoint_names
    assert "ONNX Runtime has cpu here" in refusal(*arguments, "--overwrite", "--device", "moon")


class TestTool:
    def test_refuses_what_differs(self, special, tmp_path):
        predictor = special[0]
        pool = tracing._pool
        with mock.patch.object(tracing, "_pool", lambda *args: pool(*args).flip(3)):
            with pytest.raises(ConfigError, match="a.onnx is not written, as it does not find"):
                export_onnx(predictor, str(tmp_path / "a.onnx"))
        assert not list(tmp_path.iterdir())

    def test_panoptic(self, tmp_path):
        name = "COCO-PanopticSegmentation/panoptic_fpn_R_50_gn_3x.yaml"
        weights = weights_of(name, tmp_path / "weights.pth")
        file = gn_detect.get_config_file(name)
        arguments = weights, tmp_path / "a.onnx", "--config-file", file, *OPTS
        assert "PanopticFPN cannot be exported" in refusal("export.py", *arguments)
