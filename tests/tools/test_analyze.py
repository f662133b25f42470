import base64
import io
import json
import re

import numpy as np
import pytest
from helpers import refusal, run_tool
from PIL import Image

from gn_detect.evaluation.errors import analyze


@pytest.fixture
def given(coco_files, tmp_path):
    """The arguments; results: an object found, one as another class, one not at all."""
    found = [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": score}
        for a, score in zip(coco_files.content["annotations"], (0.9, 0.8, 0.1), strict=True)
    ]
    found[1]["category_id"] = {3: 7, 7: 3}[found[1]["category_id"]]
    (tmp_path / "results.json").write_text(json.dumps(found))
    files = {"--json": coco_files.json_file, "--images": coco_files.image_root}
    files |= {"--results": tmp_path / "results.json", "--output": tmp_path / "new/analysis"}
    return ["analyze.py", *(word for pair in files.items() for word in pair)]


def test_page_numbers_and_summary(given, tmp_path):
    shown = run_tool(*given)
    assert shown.stderr == ""
    expected = analyze(given[2], given[6])
    assert expected.text() in shown.stdout and "3 results (bbox) on 3 images" in shown.stdout
    assert [image.file_name for image in expected.worst] == ["2.png", "3.png"]
    numbers = json.loads((tmp_path / "new/analysis/analysis.json").read_text())
    assert numbers == json.loads(json.dumps(expected.to_dict()))
    page = (tmp_path / "new/analysis/report.html").read_text()
    pictures = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert len(pictures) == 2 and all(image.reason in page for image in expected.worst)
    wrong = np.array(Image.open(io.BytesIO(base64.b64decode(pictures[0]))), float)
    assert wrong.shape[1] > wrong.shape[0]  # ground truth, and beside it another class
    left, right = np.array_split(wrong, 2, axis=1)
    assert np.abs(left - right[:, -left.shape[1] :]).max() > 100


def test_other_files_are_never_overwritten_unless_asked(given):
    run_tool(*given)
    assert "new/analysis holds files; choose another one, or add --overwrite" in refusal(*given)
    higher = run_tool(*given, "--overwrite", "--score-threshold", 0.85).stdout
    assert "at scores >= 0.85 and IoU 0.5, 1 of 1 results are right" in higher


def test_what_cannot_be_analyzed(given, tmp_path):
    assert "results have no mask; analyze boxes" in refusal(*given, "--iou-type", "segm")
    (tmp_path / "results.json").write_text("[]")
    assert "results.json holds no results" in refusal(*given)
    absent = [tmp_path / "absent" if word == given[4] else word for word in given]
    assert "absent (for" in refusal(*absent)
    given[-1] = given[2] / "below"
    assert "annotations.json/below cannot be written: Not a directory" in refusal(*given)
