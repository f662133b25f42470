"""The classes and keypoints that weights were trained on, against those of the data."""

import pytest
import torch
from detectron2.modeling import build_model
from helpers import TINY, config

from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights
from gn_detect.checkpoint.export import write_weights
from gn_detect.checkpoint.outputs import is_predictor
from gn_detect.config import ConfigError

MASK_RCNN = "quickstart/mask_rcnn_R_18_FPN_gn_shapes.yaml"
KINDS = {
    MASK_RCNN: {f"box_predictor.{n}" for n in ("cls_score", "bbox_pred")} | {"mask_head.predictor"},
    "COCO-InstanceSegmentation/cascade_mask_rcnn_R_50_FPN_gn_3x.yaml": {
        *(f"box_predictor.{i}.{n}" for i in range(3) for n in ("cls_score", "bbox_pred")),
        "mask_head.predictor",
    },
    "COCO-Detection/retinanet_R_50_FPN_gn_1x.yaml": {"head.cls_score"},
}
KEYPOINTS = "COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_gn_3x.yaml"
NAMES = ["dog", "cat", "cow"]
SWAPPED = ["cat", "dog", "cow"]


def small(*opts, name=MASK_RCNN):
    classes = ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3)
    return config(name, *TINY, *classes, *opts)


def checkpointer(classes, *opts, keypoints=(), save_dir="", **kwargs):
    cfg = small(*opts, name=KEYPOINTS if keypoints else MASK_RCNN)
    guards = WeightGuards.from_config(cfg)
    model = build_model(cfg)
    for parameter in model.parameters():  # also those that start at 0
        torch.nn.init.normal_(parameter)
    names = {"classes": classes, "keypoints": keypoints}
    return Checkpointer(model, str(save_dir), guards=guards, names=names, **kwargs)


@pytest.fixture(scope="module", params=["pth", "safetensors"])
def weights(request, tmp_path_factory):
    """Of a model for the classes NAMES, as a run writes them."""
    path = tmp_path_factory.mktemp("weights")
    checkpointer(NAMES, save_dir=path).save("model_final")
    return str(path / f"model_final.{request.param}")


def state(checkpointer):
    return {k: v.clone() for k, v in checkpointer.model.state_dict().items()}


@pytest.mark.parametrize(
    "classes, message",
    [
        (SWAPPED, r"class 1 of 3 is 'dog' .* 'cat' in the data \(the same names in another order"),
        (["dog", "cat", "horse"], "class 3 of 3 is 'cow' in the weights, 'horse' in the data"),
        (["Dog", "cat", "cow"], "class 1 of 3 is 'dog'"),
    ],
)
def test_other_classes_are_not_evaluated(weights, classes, message):
    ours = checkpointer(classes, evaluation=True)
    before = state(ours)
    with pytest.raises(ConfigError, match=f"{message}.*GUARDS.WEIGHTS_CLASSES False"):
        ours.load(weights)
    assert all(torch.equal(v, before[k]) for k, v in state(ours).items())


@pytest.mark.parametrize(
    "classes, opts", [(NAMES, []), ([], []), (SWAPPED, ["GUARDS.WEIGHTS_CLASSES", False])]
)
@pytest.mark.parametrize("evaluation", [True, False])
def test_these_are(weights, classes, opts, evaluation, caplog):
    ours = checkpointer(classes, *opts, evaluation=evaluation)
    ours.load(weights)
    theirs = read_weights(weights).state
    assert all(torch.equal(v, theirs[k]) for k, v in state(ours).items())
    assert "classes" not in caplog.text


def test_predictors_of_other_classes_start_afresh(weights, caplog):
    caplog.set_level("INFO")
    ours = checkpointer(SWAPPED)
    before = state(ours)
    ours.load(weights)
    theirs = read_weights(weights).state
    afresh = {k for k, v in state(ours).items() if not torch.equal(v, theirs[k])}
    assert afresh == {f"roi_heads.{n}.{p}" for n in KINDS[MASK_RCNN] for p in ("weight", "bias")}
    assert all(torch.equal(state(ours)[k], before[k]) for k in afresh)
    assert "class 1 of 3 is 'dog' in the weights, 'cat' in the data" in caplog.text
    assert "WEIGHTS_CLASSES False" in caplog.text and "box head (roi_heads.box_p" in caplog.text
    assert "missing: roi_heads.box_predictor" in caplog.text


@pytest.mark.parametrize("name", KINDS)
def test_predictors_are_what_depends_on_the_number_of_classes(name):
    three, four = (
        build_model(
            small("MODEL.ROI_HEADS.NUM_CLASSES", n, "MODEL.RETINANET.NUM_CLASSES", n, name=name)
        ).state_dict()
        for n in (3, 4)
    )
    depends = {k for k in three if three[k].shape != four[k].shape}
    found = {k for k in three if is_predictor(k, "classes")}
    prefix = "" if "retinanet" in name else "roi_heads."
    assert found == {f"{prefix}{n}.{p}" for n in KINDS[name] for p in ("weight", "bias")}
    assert depends <= found


def test_exchanged_keypoints(tmp_path, caplog):
    points = ["left", "right", *(str(i) for i in range(15))]
    theirs = checkpointer(NAMES, keypoints=points, save_dir=tmp_path)
    theirs.save("model_final")
    weights = str(tmp_path / "model_final.safetensors")
    assert read_weights(weights).names("keypoints") == points
    swapped = [points[1], points[0], *points[2:]]
    ours = checkpointer(NAMES, keypoints=swapped)
    ours.load(weights)
    saved = state(theirs)
    afresh = {k for k, v in state(ours).items() if not torch.equal(v, saved[k])}
    assert afresh == {f"roi_heads.keypoint_head.score_lowres.{p}" for p in ("weight", "bias")}
    message = "keypoint 1 of 17 is 'left' in the weights, 'right' in the data"
    assert message in caplog.text
    with pytest.raises(ConfigError, match=message):
        checkpointer(NAMES, keypoints=swapped, evaluation=True).load(weights)
    with pytest.raises(ConfigError, match=r"--resume: .* 17 keypoints \(left, .* 17 \(right, left"):
        checkpointer(NAMES, keypoints=swapped, save_dir=tmp_path).resume_or_load("", resume=True)
    checkpointer(NAMES, keypoints=points, evaluation=True).load(weights)


def test_classes_go_with_converted_weights(weights, tmp_path):
    write_weights(str(tmp_path / "a.pth"), read_weights(weights))
    assert read_weights(str(tmp_path / "a.pth")).names("classes") == NAMES


@pytest.mark.parametrize("classes", [7, "dog", {"dog": 1}, [1, 2, 3], None])
def test_classes_of_a_file_are_not_trusted(classes, tmp_path):
    theirs = checkpointer([])
    torch.save({"model": theirs.model.state_dict(), "classes": classes}, tmp_path / "w.pth")
    expected = ["1", "2", "3"] if isinstance(classes, list) else []
    weights = read_weights(str(tmp_path / "w.pth"), theirs.model.state_dict())
    assert weights.names("classes") == expected
