import re

import pytest
import timm
import torch
import torchvision
from detectron2.modeling import build_model
from helpers import TINY, config, randomize, run_tool

import gn_detect
from gn_detect.checkpoint import Checkpointer, WeightGuards, read_weights

pytestmark = pytest.mark.slow

R50 = gn_detect.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_gn_3x.yaml")
RGB = [
    *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]"),
    *("MODEL.PIXEL_STD", "[58.395,57.12,57.375]"),
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A file of timm's resnet50_gn."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("resnet50_gn"))
    path = tmp_path_factory.mktemp("timm") / "resnet50_gn.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_there_and_back(classifier, tmp_path):
    model, path = classifier
    out = tmp_path / "backbone.safetensors"
    shown = run_tool("convert_weights.py", path, out).stdout
    assert "has the names of torchvision, 159 tensors" in shown and f"written: {out}" in shown
    back = tmp_path / "classifier.pth"
    run_tool("convert_weights.py", out, back, "--export", "timm")
    state = torch.load(back)
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in state.items())


def test_for_a_model(classifier, tmp_path):
    model, path = classifier
    out = tmp_path / "detector.pth"
    shown = run_tool("convert_weights.py", path, out, "--config-file", R50, *RGB).stdout
    backbone = next(line for line in shown.splitlines() if line.startswith("| backbone"))
    assert [cell.strip() for cell in backbone.split("|")[2:-1]] == [
        *("23,508,032", "100.00 %", "159", "0", "0")
    ]
    weights = read_weights(str(out))
    assert not weights.partial and weights.origin.stride_in_1x1 is False
    conv = weights.state["backbone.bottom_up.res5.2.conv3.weight"]
    assert torch.equal(conv, model.layer4[2].conv3.weight)


def test_another_input_is_refused(classifier, tmp_path):
    _, path = classifier
    out = tmp_path / "detector.pth"
    run = run_tool("convert_weights.py", path, out, "--config-file", R50, check=False)
    assert run.returncode == 1 and not out.exists()
    assert "error: " in run.stderr and "INPUT.FORMAT is BGR, the weights' is RGB" in run.stderr


def test_convolutions_of_batch_norm(tmp_path):
    model = torchvision.models.resnet50()
    torch.save(model.state_dict(), tmp_path / "resnet50.pth")
    args = [tmp_path / "resnet50.pth", tmp_path / "out.pth", "--config-file", R50]
    run = run_tool("convert_weights.py", *args, *RGB, check=False)
    assert run.returncode == 1 and "was trained with BN in 53 layers that are GN" in run.stderr
    shown = run_tool("convert_weights.py", *args, "--allow-bn-conv-only", *RGB).stdout
    assert "gamma and beta of 53 layers of BN that are GN here are left out" in shown
    state = read_weights(str(tmp_path / "out.pth")).state
    assert len(state) == 53 and not any("norm" in name for name in state)
    # What was let pass once is in order afterwards.
    again = [tmp_path / "out.pth", tmp_path / "again.pth", "--config-file", R50]
    shown = run_tool("convert_weights.py", *again, *RGB).stdout
    assert "gamma and beta of 53 layers of BN that are GN here are left out" in shown
    run = run_tool("convert_weights.py", *args[:2], "--allow-bn-conv-only", check=False)
    assert run.returncode == 2 and "need --config-file" in run.stderr


def test_backbone_of_a_trained_detector(tmp_path, coco_files):
    """Its origin says what input it expects; another detector is fine-tuned from it, as in
    docs/weights.md."""
    name = "quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"
    cfg = config(name, *TINY)
    model = randomize(build_model(cfg))
    Checkpointer(model, str(tmp_path), guards=WeightGuards.from_config(cfg)).save("model_final")
    out = tmp_path / "resnet50.safetensors"
    run_tool("convert_weights.py", tmp_path / "model_final.pth", out, "--export", "torchvision")
    again = read_weights(str(out)).state
    ours = {f"backbone.bottom_up.{n}": t for n, t in again.items()}
    state = model.state_dict()
    flipped = ours.pop("backbone.bottom_up.stem.conv1.weight")
    assert len(ours) == 158 and all(torch.equal(t, state[n]) for n, t in ours.items())
    conv = state["backbone.bottom_up.stem.conv1.weight"].flip(1)
    torch.testing.assert_close(flipped / conv, (flipped / conv)[:1].expand(conv.shape))
    args = ["--config-file", gn_detect.get_config_file(name), *coco_files.arguments("train")]
    opts = [*TINY, *RGB, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 1e-9]
    opts += ["OUTPUT_DIR", tmp_path / "out"]
    shown = run_tool("train_net.py", *args, *opts, "MODEL.WEIGHTS", out).stdout
    assert re.search(r"\| backbone +\| +[\d,]+ \| +100.00 %", shown)
    trained = read_weights(str(tmp_path / "out/model_final.safetensors")).state
    for name in ours:  # it has made a step, but hardly moved
        torch.testing.assert_close(trained[name], ours[name])


def test_errors_are_sentences(tmp_path):
    run = run_tool("convert_weights.py", tmp_path / "a.pth", tmp_path / "b.pth", check=False)
    assert run.returncode == 1 and run.stderr.endswith(f"there is no file {tmp_path / 'a.pth'}\n")
    (tmp_path / "a.pth").write_text("<html>")
    run = run_tool("convert_weights.py", tmp_path / "a.pth", tmp_path / "b.pth", check=False)
    assert "a web page, so the download failed" in run.stderr and "Traceback" not in run.stderr
