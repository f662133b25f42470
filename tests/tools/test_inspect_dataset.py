import base64
import re

import numpy as np
import pytest
from helpers import ROOT, refusal, run_tool
from PIL import Image

PHOTOS = ROOT / "configs/quickstart/mask_rcnn_R_18_FPN_gn_photos.yaml"


def arguments(files) -> list:
    return ["inspect_dataset.py", "--json", files.json_file, "--images", files.image_root]


@pytest.mark.filterwarnings("ignore:overflow")
def test_text_picture_and_page(coco_files, tmp_path, caplog):
    coco_files.content["categories"][0]["name"] = r"$\frac$<b>"  # neither a formula nor a tag
    for annotation, area in zip(coco_files.content["annotations"], (0, -1, 1e308), strict=True):
        annotation.update(area=area, iscrowd=None)
    coco_files.write()
    png, page = tmp_path / "new/report.png", tmp_path / "report.html"
    result = run_tool(
        *(*arguments(coco_files), "--config-file", PHOTOS, "--output", png, "--html", page),
        *("INPUT.MIN_SIZE_TRAIN", "(100, 200)"),
    )
    assert "3 objects" in result.stdout and "side 150 (mean of 100 to 200)" in result.stdout
    assert re.search("^- .*iscrowd of null", result.stdout, re.MULTILINE)
    assert result.stderr == "" and not caplog.records  # nothing is said twice
    assert np.ptp(Image.open(png).convert("L")) > 200
    text = page.read_text()
    assert base64.b64encode(png.read_bytes()).decode() in text
    assert r"$\frac$&lt;b&gt;" in text and r"\frac$<b>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.parametrize("config", [(), ("--config-file", PHOTOS)])
def test_without_annotations(coco_files, tmp_path, config):
    del coco_files.content["annotations"]
    coco_files.write()
    png = tmp_path / "report.png"
    shown = run_tool(*arguments(coco_files), *config, "--output", png).stdout
    assert "3 (100 %) of them without objects; 0 objects of 2 classes" in shown
    assert "IoU" not in shown and Image.open(png).format == "PNG"


def test_what_cannot_be_inspected(coco_files, tmp_path):
    given = arguments(coco_files)
    sizes = "--config-file", PHOTOS, "INPUT.MIN_SIZE_TRAIN", "()"
    assert "INPUT.MIN_SIZE_TRAIN is (): " in refusal(*given, *sizes)
    assert "'absent.yaml' does not exist" in refusal(*given, "--config-file", "absent.yaml")
    assert "is a directory" in refusal(*given, "--output", tmp_path).lower()
    assert "annotations.json" in refusal(*given, "--html", coco_files.json_file / "report.html")
    coco_files.json_file.write_text('{"images": [')
    assert "annotations.json is not valid JSON" in refusal(*given)
